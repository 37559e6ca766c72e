"""Slot 4: how does the update reach the weights? ``recover(W, N, bases, scale, decay_factor, seed)`` changes W in place.

N (r x n, m x r or r x r) carries the learning rate; ``scale`` is a number; ``decay_factor`` = 1 - lr * weight decay, the decay folded
into the GEMM, is a float, or where `fits_gemm` says no also a 0-d tensor; ``seed`` is None, or that of stochastic rounding to bf16 or INT8;
``subtract`` does the elementwise end of it for 16-bit and INT8 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from galore_torch.ops.codecs import Seed
from galore_torch.ops.int8_weight import row_parts, rows_of
from galore_torch.ops.linalg import mode_product, product_dtype
from galore_torch.ops.write import fits_gemm, subtract

Subtract = Callable[[Tensor, Tensor, Any, Any, Seed | None], None]
Recovery = Callable[[Tensor, Tensor, Mapping[int, Tensor], float, Any, int | None, Subtract], None]


def project_back(
    weight: Tensor,
    update: Tensor,
    bases: Mapping[int, Tensor],
    scale: float,
    decay_factor: Any,
    seed: int | None,
    subtract: Subtract = subtract,
) -> None:
    """W <- decay_factor W - scale (basis N | N basis^T | left N right^T): one GEMM into the weight (GaLore, arXiv
    2403.03507, eq. 11 and Alg. 2).

    weight (m x n), any strides; update and bases in fp32 or fp64. The product for a rounded weight runs in its `product_dtype`.
    """
    left, right = factors(update, bases)
    if fits_gemm(weight):
        weight.addmm_(left.to(weight.dtype), right.to(weight.dtype), beta=decay_factor, alpha=-scale)
        return
    dtype = product_dtype(weight.dtype, weight.device.type)
    right = right.to(dtype)
    for stream, rows in enumerate(row_parts(weight)):
        product = left[rows].to(dtype) @ right  # a few rows at a time: no full-size temporary
        subtract(rows_of(weight, rows), product, scale, decay_factor, None if seed is None else seed + stream)


def factors(update: Tensor, bases: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The full-size update as a product of two thin matrices: (m x r), (r x n)."""
    if 0 in bases:
        right = mode_product(update, bases[1], 1) if 1 in bases else update
        return bases[0], right
    return update, bases[1].mT


RECOVERIES: dict[str, Recovery] = {"project_back": project_back}
