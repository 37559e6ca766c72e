"""Tokens: documents become one packed stream, or padded rows; those become batches in a fixed order, in memory or streamed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.settings import is_hub_name
from galore_torch.train.data.packing import inputs_and_targets
from galore_torch.train.data.readers import file_documents, stdlib_documents, text_files
from galore_torch.train.data.sampler import HELD_OUT_EVERY, Documents, Lanes, Place, held_out
from galore_torch.train.data.sources import FileSource, HubSource, Source, hub_source
from galore_torch.train.data.streaming import StreamedBatches
from galore_torch.train.data.tokenize import check_enough, choose_tokenizer, tokenised
from galore_torch.train.data.tokenizer import TextTokenizer
from galore_torch.train.model.loss import counted


@dataclass(frozen=True)
class TokenData:
    """Text as token ids, int32: (N,) with documents end to end, or (D, L + 1) with one padded document in a row (`rows.py`).

    `train` is empty where the training text is streamed: `source` is read as training goes on.
    """

    train: Tensor
    held_out: Tensor
    tokenizer: TextTokenizer
    vocab_size: int
    text: str  # what it is, for people
    source: Source | None = None
    split: bool = False  # every 20th document of `source` is held out

    @cached_property
    def fingerprint(self) -> str:
        """What decides the training batches, wherever the files lie: the tokens, or a streamed text's name and the tokenizer."""
        if self.source is None:
            digest = hashlib.sha256(self.train.numpy().data).hexdigest()
            return f"{len(self.train)} {'tokens' if self.train.dim() == 1 else 'documents'}, sha256 {digest[:16]}"
        digest = hashlib.sha256(self.tokenizer.fast.backend_tokenizer.to_str().encode()).hexdigest()
        parted = f", every {HELD_OUT_EVERY}th document held out" if self.split else ""
        return f"a stream of {self.source.identity}{parted}, tokenizer sha256 {digest[:16]}"

    def amount(self, config: PretrainConfig) -> str:
        """How much there is, in words."""
        sequences = config.num_training_steps * config.sequences_per_update
        if self.source is not None:
            return f"streamed, {sequences:,} sequences of {config.max_length} tokens are to be read"
        if config.pad_documents:
            return f"{len(self.train):,} training documents read, {sequences / len(self.train):.1f} passes over them"
        return f"{len(self.train):,} training tokens read, {sequences * config.max_length / len(self.train):.1f} passes over them"

    def record(self) -> dict[str, Any]:
        """What was read, for config.json."""
        return {"train_tokens_read": counted(self.train), "held_out_tokens_read": counted(self.held_out)}

    def batches(self, config: PretrainConfig, lanes: Lanes | None = None, rank: int = 0) -> Batches:
        """The training batches of one of config.processes ranks, from their beginning or from where all lanes are."""
        if self.source is None:
            return WindowBatches(self.train, config, lanes, rank)
        return StreamedBatches(Documents(self.source, config.seed, self.split), self.tokenizer, config, lanes, rank)


class Data(Protocol):
    """What a run is trained on, whatever it is."""

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def amount(self, config: Any) -> str: ...
    def record(self) -> dict[str, Any]: ...
    def batches(self, config: Any, lanes: Lanes | None = None, rank: int = 0) -> Batches: ...


class Batches(Protocol):
    """Endless (inputs, targets): of a text each (batch_size, max_length) int64, of a task as `Sequences.batch` has them."""

    def __next__(self) -> tuple[Any, Tensor]: ...
    def state(self) -> Lanes:
        """Whole numbers that say which batch comes next, of the lanes that this process reads; of one lane where all read the same."""

    def close(self) -> None:
        """No batch is asked for any more."""


class WindowBatches:
    """`batches` of tokens in memory; `sequences_drawn` counts those of all ranks."""

    def __init__(self, tokens: Tensor, config: PretrainConfig, lanes: Lanes | None, rank: int) -> None:
        self._drawn = lanes[0]["sequences_drawn"] if lanes else 0
        self._at_once = config.batch_size * config.processes
        self._batches = batches(tokens, config.max_length, config.batch_size, config.seed, self._drawn, rank, config.processes)

    def __next__(self) -> tuple[Tensor, Tensor]:
        self._drawn += self._at_once
        return next(self._batches)

    def state(self) -> Lanes:
        return {0: {"sequences_drawn": self._drawn}}

    def close(self) -> None:
        pass


def load_data(config: PretrainConfig) -> TokenData:
    """Read, split and tokenise as much text as the run can use; streamed text is opened, and only what is held out is tokenised."""
    source = _training_source(config)
    split = not config.eval_data and not isinstance(source, HubSource)  # a data set of the hub has a split of its own

    def training_documents() -> Iterator[str]:
        if isinstance(source, HubSource):
            first_pass = itertools.takewhile(lambda found: found[0].epoch == 0, Documents(source, config.seed).after(Place()))
            return (text for _, text in first_pass)
        documents = _local_documents(config)
        return _split(documents, held=False) if split else documents

    def held_out_documents() -> Iterator[str]:
        if not config.eval_data:
            return _split(_local_documents(config), held=True) if split else _all_of(_hub(config, config.data, "--data", "validation"))
        if is_hub_name(config.eval_data[0]):
            return _all_of(_hub(config, config.eval_data, "--eval_data", "validation"))
        return file_documents(text_files(config.eval_data, "--eval_data"), config.text_field)

    tokenizer = choose_tokenizer(config, training_documents)
    vocab_size = config.embedding_rows or tokenizer.size
    sequences = config.num_training_steps * config.sequences_per_update
    train = tokenised(training_documents() if source is None else (), tokenizer, config, sequences * config.max_length, sequences)
    held = tokenised(held_out_documents(), tokenizer, config, config.eval_tokens)
    if source is None:
        check_enough(train, "training", "--data with more text", config)
    check_enough(held, "validation", "--eval_data with more text", config)
    text = source.name if source else ", ".join(config.data) or "source of Python's standard library"
    return TokenData(train, held, tokenizer, vocab_size, text, source, split)


def batches(
    tokens: Tensor, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each (batch_size, length) int64; targets are one token ahead.

    Tokens (N,) are cut into windows, of (D, length + 1) each row is one. Every pass over them is a new permutation that depends
    on `seed` alone, so runs of one seed see the same batches. `start`: windows drawn before, by a run that is resumed here.
    Of `ranks` processes each takes every `ranks`-th window of that order: together they see what one would.
    """
    windows = tokens if tokens.dim() == 2 else tokens.unfold(0, length + 1, length)  # (windows, length + 1)

    def order() -> Iterator[Tensor]:
        skipped = start % len(windows)
        for epoch in itertools.count(start // len(windows)):
            generator = torch.Generator().manual_seed(seed + epoch)
            yield from torch.randperm(len(windows), generator=generator)[skipped:]
            skipped = 0

    endless = itertools.islice(order(), rank, None, ranks)
    while True:
        yield inputs_and_targets(windows[torch.stack(list(itertools.islice(endless, batch_size)))])


def windows_in_order(tokens: Tensor, length: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) that cover `tokens` once, in order; the last batch may be smaller. Of `ranks` processes each has its part.

    A tail shorter than one window is left out: every counted token has the same kind of context.
    """
    windows = tokens if tokens.dim() == 2 else tokens.unfold(0, length + 1, length)
    mine = windows[len(windows) * rank // ranks : len(windows) * (rank + 1) // ranks]
    for part in mine.split(batch_size):
        yield inputs_and_targets(part)


def _training_source(config: PretrainConfig) -> Source | None:
    """What is streamed; None: the text is read into memory."""
    if config.data and is_hub_name(config.data[0]):
        return _hub(config, config.data, "--data", "train")
    return FileSource(text_files(config.data, "--data"), config.text_field) if config.stream else None


def _hub(config: PretrainConfig, names: tuple[str, ...], flag: str, split: str) -> HubSource:
    return hub_source(names[0], flag, split, config.text_field)


def _all_of(source: Source) -> Iterator[str]:
    """Every document once, in the order of the shards."""
    return (text for shard in range(source.shards) for text in source.documents(shard, 0) if text.strip())


def _local_documents(config: PretrainConfig) -> Iterator[str]:
    return file_documents(text_files(config.data, "--data"), config.text_field) if config.data else stdlib_documents()


def _split(documents: Iterable[str], *, held: bool) -> Iterator[str]:
    return (document for index, document in enumerate(documents) if held_out(index) == held)
