"""Tokens: documents become one packed stream, the stream becomes batches in a fixed order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from galore_torch.train.config import PretrainConfig
from galore_torch.train.corpus import check_files, file_documents, has_fields, stdlib_documents
from galore_torch.train.errors import UserError
from galore_torch.train.model import DEMO_VOCAB
from galore_torch.train.tokenizer import TextTokenizer, load_tokenizer, trained_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_HELD_OUT_EVERY = 20  # one document in 20 is held out where there is no --eval_data
_BPE_CHARS = 20_000_000  # more text than this does not change a BPE's merges
_ENCODE_AT_ONCE = 256  # documents


@dataclass(frozen=True)
class TokenData:
    """`train` (N,) and `held_out` (M,) int32 token ids, documents end to end."""

    train: Tensor
    held_out: Tensor
    tokenizer: TextTokenizer
    vocab_size: int
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the training tokens: the same for the same text, tokenizer and length, wherever the files lie."""
        return hashlib.sha256(self.train.numpy().data).hexdigest()


def check_data(config: PretrainConfig) -> None:
    """Everything about the data that can be refused without reading it."""
    check_files(config.data, "--data")
    check_files(config.eval_data, "--eval_data")
    if config.eval_data and not config.data:
        raise UserError("--eval_data is given without --data; give the training text too")
    if "text_field" in config.given and not has_fields(config.data + config.eval_data):
        raise UserError(
            f"--text_field {config.text_field} has no effect without a .jsonl or .parquet file; leave it out, or give such a file"
        )


def load_data(config: PretrainConfig) -> TokenData:
    """Read, split and tokenise as much text as the run can use."""

    def documents() -> Iterator[str]:
        return file_documents(config.data, config.text_field) if config.data else stdlib_documents()

    def training_documents() -> Iterator[str]:
        return documents() if config.eval_data else _split(documents(), held_out=False)

    def held_out_documents() -> Iterator[str]:
        if config.eval_data:
            return file_documents(config.eval_data, config.text_field)
        return _split(documents(), held_out=True)

    tokenizer = _choose_tokenizer(config, training_documents)
    vocab_size = _settle_vocabulary(config, tokenizer)
    needed = config.num_training_steps * config.sequences_per_update * config.max_length + 1
    train = _token_stream(training_documents(), tokenizer, needed)
    held_out = _token_stream(held_out_documents(), tokenizer, config.eval_tokens + 1)
    for tokens, name, cure in (
        (train, "training", "--data with more text"),
        (held_out, "held-out", "--eval_data with more text"),
    ):
        if len(tokens) <= config.max_length:
            raise UserError(
                f"the {name} text has {len(tokens)} tokens; one sequence needs --max_length + 1 = "
                f"{config.max_length + 1}: give {cure}, or a smaller --max_length"
            )
    source = ", ".join(config.data) or "source of Python's standard library"
    return TokenData(train, held_out, tokenizer, vocab_size, source)


def batches(tokens: Tensor, length: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each (batch_size, length) int64; targets are one token ahead.

    The stream is cut into windows; every pass over them is a new permutation that depends on
    `seed` alone, so runs of one seed see the same batches. `start`: windows drawn before, by a run that is resumed here.
    """
    import torch

    starts = torch.arange(0, len(tokens) - length, length)
    offsets = torch.arange(length + 1)

    def order() -> Iterator[Tensor]:
        skipped = start % len(starts)
        for epoch in itertools.count(start // len(starts)):
            generator = torch.Generator().manual_seed(seed + epoch)
            yield from starts[torch.randperm(len(starts), generator=generator)][skipped:]
            skipped = 0

    endless = order()
    while True:
        chosen = torch.stack(list(itertools.islice(endless, batch_size)))
        windows = tokens[chosen[:, None] + offsets].long()  # (batch_size, length + 1)
        yield windows[:, :-1], windows[:, 1:]


def windows_in_order(tokens: Tensor, length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) that cover `tokens` once, in order; the last batch may be smaller.

    A tail shorter than one window is left out: every counted token has the same kind of context.
    """
    count = (len(tokens) - 1) // length
    inputs = tokens[: count * length].view(count, length)
    targets = tokens[1 : count * length + 1].view(count, length)
    for at in range(0, count, batch_size):
        yield inputs[at : at + batch_size].long(), targets[at : at + batch_size].long()


def _split(documents: Iterable[str], *, held_out: bool) -> Iterator[str]:
    # The second of every 20, so that two documents are enough for both sides.
    for index, document in enumerate(documents):
        if (index % _HELD_OUT_EVERY == 1) == held_out:
            yield document


def _choose_tokenizer(config: PretrainConfig, training_documents: Callable[[], Iterator[str]]) -> TextTokenizer:
    if config.tokenizer_name:
        return load_tokenizer(config.tokenizer_name)
    budget = _BPE_CHARS

    def sample() -> Iterator[str]:
        nonlocal budget
        for document in training_documents():
            if budget <= 0:
                return
            budget -= len(document)
            yield document

    return trained_tokenizer(sample(), config.embedding_rows or DEMO_VOCAB)


def _settle_vocabulary(config: PretrainConfig, tokenizer: TextTokenizer) -> int:
    """Rows of the embedding; a tokenizer with more ids than that would index past its end."""
    rows = config.embedding_rows
    if rows is not None and tokenizer.size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids, more than the {rows} rows of the model's "
            f"vocabulary; give --vocab_size {tokenizer.size} or more, or a smaller tokenizer"
        )
    return rows or tokenizer.size


def _token_stream(documents: Iterator[str], tokenizer: TextTokenizer, at_most: int) -> Tensor:
    """(N,) int32, N <= at_most: the documents' tokens, an end-of-text token after each document."""
    import torch

    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    pieces: list[Tensor] = []
    total = 0
    while total < at_most and (texts := list(itertools.islice(documents, _ENCODE_AT_ONCE))):
        ids = [token for document in tokenizer.encode(texts) for token in document + end]
        pieces.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
    return torch.cat(pieces)[:at_most] if pieces else torch.empty(0, dtype=torch.int32)
