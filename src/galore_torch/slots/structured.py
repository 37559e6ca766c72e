"""Subspaces that take no matrix product: some of the rows, and means of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.ops import linalg, write
from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.codecs import Seed, TensorSpec
from galore_torch.slots.subspace import Bases, Overlaps, Ranks, Stored

# --- an index set: some of the rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredIndex:
    """Indices, as they are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.name,)

    def spec(self) -> dict[str, TensorSpec]:
        return {self.name: TensorSpec(self.shape, self.dtype)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[self.name]

    read = decode

    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None) -> None:
        state[self.name].copy_(value)


def next_rows(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """The first r rows, then the r that follow, around and around: every row has its turn. No look at the gradient.

    A block never goes on at the first row: the last one is the last r rows, some of which have been trained just before.
    """
    rank = ranks[-2]
    block, last = torch.arange(rank, device=G.device), G.shape[-2] - rank
    if previous is None:
        return {-2: block.expand(*G.shape[:-2], -1).clone()}
    first = previous[-2][..., :1]
    return {-2: block + torch.where(first >= last, 0, (first + rank).clamp_max(last))}


def rows_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """r indices of 8 bytes, whatever the codec."""
    return {-2: StoredIndex("basis", (*view[:-2], ranks[-2]))}


def rows_project(X: Tensor, bases: Bases) -> Tensor:
    """X at the rows of the set: (m, n) -> (r, n)."""
    index = bases[-2]
    if X.dim() == 2:
        return X.index_select(0, index)
    return X.gather(-2, index.unsqueeze(-1).expand(*index.shape, X.shape[-1]))


def rows_back(change: write.WeightUpdate, low: Tensor, bases: Bases) -> None:
    """W <- decay_factor W, and - scale N at the rows of the set."""
    write.subtract_rows(change, bases[-2], low)


def rows_part(bases: Bases) -> slice | None:
    """The block of rows, where the host may look at it: a view of G and of W is then enough, and nothing is gathered."""
    index = bases[-2]
    if index.dim() > 1 or not linalg.readable(index):
        return None
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else None  # a set of an older checkpoint may go on at the first row


def rows_overlap(new: Bases, old: Bases) -> Overlaps:
    """The place of each row in the old set, -1 where it is new."""
    found, place = (new[-2].unsqueeze(-1) == old[-2].unsqueeze(-2)).to(torch.uint8).max(-1)  # (r', 1) == (1, r)
    return {-2: torch.where(found > 0, place, -1)}


# --- means of neighbours -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredBlocks:
    """Nothing: the rank says all. ``shape``: (rank, 0), for a basis without elements."""

    shape: tuple[int, ...]
    keys: tuple[str, ...] = ()

    def spec(self) -> dict[str, TensorSpec]:
        return {}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.empty(self.shape, device="cpu")

    read = decode

    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None) -> None:
        """There is nothing to keep."""


def whole_blocks(length: int, rank: int) -> int | None:
    """How many means of 2^l neighbours: 2^l the largest that divides ``length`` and leaves at least ``rank``; None for no l from 1."""
    size = 1
    while length % (2 * size) == 0 and length // (2 * size) >= rank:
        size *= 2
    return length // size if size > 1 else None


def blocks_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """No state at all."""
    return {axis: StoredBlocks((rank, 0)) for axis, rank in ranks.items()}


def blocks_project(X: Tensor, bases: Bases) -> Tensor:
    """The mean of each block of neighbours (FOAM, arXiv 2512.07112): (m, n) -> (m, r) or (r, n), in fp32 or fp64."""
    for axis, basis in bases.items():
        X = _means(X, axis, basis.shape[0])
    return X


def _means(X: Tensor, axis: int, rank: int) -> Tensor:
    """A 16-bit X is converted a few rows at a time: no full-size copy."""
    wide = torch.promote_types(X.dtype, torch.float32)
    if X.dtype == wide:
        return X.unflatten(axis, (rank, -1)).mean(axis)
    shape = [*X.shape]
    shape[axis] = rank
    out = X.new_empty(shape, dtype=wide)
    rows, low = X.reshape(-1, X.shape[-1]), out.view(-1, shape[-1])
    tall = rows.shape[0] // low.shape[0]
    for some in parts(low.shape[0], chunk_elements(X.device) // (tall * rows.shape[1])):
        block = rows[some.start * tall : some.stop * tall].to(wide)
        low[some] = block.unflatten(axis, (low[some].shape[axis], -1)).mean(axis)
    return out


def blocks_back(change: write.WeightUpdate, low: Tensor, bases: Bases) -> None:
    """W <- decay_factor W - scale E N, where E gives each element of a block the block's own value."""
    write.subtract_spread(change, low)
