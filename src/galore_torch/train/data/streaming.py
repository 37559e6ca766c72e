"""Training batches from text that is read and tokenised while the model trains. A batch's position says where the next one begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.packing import encoded, inputs_and_targets, packed_rows, padded_rows
from galore_torch.train.data.prefetch import Ahead, ordered_map
from galore_torch.train.data.sampler import Documents, Lanes, Place
from galore_torch.train.data.tokenizer import TextTokenizer
from galore_torch.train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from galore_torch.train.data.packing import Ids

    Row = tuple[Ids, Place, int]  # behind its tokens the next one begins: in a document, after so many of its tokens
    Batch = tuple[tuple[Tensor, Tensor], Lanes]  # (inputs, targets), where the lanes are behind it

_ENCODE_AT_ONCE = 64  # documents: a thread's work, of some 10 ms
_BATCHES_AHEAD = 8


class StreamedBatches:
    """Endless (inputs, targets), each (batch_size, max_length) int64, made by config.workers threads ahead of the one that asks.

    The text has as many lanes as the run began with processes, and each packs documents of its own. Row i of the run is row i // lanes of
    lane i % lanes, and belongs to rank i % processes: whatever the number of processes later, a step has the same rows. `state` is small,
    plain and exact at the end of a step: batches that begin with it are those that would have come. Workers change no bit.
    """

    def __init__(
        self, documents: Documents, tokenizer: TextTokenizer, config: PretrainConfig, lanes: Lanes | None = None, rank: int = 0
    ) -> None:
        """`documents`: of all lanes. `lanes`: where all of them are."""
        lanes = lanes or {lane: asdict(Place()) | {"used": 0} for lane in range(config.processes)}
        every = math.gcd(len(lanes), config.processes)
        self._state = {lane: dict(lanes[lane]) for lane in range(rank % every, len(lanes), every)}
        rows = {
            lane: _rows(replace(documents, rank=lane, ranks=len(lanes)), tokenizer, config, state) for lane, state in self._state.items()
        }
        self._source = _batches(rows, len(lanes), config, rank, self._state)
        self._ahead = Ahead(self._source, _BATCHES_AHEAD) if config.workers else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch, self._state = next(self._ahead or self._source)
        return batch

    def state(self) -> Lanes:
        """Where each lane that is read here goes on."""
        return {lane: dict(state) for lane, state in self._state.items()}

    def close(self) -> None:
        """End the threads."""
        if self._ahead is not None:
            self._ahead.close()
        else:
            self._source.close()


def _batches(
    rows: dict[int, Generator[Row, None, None]], lanes: int, config: PretrainConfig, rank: int, state: Lanes
) -> Generator[Batch, None, None]:
    """Those of one rank, from `rows` of its lanes of `lanes`; all of these end each batch as far as all ranks together have got."""
    ranks, together = config.processes, config.batch_size * config.processes
    every = lanes // len(rows)
    try:
        for first in itertools.count(0, together):
            batch = []
            for number in range(first + (rank - first) % every, first + together, every):
                row, place, used = next(rows[number % lanes])
                state = state | {number % lanes: asdict(place) | {"used": used}}
                if number % ranks == rank:
                    batch.append(row)
            yield inputs_and_targets(torch.from_numpy(np.stack(batch))), state
    finally:
        for lane in rows.values():
            lane.close()


def _rows(documents: Documents, tokenizer: TextTokenizer, config: PretrainConfig, state: dict[str, int]) -> Generator[Row, None, None]:
    """(row, place, used) of one lane, as `packed_rows` has them, from a state of it on."""
    place, used = Place(**{key: value for key, value in state.items() if key != "used"}), state["used"]

    def encode(chunk: list[tuple[Place, str]]) -> list[tuple[Place, Ids]]:
        places, texts = zip(*chunk, strict=True)
        return list(zip(places, encoded(tokenizer, list(texts)), strict=True))

    encoding = ordered_map(encode, _chunks(documents.after(place)), config.workers)
    tokens = _with_targets(itertools.chain.from_iterable(encoding), documents.source.name, least=2 if config.pad_documents else 1)
    try:
        if config.pad_documents:
            yield from padded_rows(tokens, config.max_length, tokenizer.end_id)
        else:
            yield from packed_rows(tokens, config.max_length, used)
    finally:
        encoding.close()  # which ends its threads


def _with_targets(documents: Iterable[tuple[Place, Ids]], name: str, least: int) -> Iterator[tuple[Place, Ids]]:
    """Those of at least `least` tokens. UserError where a whole pass has none: the search would have no end."""
    last = None
    for place, ids in documents:
        if len(ids) >= least:
            last = place.epoch
            yield place, ids
        elif place.epoch > (last := place.epoch if last is None else last) + 1:
            raise UserError(f"{name} has no document of {least} tokens or more; give other text, or another --tokenizer")


def _chunks(documents: Iterator[tuple[Place, str]]) -> Iterator[list[tuple[Place, str]]]:
    while chunk := list(itertools.islice(documents, _ENCODE_AT_ONCE)):
        yield chunk
