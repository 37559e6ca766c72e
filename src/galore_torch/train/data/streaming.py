"""Training batches from text that is read and tokenised while the model trains. A batch's position says where the next one begins."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.packing import encoded, inputs_and_targets, packed_rows, padded_rows
from galore_torch.train.data.prefetch import Ahead, ordered_map
from galore_torch.train.data.sampler import Documents, Place
from galore_torch.train.data.tokenizer import TextTokenizer
from galore_torch.train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from galore_torch.train.data.packing import Ids

    Batch = tuple[tuple[Tensor, Tensor], dict[str, int]]  # (inputs, targets), position behind it

_ENCODE_AT_ONCE = 64  # documents: a thread's work, of some 10 ms
_BATCHES_AHEAD = 8


class StreamedBatches:
    """Endless (inputs, targets), each (batch_size, max_length) int64, made by config.workers threads ahead of the one that asks.

    `state` is small, plain and exact: batches that begin with it are those that would have come. Workers change no bit.
    """

    def __init__(self, documents: Documents, tokenizer: TextTokenizer, config: PretrainConfig, state: dict[str, int] | None = None) -> None:
        self._state = dict(state or asdict(Place()) | {"used": 0})
        self._source = _batches(documents, tokenizer, config, self._state)
        self._ahead = Ahead(self._source, _BATCHES_AHEAD) if config.workers else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch, self._state = next(self._ahead or self._source)
        return batch

    def state(self) -> dict[str, int]:
        """Where the next batch begins."""
        return dict(self._state)

    def close(self) -> None:
        """End the threads."""
        if self._ahead is not None:
            self._ahead.close()
        else:
            self._source.close()


def _batches(documents: Documents, tokenizer: TextTokenizer, config: PretrainConfig, state: dict[str, int]) -> Generator[Batch, None, None]:
    place, used = Place(**{key: value for key, value in state.items() if key != "used"}), state["used"]

    def encode(chunk: list[tuple[Place, str]]) -> list[tuple[Place, Ids]]:
        places, texts = zip(*chunk, strict=True)
        return list(zip(places, encoded(tokenizer, list(texts)), strict=True))

    encoding = ordered_map(encode, _chunks(documents.after(place)), config.workers)
    tokens = _with_targets(itertools.chain.from_iterable(encoding), documents.source.name, least=2 if config.pad_documents else 1)
    if config.pad_documents:
        rows = padded_rows(tokens, config.max_length, tokenizer.end_id)
    else:
        rows = packed_rows(tokens, config.max_length, used)
    try:
        while True:
            batch = list(itertools.islice(rows, config.batch_size))
            _, place, used = batch[-1]
            stacked = torch.from_numpy(np.stack([row for row, _, _ in batch]))
            yield inputs_and_targets(stacked), asdict(place) | {"used": used}
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
