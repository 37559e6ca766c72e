"""Ops: the nearest matrix with orthonormal rows or columns, by products alone: what Muon makes of a momentum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from galore_torch.ops.linalg import product_dtype

STEPS = 5
# Of the odd polynomial a x + b x^3 + c x^5 that each step applies to the singular values (Jordan et al., "Muon: An optimizer for hidden
# layers in neural networks", 2024, kellerjordan.github.io/posts/muon): steep at 0, so that five steps bring 0.001 to 0.4 and nearly all
# else into 0.7 to 1.2.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T (... x m x n), nearly: five steps of Newton-Schulz. The matrix, in fp32 or fp64, is used up.

    Products are in fp64 for fp64, else in bf16, as published, where the device multiplies it fast, and in fp32 where not
    (`product_dtype`). A scale of the matrix changes nothing; a matrix of zeros stays one. Singular values of the answer lie in about
    0.7 to 1.2, so it is of the size of sqrt(min(m, n)).
    """
    if not matrix.numel():  # of a parameter that has no elements
        return matrix
    m, n = matrix.shape[-2:]
    dtype = matrix.dtype if matrix.dtype == torch.float64 else product_dtype(torch.bfloat16, matrix.device.type)
    X = _normed(matrix).to(dtype).view(-1, m, n)
    X = X.mT if m > n else X  # short by long: (E, s, l)
    for _ in range(STEPS):
        gram = X @ X.mT  # (s, l) @ (l, s)
        even = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        X = torch.baddbmm(X, even, X, beta=A)  # (s, s) @ (s, l)
    return (X.mT if m > n else X).to(matrix.dtype).reshape(matrix.shape)


def unit_steps(matrix: Tensor) -> Tensor:
    """sqrt(max(m, n)) `orthogonalize`: elements of about 1 in root mean square (Liu et al., arXiv 2502.16982, section 2.2)."""
    return orthogonalize(matrix).mul_(math.sqrt(max(matrix.shape[-2:])))


def _normed(matrix: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm, in place; first over its largest element, for squares must neither vanish nor overflow."""
    low, high = torch.aminmax(matrix.flatten(-2), dim=-1)
    matrix.div_(torch.maximum(-low, high).clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None])
    return matrix.div_(torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True).clamp_min(1.0))
