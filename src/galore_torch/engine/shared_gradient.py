"""The mean over processes of a weight's gradient, of which each process has its own, and which is never sent whole unless it has to be.

A subspace is found by thin products with the gradient. Products are linear, so the mean of the processes' products is the product with
the mean: r columns cross the wire in the place of a matrix (GaLore 2, arXiv 2504.20437; PowerSGD, arXiv 1905.13727, Alg. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.processes import Processes
from galore_torch.ops.linalg import gaussian, product_bound, readable
from galore_torch.ops.outer import OuterProduct


@dataclass(frozen=True)
class SharedGradient:
    """It stands in the place of G, (E x) m x n, where that is only multiplied, as `OuterProduct` does. Each product is one all-reduce.

    terms: what this process has of the gradient, which is their sum; none where it has not used the weight. All processes multiply, in
    the same order. is_zero: of what `measured` gives, which matrices are zero, as are those that no process has used.
    """

    terms: tuple[Tensor | OuterProduct, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    processes: Processes
    is_zero: Tensor | None = None

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def mT(self) -> SharedGradient:
        shape = torch.Size((*self.shape[:-2], self.shape[-1], self.shape[-2]))
        return replace(self, terms=tuple(term.mT for term in self.terms), shape=shape)

    @property
    def mH(self) -> SharedGradient:
        """It is real: complex gradients are tensors, whose projector needs them whole."""
        return self.mT

    def dim(self) -> int:
        return len(self.shape)

    def to(self, dtype: torch.dtype) -> SharedGradient:
        return replace(self, terms=tuple(term.to(dtype) for term in self.terms), dtype=dtype)

    def __getitem__(self, index: Tensor) -> SharedGradient:
        """Some matrices of a batch."""
        return replace(self, terms=tuple(term[index] for term in self.terms), shape=torch.Size((len(index), *self.shape[-2:])))

    def __matmul__(self, other: Tensor) -> Tensor:
        return self._mean([term @ other for term in self.terms], (self.shape[-2], other.shape[-1]))  # (m, n) @ (n, k)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return self._mean([other @ term for term in self.terms], (other.shape[-2], self.shape[-1]))  # (k, m) @ (m, n)

    def _mean(self, products: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        return self.processes.mean(self._total(products, shape))

    def _total(self, products: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        if not products:
            return torch.zeros((*self.shape[:-2], *shape), dtype=self.dtype, device=self.device)
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    def dense(self) -> Tensor:
        """G itself, m n elements on the wire, in fp32 or fp64: for projectors that need the matrix."""
        wide = torch.promote_types(self.dtype, torch.float32)
        whole = [(term.dense() if isinstance(term, OuterProduct) else term).to(wide) for term in self.terms]
        return self.processes.mean(self._total(whole, (self.shape[-2], self.shape[-1])).to(wide))

    def measured(self) -> tuple[Tensor, SharedGradient]:
        """As `linalg.measured`, by one all-reduce: whether G is finite and not zero, and G for products.

        As `OuterProduct.measured`, by the product with one random vector. What it is divided by, where products might overflow, is the mean
        of the processes' own magnitudes: no less than G's.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        exact = self.to(wide)
        probe = gaussian((*self.shape[:-2], self.shape[-1], 1), 0, exact)
        seen = exact._total([term @ probe for term in exact.terms], (self.shape[-2], 1))
        peak = exact._total([_largest(term) for term in exact.terms], (1, 1))
        mean = self.processes.mean(torch.cat([seen, peak], -2)).squeeze(-1)
        is_zero = (mean[..., :-1] == 0).all(-1)
        is_usable = mean.isfinite().all(-1) & ~is_zero
        peak = mean[..., -1:, None]
        fits = peak < product_bound(wide, self.shape[-2:])
        if readable(fits) and bool(fits.all()):
            return is_usable, replace(self, is_zero=is_zero)
        scale = torch.where(fits, 1.0, peak).to(self.dtype)
        return is_usable, replace(self, terms=tuple(_over(term, scale) for term in self.terms), is_zero=is_zero)

    def where(self, wanted: Tensor) -> SharedGradient:
        """Zero but for the ``wanted`` matrices of a batch; wanted: a bool for each."""
        mask = wanted.view(*self.shape[:-2], 1, 1)
        return replace(
            self,
            terms=tuple(term.where(wanted) if isinstance(term, OuterProduct) else torch.where(mask, term, 0.0) for term in self.terms),
        )


def _largest(term: Any) -> Tensor:
    """An upper bound of a term's magnitude for each matrix, (E x) 1 x 1. NaN propagates."""
    if not isinstance(term, OuterProduct):
        return torch.maximum(-term.amin((-2, -1), keepdim=True), term.amax((-2, -1), keepdim=True))
    return term.largest()


def _over(term: Any, scale: Tensor) -> Any:
    """A factor of an outer product is divided, so that neither overflows: the left one."""
    return OuterProduct(term.left / scale, term.right) if isinstance(term, OuterProduct) else term / scale
