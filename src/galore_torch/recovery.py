"""Slot 4: how does the update reach the weights? ``recover(W, N, bases, shrink, seed)`` changes W in place.

N (r x n, m x r or r x r) carries learning rate and scale; ``shrink`` = 1 - lr * weight decay, the decay folded into the GEMM.
``seed``: None, or the seed of stochastic rounding for bf16 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from galore_torch.codecs import stochastic_round
from galore_torch.linalg import mode_product

Recovery = Callable[[Tensor, Tensor, Mapping[int, Tensor], float, int | None], None]
CHUNK = 1 << 20  # elements of the fp32 temporary that stochastic rounding works in


def project_back(weight: Tensor, update: Tensor, bases: Mapping[int, Tensor], shrink: float, seed: int | None) -> None:
    """W <- shrink W - (basis N | N basis^T | left N right^T): one GEMM into the weight (GaLore, arXiv 2403.03507, eq. 11 and Alg. 2).

    weight (m x n), any strides; update and bases in fp32 or fp64. The product of a bf16 weight runs in bf16.
    """
    left, right = factors(update, bases)
    if seed is None:
        weight.addmm_(left.to(weight.dtype), right.to(weight.dtype), beta=shrink, alpha=-1.0)
        return
    right = right.to(weight.dtype)
    rows = max(1, CHUNK // weight.shape[1])
    for i, start in enumerate(range(0, weight.shape[0], rows)):
        part = weight[start : start + rows]
        product = left[start : start + rows].to(weight.dtype) @ right
        part.copy_(stochastic_round(part.float().mul_(shrink).sub_(product), seed * 8191 + i))


def factors(update: Tensor, bases: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The full-size update as a product of two thin matrices: (m x r), (r x n)."""
    if 0 in bases:
        right = mode_product(update, bases[1], 1) if 1 in bases else update
        return bases[0], right
    return update, bases[1].mT


def subtract(weight: Tensor, update: Tensor, shrink: float, seed: int | None) -> None:
    """W <- shrink W - update, for parameters that are not projected. Any shape."""
    if seed is not None:
        weight.copy_(stochastic_round(weight.float().mul_(shrink).sub_(update), seed))
        return
    if shrink != 1.0:
        weight.mul_(shrink)
    weight.sub_(update.to(weight.dtype) if update.dtype != weight.dtype else update)


RECOVERIES: dict[str, Recovery] = {"project_back": project_back}
