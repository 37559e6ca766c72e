"""Ops: the gradient of a linear layer's weight as the two factors it is made of, never multiplied out.

For y = x W^T it is G = dy^T x (dy: T x m tokens by outputs, x: T x n tokens by inputs). A subspace is found, and G projected, by thin
products with the factors: T (m + n) r multiplications where forming G takes T m n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.ops.linalg import gaussian, product_bound, product_dtype, readable


@dataclass(frozen=True)
class OuterProduct:
    """G = left^T right. left: (E x) T x m, right: (E x) T x n, one dtype and device; G is seen as (E x) m x n.

    It stands in the place of G where that is only multiplied: ``G @ B``, ``A @ G`` and ``G.mT`` work as for a tensor.
    """

    left: Tensor
    right: Tensor

    @staticmethod
    def total(terms: Sequence[OuterProduct]) -> OuterProduct:
        """The sum of several, as one with all of their tokens."""
        if len(terms) == 1:
            return terms[0]
        return OuterProduct(torch.cat([term.left for term in terms], -2), torch.cat([term.right for term in terms], -2))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.left.shape[:-2], self.left.shape[-1], self.right.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def is_cpu(self) -> bool:
        return self.left.is_cpu

    @property
    def mT(self) -> OuterProduct:
        return OuterProduct(self.right, self.left)

    @property
    def mH(self) -> OuterProduct:
        """It is real."""
        return self.mT

    def dim(self) -> int:
        return self.left.dim()

    def to(self, dtype: torch.dtype) -> OuterProduct:
        return OuterProduct(self.left.to(dtype), self.right.to(dtype))

    def __getitem__(self, index: Tensor) -> OuterProduct:
        """Some matrices of a batch."""
        return OuterProduct(self.left[index], self.right[index])

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.left.mT @ (self.right @ other)  # (m, T) @ ((T, n) @ (n, k))

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return (other @ self.left.mT) @ self.right  # ((k, m) @ (m, T)) @ (T, n)

    def dense(self) -> Tensor:
        """G itself, in the `product_dtype` of the factors."""
        dtype = product_dtype(self.dtype, self.device.type)
        return self.left.to(dtype).mT @ self.right.to(dtype)

    def largest(self) -> Tensor:
        """An upper bound of G's magnitude for each matrix, (E x) 1 x 1, in the dtype of the factors. NaN propagates."""
        if not self.left.shape[-2]:
            return self.left.new_zeros((*self.shape[:-2], 1, 1))  # no tokens: G is zero
        return _largest(self.left) * _largest(self.right) * self.left.shape[-2]

    def measured(self) -> tuple[Tensor, OuterProduct]:
        """As `linalg.measured`: whether G is finite and not zero, by its product with one random vector, and G for products.

        Each factor is divided by its largest magnitude where products of G's elements might overflow.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        exact = self.to(wide)
        probe = gaussian((*self.shape[:-2], self.shape[-1], 1), 0, exact)
        seen = (exact @ probe).flatten(-2)  # NaN and Inf reach it, and a matrix that is not zero maps no random vector to zero
        is_usable = seen.isfinite().all(-1) & (seen != 0).any(-1)
        if not self.left.shape[-2]:
            return is_usable, self  # no tokens: G is zero
        left, right = (_largest(factor).to(wide) for factor in (self.left, self.right))
        fits = left * right * self.left.shape[-2] < product_bound(wide, self.shape[-2:])
        if readable(fits) and bool(fits.all()):
            return is_usable, self
        left, right = (torch.where(fits, 1.0, scale.clamp_min(torch.finfo(wide).tiny)).to(self.dtype) for scale in (left, right))
        return is_usable, OuterProduct(self.left / left, self.right / right)

    def where(self, wanted: Tensor) -> OuterProduct:
        """Zero but for the ``wanted`` matrices of a batch; wanted: a bool for each."""
        mask = wanted.view(*self.shape[:-2], 1, 1)
        return OuterProduct(*(torch.where(mask, factor, 0.0) for factor in (self.left, self.right)))


def _largest(factor: Tensor) -> Tensor:
    """The largest magnitude of each matrix, (E x) 1 x 1, without a temporary of the factor's size; NaN propagates."""
    return torch.maximum(-factor.amin((-2, -1), keepdim=True), factor.amax((-2, -1), keepdim=True))
