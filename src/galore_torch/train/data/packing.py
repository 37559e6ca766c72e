"""Rows of length + 1 tokens: documents packed end to end, or one in a row. A row becomes inputs and targets one token ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from galore_torch.train.data.sampler import Place
from galore_torch.train.data.tokenizer import TextTokenizer
from galore_torch.train.model.loss import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Ids = NDArray[np.int32]


def encoded(tokenizer: TextTokenizer, texts: list[str]) -> list[Ids]:
    """The tokens of each document, with the end-of-text token after it."""
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    return [np.array(ids + end, dtype=np.int32) for ids in tokenizer.encode(texts)]


def packed_rows(documents: Iterable[tuple[Place, Ids]], length: int, used: int = 0) -> Iterator[tuple[Ids, Place, int]]:
    """(row, place, used): full rows, each of which begins with the last token of the one before.

    The next row begins in the document at `place`, behind `used` of its tokens. The argument `used`: of the first document.
    """
    pieces: deque[tuple[Place, int, Ids]] = deque()  # (document, tokens used, the others)
    waiting = 0
    for place, ids in documents:
        if rest := len(ids[used:]):
            pieces.append((place, used, ids[used:]))
            waiting += rest
        used = 0
        while waiting > length:
            yield _take(pieces, length)
            waiting -= length


def _take(pieces: deque[tuple[Place, int, Ids]], length: int) -> tuple[Ids, Place, int]:
    row = np.empty(length + 1, dtype=np.int32)
    filled = 0
    while True:
        place, used, ids = pieces.popleft()
        part = ids[: length + 1 - filled]
        row[filled : filled + len(part)] = part
        filled += len(part)
        if filled > length:
            pieces.appendleft((place, used + len(part) - 1, ids[len(part) - 1 :]))
            return row, place, used + len(part) - 1


def padded_rows(documents: Iterable[tuple[Place, Ids]], length: int, end_id: int | None) -> Iterator[tuple[Ids, Place, int]]:
    """(row, place, 0): `padded_row` of each document that has one; `place` is behind it."""
    for place, ids in documents:
        if (row := padded_row(ids, length, end_id)) is not None:
            yield row, place.after(), 0


def padded_row(ids: Ids, length: int, end_id: int | None) -> Ids | None:
    """The published sample: the first `length` tokens of a document, the last of them its end-of-text token; then `IGNORED`.

    As there, n tokens give n - 1 targets, so that the row's last place is always padding. None: no token has a next one.
    """
    if len(ids) > length:
        ids = ids[:length].copy()
        if end_id is not None:
            ids[-1] = end_id
    if len(ids) < 2:
        return None
    row = np.full(length + 1, IGNORED, dtype=np.int32)
    row[: len(ids)] = ids
    return row


def inputs_and_targets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, targets), each (B, L) int64, of `rows` (B, L + 1).

    Padding becomes token 0 in the inputs: attention looks back only and padding lies behind the text, so none of it is seen.
    """
    rows = rows.long()
    return rows[:, :-1].clamp(min=0), rows[:, 1:]
