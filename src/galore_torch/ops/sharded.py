"""Ops: a matrix of which each process holds some rows, some columns, or both, never put together.

It stands in the place of G where a subspace is found. A product sums over processes where it sums over a shared axis, and nowhere else.
How processes talk is the caller's: `Part.total` and `Part.largest`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """This process' part of one axis: ``length`` of its indices from ``start`` on, of ``whole``; it may be none.

    ``total(x)`` and ``largest(x)``: the sum and the maximum of a tensor over the processes that share the axis, a new tensor with the
    same bits on each of them.
    """

    start: int
    length: int
    whole: int
    total: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """The part of a tensor that every process holds whole."""
        return tensor.narrow(axis, self.start, self.length)


@dataclass(frozen=True)
class ShardedMatrix:
    """``local`` ((E x) m_i x n_j) is the part of an (E x) m x n matrix. None: the axis is whole on every process.

    ``G @ B``, ``A @ G``, ``G.mT``, ``G / x`` and ``G.square().sum(-1)`` work as for a tensor; what has no shared axis is one.
    """

    local: Tensor
    rows: Part | None
    columns: Part | None

    @property
    def shape(self) -> torch.Size:
        m, n = self.local.shape[-2:]
        return torch.Size((*self.local.shape[:-2], self.rows.whole if self.rows else m, self.columns.whole if self.columns else n))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def is_cpu(self) -> bool:
        return self.local.is_cpu

    @property
    def mT(self) -> ShardedMatrix:
        return ShardedMatrix(self.local.mT, self.columns, self.rows)

    @property
    def mH(self) -> ShardedMatrix:
        """A matrix is real."""
        return self.mT

    def is_complex(self) -> bool:
        return False

    def dim(self) -> int:
        return self.local.dim()

    def to(self, dtype: torch.dtype) -> ShardedMatrix:
        return replace(self, local=self.local.to(dtype))

    def __getitem__(self, index: Tensor) -> ShardedMatrix:
        """Some matrices of a batch."""
        return replace(self, local=self.local[index])

    def __truediv__(self, divisor: Tensor) -> ShardedMatrix:
        return replace(self, local=self.local / divisor)

    def square(self) -> ShardedMatrix:
        return replace(self, local=self.local.square())

    def where(self, wanted: Tensor) -> ShardedMatrix:
        """Zero but for the ``wanted`` matrices of a batch; wanted: a bool for each."""
        return replace(self, local=torch.where(wanted.view(*self.shape[:-2], 1, 1), self.local, 0.0))

    def sum(self, axis: int) -> Tensor:
        """Over the columns, of a matrix whose rows are whole."""
        assert axis == -1
        assert self.rows is None
        return _total(self.local.sum(-1), self.columns)

    def __matmul__(self, other: Tensor | ShardedMatrix) -> Tensor | ShardedMatrix:
        if isinstance(other, ShardedMatrix):
            right, columns = other.local, other.columns
        else:
            right, columns = (self.columns.of(other, -2) if self.columns else other), None
        return _matrix(_total(self.local @ right, self.columns), self.rows, columns)

    def __rmatmul__(self, other: Tensor) -> Tensor | ShardedMatrix:
        left = self.rows.of(other, -1) if self.rows else other
        return _matrix(_total(left @ self.local, self.rows), None, self.columns)

    def renewed(self, which: Tensor, rows: Tensor) -> ShardedMatrix:
        """With other rows where ``which``; rows: all of them, whole."""
        assert self.rows is None
        own = self.columns.of(rows, -1) if self.columns else rows
        return replace(self, local=torch.where(which.unsqueeze(-1), own, self.local))

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The least and the largest element of each matrix; Inf for the largest where one is NaN."""
        if self.local.shape[-2:].numel():
            flat = self.local.flatten(-2)
            ends = torch.stack([-flat.amin(-1), flat.amax(-1)])
        else:
            ends = self.local.new_full((2, *self.local.shape[:-2]), -torch.inf)
        ends = ends.nan_to_num(torch.inf, torch.inf, -torch.inf)  # a maximum over processes may lose NaN
        for part in (self.rows, self.columns):
            ends = part.largest(ends) if part else ends
        return -ends[0], ends[1]

    def largest(self) -> Tensor:
        """The largest magnitude of each matrix, (E x) 1 x 1."""
        low, high = self.extremes()
        return torch.maximum(-low, high)[..., None, None]

    def dense(self) -> Tensor:
        """The whole matrix, on every process: a sum of matrices that are zero but for each process' part, so no bit is lost."""
        out = self.local.new_zeros(self.shape)
        rows, columns = (slice(part.start, part.start + part.length) if part else slice(None) for part in (self.rows, self.columns))
        out[..., rows, columns] = self.local
        return _total(_total(out, self.rows), self.columns)


def whole(matrix: Tensor | ShardedMatrix) -> Tensor:
    """The matrix as a tensor that every process holds."""
    return matrix.dense() if isinstance(matrix, ShardedMatrix) else matrix


def _total(tensor: Tensor, part: Part | None) -> Tensor:
    return part.total(tensor) if part else tensor


def _matrix(local: Tensor, rows: Part | None, columns: Part | None) -> Tensor | ShardedMatrix:
    return ShardedMatrix(local, rows, columns) if rows or columns else local
