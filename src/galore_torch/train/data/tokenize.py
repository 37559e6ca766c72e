"""Text into memory as token ids, with the tokenizer the run is to have: as much of it as the run can use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.packing import encoded, padded_row
from galore_torch.train.data.tokenizer import TextTokenizer, load_tokenizer, trained_tokenizer
from galore_torch.train.errors import UserError
from galore_torch.train.model.llama import DEMO_VOCAB
from galore_torch.train.model.loss import counted

_BPE_CHARS = 20_000_000  # more text than this does not change a BPE's merges
_ENCODE_AT_ONCE = 256  # documents


def choose_tokenizer(config: PretrainConfig, training_documents: Callable[[], Iterator[str]]) -> TextTokenizer:
    """The one that is named, for the model's rows where they are given, or a BPE of the first training documents."""
    if config.tokenizer_name:
        named = load_tokenizer(config.tokenizer_name)
        return named if config.embedding_rows is None else named.within(config.embedding_rows, _own_tokenizer(config))
    budget = _BPE_CHARS

    def sample() -> Iterator[str]:
        nonlocal budget
        for document in training_documents():
            if budget <= 0:
                return
            budget -= len(document)
            yield document

    return trained_tokenizer(sample(), config.embedding_rows or DEMO_VOCAB)


def _own_tokenizer(config: PretrainConfig) -> str:
    """The cure where a tokenizer has more ids than a trained model has rows, which --vocab_size does not change."""
    return f"leave --tokenizer out: {config.hf_model} has its own" if config.hf_model and config.tokenizer else ""


def tokenised(
    documents: Iterable[str], tokenizer: TextTokenizer, config: PretrainConfig, targets: int, sequences: int | None = None
) -> Tensor:
    """Tokens for so many `targets`, fewer where the text ends: (targets + 1,) int32 packed, or padded rows (D, max_length + 1) int32.

    `sequences`: no more padded rows than these.
    """
    if config.pad_documents:
        return _padded(iter(documents), tokenizer, config.max_length, targets, sequences)
    return _token_stream(iter(documents), tokenizer, targets + 1)


def check_enough(tokens: Tensor, name: str, cure: str, config: PretrainConfig) -> None:
    """Refuse text that has not one sequence for each process."""
    processes = config.processes
    if tokens.dim() == 2:
        if len(tokens) < processes:
            raise UserError(f"the {name} text has {len(tokens)} documents of two tokens or more; at least {processes} needed: give {cure}")
    elif len(tokens) <= config.max_length * processes:
        each = "--max_length + 1" if processes == 1 else f"{processes} processes x --max_length + 1"
        raise UserError(
            f"the {name} text has {len(tokens)} tokens; one sequence needs {each} = "
            f"{config.max_length * processes + 1}: give {cure}, or a smaller --max_length"
        )


def _token_stream(documents: Iterator[str], tokenizer: TextTokenizer, at_most: int) -> Tensor:
    """(N,) int32, N <= at_most: the documents' tokens, an end-of-text token after each document."""
    pieces: list[Tensor] = []
    total = 0
    while total < at_most and (texts := list(itertools.islice(documents, _ENCODE_AT_ONCE))):
        pieces += map(torch.from_numpy, encoded(tokenizer, texts))
        total = sum(map(len, pieces))
    return torch.cat(pieces)[:at_most] if pieces else torch.empty(0, dtype=torch.int32)


def _padded(documents: Iterator[str], tokenizer: TextTokenizer, length: int, targets: int, sequences: int | None) -> Tensor:
    """(D, length + 1) int32: a padded row for each document, up to the one that has more targets than are left."""
    rows: list[Tensor] = []
    found = 0
    for row in itertools.islice(_padded_rows(documents, tokenizer, length), sequences):
        found += counted(row[1:])
        if found > targets:
            break
        rows.append(row)
    return torch.stack(rows) if rows else torch.empty(0, length + 1, dtype=torch.int32)


def _padded_rows(documents: Iterator[str], tokenizer: TextTokenizer, length: int) -> Iterator[Tensor]:
    while texts := list(itertools.islice(documents, _ENCODE_AT_ONCE)):
        for ids in encoded(tokenizer, texts):
            if (row := padded_row(ids, length, tokenizer.end_id)) is not None:
                yield torch.from_numpy(row)
