"""Ops: the linear algebra of subspaces. Tensors in, tensors out; no optimizer, no state, no configuration.

Every function is batched over leading dimensions and works in the dtype it is given: callers hand it fp32 or fp64, real or complex.
Where a gradient is only multiplied, an `outer.OuterProduct` or a `sharded.ShardedMatrix` may stand in its place.
Shape suffixes: M x N is the gradient, R the rank. A basis has orthonormal columns: basis^H basis = I, and ^H is ^T for real ones.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.sharded import ShardedMatrix, whole


def readable(tensor: Any) -> bool:
    """Whether the host may look at a value without waiting for a device."""
    return tensor.is_cpu


def measured(grad: Tensor | ShardedMatrix, batch: int = 0) -> tuple[Tensor, Tensor | ShardedMatrix]:
    """(whether a gradient may make a basis; that gradient, for products): in one pass over it and without a sync.

    It may where it is finite and not zero: a bool for each index of the first ``batch`` axes, on the gradient's device. Where products of
    its elements would overflow fp32 (or fp64) it comes over its largest magnitude, which leaves its subspaces; else as it is.
    """
    low, high = _extremes(grad, batch)
    largest = torch.maximum(-low, high)
    is_usable = largest.isfinite() & (largest > 0)
    wide = _wide(grad)
    fits = ~is_usable | (largest < product_bound(wide, grad.shape[batch:]))
    if readable(fits) and bool(fits.all()):
        return is_usable, grad
    scale = torch.where(fits, 1.0, largest)
    return is_usable, grad.to(wide) / scale.view(*scale.shape, *[1] * (grad.dim() - batch))


def _extremes(grad: Tensor | ShardedMatrix, batch: int) -> tuple[Tensor, Tensor]:
    """The least and the largest element of each tensor of a batch, without a temporary; NaN propagates.

    Of a complex one the least and the largest real or imaginary part.
    """
    if isinstance(grad, ShardedMatrix):
        return grad.extremes()
    real = as_real(grad)
    return torch.aminmax(real.flatten(batch), dim=-1) if batch else torch.aminmax(real)


def product_bound(dtype: torch.dtype, shape: torch.Size) -> float:
    """The magnitude of elements of a tensor above which sums of products of two of them may overflow."""
    return math.sqrt(torch.finfo(dtype).max / max(1, shape.numel() * (2 if dtype.is_complex else 1)))


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a complex one a view of its real and imaginary parts, on a last axis of 2."""
    return torch.view_as_real(tensor.resolve_conj().resolve_neg()) if tensor.is_complex() else tensor


def squared(tensor: Tensor) -> Tensor:
    """|x|^2 of each element: real, a new tensor."""
    squares = as_real(tensor).square()
    return squares[..., 0] + squares[..., 1] if tensor.is_complex() else squares  # a sum over 2 takes 80 times as long


def all_finite(tensor: Tensor) -> Tensor | bool:
    """`finite`, said on the host where that may look without waiting."""
    return math.isfinite(_magnitude(tensor)) if readable(tensor) else finite(tensor)


def finite(tensor: Tensor) -> Tensor:
    """Whether every element is finite, and the sum of their squares too: a second moment must not overflow. A 0-d bool."""
    magnitude = _magnitude(tensor)
    return (magnitude - magnitude) == 0  # Inf - Inf is NaN; isfinite() takes five times as long for one number


def _magnitude(tensor: Tensor) -> Tensor:
    """The sum of the squares, or its root, 0-d, in one pass: Inf and NaN stay what they are, and what overflows becomes Inf.

    In fp32 a norm above 1.8e19 has squares that add up to Inf. The sum takes half the time for a small matrix.
    """
    if tensor.dtype != _wide(tensor) or tensor.is_complex() or not tensor.is_contiguous():
        return norm(tensor)
    flat = tensor.view(-1)
    return torch.dot(flat, flat)


def norm(tensor: Tensor) -> Tensor:
    """The 2-norm of all elements, 0-d, in fp32 or fp64.

    On a CPU torch takes that of a 16-bit tensor from a copy in fp32: there a few rows are copied at a time.
    """
    tensor = as_real(tensor)  # of complex numbers it takes 1,000 times as long
    wide, most = _wide(tensor), chunk_elements(tensor.device)
    if tensor.is_cpu and tensor.dtype != wide and tensor.numel() > most:
        rows = parts(len(tensor), most * len(tensor) // tensor.numel())
        tensor = torch.stack([torch.linalg.vector_norm(tensor[part], dtype=wide) for part in rows])
    return torch.linalg.vector_norm(tensor, dtype=wide)


def _wide(tensor: Tensor | ShardedMatrix) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


THIN = 16  # below so many columns a batch of products takes up to 90 times as long as one product with a copy


def mode_product(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply ``matrix`` (j x k) into an axis (-2 = rows, -1 = columns, -3 and below: earlier ones) whose size is k.

    This one product is projection (matrix = basis^H), back-projection (matrix = basis) and transport (matrix = C):
    the side of a projection is never spelled out anywhere else.
    """
    matrix = matrix.resolve_conj()  # once, and not for each product of a batch
    if axis == -1:
        return tensor @ matrix.mT  # (m, k) @ (k, j) -> (m, j)
    if axis == -2 and tensor.dim() == matrix.dim():
        return matrix @ tensor  # (j, k) @ (k, n) -> (j, n)
    later = tensor.shape[axis + 1 :]
    if later.numel() < THIN < tensor.shape[:axis].numel():
        return (tensor.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)  # (..., k) @ (k, j): one product, for a copy
    return (matrix @ tensor.flatten(axis + 1)).unflatten(-1, later)  # (j, k) @ (..., k, n) -> (..., j, n)


@cache
def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype for products of matrices of ``dtype`` on this kind of device.

    fp32 for fp16, whose range a sum of products may leave, and for bf16 on a CPU without bf16 arithmetic: there a bf16 product
    takes four times as long as one in fp32.
    """
    if dtype == torch.bfloat16 and device == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return dtype if any(getattr(torch.cpu, check, bool)() for check in checks) else torch.float32
    return torch.float32 if dtype == torch.float16 else dtype


def project(tensor_MN: Tensor, basis: Tensor, axis: int) -> Tensor:
    """basis^T X (axis -2) or X basis (axis -1), in the `product_dtype` of X: r x n or m x r.

    Where X has another dtype, it is converted a few rows at a time: no full-size copy.
    """
    dtype = product_dtype(tensor_MN.dtype, tensor_MN.device.type)
    basis = basis.to(dtype)
    if tensor_MN.dtype == dtype:
        return mode_product(tensor_MN, basis.mT, axis)
    if tensor_MN.dim() > 2:
        return torch.stack([project(matrix, one, axis) for matrix, one in zip(tensor_MN, basis, strict=True)])
    m, n = tensor_MN.shape
    shape = (basis.shape[1], n) if axis == -2 else (m, basis.shape[1])
    low = torch.zeros(shape, dtype=dtype, device=tensor_MN.device)
    for rows in parts(m, chunk_elements(tensor_MN.device) // max(1, n)):
        part = tensor_MN[rows].to(dtype)
        if axis == -2:
            low.addmm_(basis[rows].mT, part)
        else:
            torch.mm(part, basis, out=low[rows])
    return low


def svd_bases(grad_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular vectors on both sides: U (m x r) and V (n x r), by a full SVD (GaLore, arXiv 2403.03507, eq. 12-13).

    The slices are copies: a view of U or Vh would keep the whole factor alive.
    """
    U, _, Vh = torch.linalg.svd(grad_MN, full_matrices=False)
    return U[..., :rank].clone(memory_format=torch.contiguous_format), Vh[..., :rank, :].mT.contiguous()


def gram_bases(grad_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The subspaces of `svd_bases`, from the eigenvectors of the smaller Gram matrix: exact, and several times cheaper.

    Squaring halves the digits of *small* singular values, which a leading subspace does not use. The long side is G times
    the short side, re-orthonormalised.
    """
    if grad_MN.shape[-2] > grad_MN.shape[-1]:
        right, left = gram_bases(grad_MN.mT, rank)
        return left, right
    grad_MN = unit(grad_MN)
    left_MR = _strongest_eigenvectors(grad_MN @ grad_MN.mT, rank).contiguous()  # of (m, m)
    right_NR = orthonormalize(grad_MN.mT @ left_MR)  # (n, m) @ (m, r)
    return left_MR, right_NR


OVERSAMPLING = 8  # extra directions of a sketch: Halko et al., arXiv 0909.4061, section 4.2, use 5 or 10
FRESH = 32  # one direction in so many gives way to a random one at a power step
FEW = 8  # below so many directions none can be spared: there the random one comes on top, and the weakest goes
BLIND = 1e-4  # a direction with less than this share of a random one's energy sees nothing of the gradient


def sketched_basis(A_MN: Tensor, rank: int, seed: int) -> Tensor:
    """Approximate leading left singular vectors (m x r) from nothing: the range of a random sketch after one power iteration.

    Halko et al., arXiv 0909.4061, Alg. 4.4, with r + 8 columns, of which Rayleigh-Ritz on A A^H keeps the best r, strongest
    first. Four thin GEMMs, two QRs, one small eigh.
    """
    width = min(rank + OVERSAMPLING, *A_MN.shape[-2:])
    block = orthonormalize(A_MN @ gaussian((*A_MN.shape[:-2], A_MN.shape[-1], width), seed, A_MN))
    Q = orthonormalize(A_MN @ unit(A_MN.mH @ block))  # (m, n) @ (n, m) @ (m, l)
    return strongest(A_MN, Q, rank)


def strongest(A_MN: Tensor, Q_ML: Tensor, rank: int) -> Tensor:
    """The ``rank`` directions (m x r) of an orthonormal span that hold most of A, strongest first: Rayleigh-Ritz on A A^H."""
    small = unit(Q_ML.mH @ A_MN)  # (l, m) @ (m, n)
    return Q_ML @ _strongest_eigenvectors(small @ small.mH, rank)


def _strongest_eigenvectors(gram_LL: Tensor, rank: int) -> Tensor:
    """Those of the ``rank`` largest eigenvalues of a Gram matrix (l x r), largest first.

    Of a matrix with elements near underflow LAPACK's fp32 makes NaN, or an error: then fp64 does it.
    """
    vectors = None
    with suppress(torch.linalg.LinAlgError):
        vectors = torch.linalg.eigh(gram_LL)[1]  # ascending
    if vectors is None or (readable(vectors) and not bool(vectors.isfinite().all())):
        wide = torch.complex128 if gram_LL.is_complex() else torch.float64
        vectors = torch.linalg.eigh(gram_LL.to(wide))[1].to(gram_LL.dtype)
    return vectors[..., -rank:].flip(-1)


def power_step(A_MN: Tensor, start_MR: Tensor, seed: int) -> Tensor:
    """Approximate leading left singular vectors (m x r) from a basis that gradients leave slowly: QR of A A^T start.

    One step of orthogonal iteration (Golub & Van Loan, Matrix Computations, section 8.2.4; LDAdam, arXiv 2410.16103): two
    thin GEMMs and one QR. It keeps each vector near its old one and orders them by strength, so the last are the weakest:
    one in 32 makes room for a random direction, for nothing orthogonal to both start and A A^T start is ever found without.
    A direction that has lost the gradient, ``BLIND``, is drawn anew from the gradient's own range, as a sketch draws it.
    """
    rank = start_MR.shape[-1]
    fresh = max(1, rank // FRESH)
    if rank >= FEW:
        return _iterated(A_MN, start_MR[..., : rank - fresh], fresh, seed)
    return _facing(strongest(A_MN, _iterated(A_MN, start_MR, fresh, seed), rank), start_MR)


def _facing(found_MR: Tensor, old_MR: Tensor) -> Tensor:
    """Each vector on the side of the old one in its place: an eigenvector's sign is arbitrary."""
    return torch.where((found_MR * old_MR).sum(-2, keepdim=True) < 0, -found_MR, found_MR)


def followed(A_MN: Tensor, start_MR: Tensor) -> Tensor:
    """`power_step` that draws no direction anew: QR of A A^H start (m x r), for a basis that follows A at every step or every few."""
    small = unit(start_MR.mH @ A_MN)  # (r, m) @ (m, n)
    return orthonormalize((small @ A_MN.mH).mH)  # (r, n) @ (n, m), transposed


def sharp_step(A_MN: Tensor, start_MR: Tensor, seed: int) -> Tensor:
    """`power_step` that spares no direction: 8 random ones come on top, and Rayleigh-Ritz on A A^H keeps the best r of all (m x r).

    For the short sides of tensors, where one direction of a dozen would be missed and the small eigh costs little. The answer is
    turned within its span to lie near the old basis, vector by vector: moments then hardly mix.
    """
    rows, rank = start_MR.shape[-2:]
    found = strongest(A_MN, _iterated(A_MN, start_MR, min(OVERSAMPLING, rows - rank), seed), rank)
    return found @ orthonormalize(found.mH @ start_MR)  # (m, r) @ (r, r), unitary whatever is left of the old basis


def switched_basis(A_MN: Tensor, start_MR: Tensor, keep: int, seed: int) -> Tensor:
    """One subspace iteration from ``start``, of which the ``keep`` strongest directions stay, strongest first; the others give way to
    random ones of the complement of all that was found: (m x r) (Alice, arXiv 2502.07752, Alg. 2).

    The complement has m - r directions; where fewer would be drawn than wished, more of the strongest stay.
    """
    rows, rank = start_MR.shape[-2:]
    drawn = min(rank - keep, rows - rank)
    found = strongest(A_MN, orthonormalize(A_MN @ unit(A_MN.mH @ start_MR)), rank)  # (m, n) @ (n, m) @ (m, r)
    found = _facing(found, start_MR)
    random = gaussian((*found.shape[:-1], drawn), seed, A_MN)
    random = random - found @ (found.mH @ random)  # (m, r) @ (r, k)
    return torch.cat([found[..., : rank - drawn], orthonormalize(random)], dim=-1)


def _iterated(A_MN: Tensor, start_MK: Tensor, fresh: int, seed: int) -> Tensor:
    """The orthonormal span (m x (k + fresh)) of A A^H [start, random directions], with those of start that are blind drawn anew."""
    rows, kept = start_MK.shape[-2:]
    random = gaussian((*start_MK.shape[:-1], fresh), seed, A_MN) / rows**0.5
    block = torch.cat([start_MK, random], dim=-1)
    small = unit(block.mH @ A_MN)  # (l, m) @ (m, n)
    energy = squared(small).sum(-1)
    blind = energy <= BLIND * energy[..., kept:].amax(-1, keepdim=True)
    if not readable(A_MN) or bool(blind.any()):
        drawn = gaussian(small.shape, seed + 1, A_MN)
        small = small.renewed(blind, drawn) if isinstance(small, ShardedMatrix) else torch.where(blind.unsqueeze(-1), drawn, small)
    return orthonormalize((small @ A_MN.mH).mH)  # (l, n) @ (n, m), transposed: LAPACK's order of memory


def unit(matrix: Tensor) -> Tensor:
    """The matrix over its largest magnitude: a product of two gradients' worth of elements must neither vanish nor overflow."""
    if isinstance(matrix, ShardedMatrix):
        return matrix / matrix.largest().clamp_min(torch.finfo(matrix.dtype).tiny)
    parts = as_real(matrix).flatten(matrix.dim() - 2)  # a complex magnitude takes 60 times as long as its parts do
    largest = parts.abs().amax(-1).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix * largest.reciprocal()[..., None, None] if matrix.is_complex() else matrix / largest[..., None, None]


def gaussian(shape: tuple[int, ...], seed: int, like: Any) -> Tensor:
    """Standard normal numbers from a seed, on the device and in the dtype of ``like``: a matrix, which the matrices of a batch share."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape[-2:], generator=generator, device=like.device, dtype=like.dtype).expand(shape)


def orthonormalize(columns_MR: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, by QR, with the sign (or phase) that keeps each new vector on its old side.

    LAPACK's QR makes NaN near underflow. So each column comes over a power of two, which changes no digit; and complex ones with noise of
    the size of their rounding error, for what is left of columns that depend on one another goes down to underflow.
    """
    columns_MR = whole(columns_MR)
    size = as_real(columns_MR).abs().amax(-1) if columns_MR.is_complex() else columns_MR.abs()
    largest = size.amax(-2, keepdim=True).clamp_min(torch.finfo(columns_MR.dtype).tiny)
    columns_MR = columns_MR * (torch.frexp(largest).mantissa / largest)
    if columns_MR.is_complex():
        columns_MR += torch.finfo(columns_MR.dtype).eps * gaussian(columns_MR.shape, 0, columns_MR)
    Q, R = torch.linalg.qr(columns_MR)
    side = R.diagonal(dim1=-2, dim2=-1)
    sign = torch.where(side == 0, 1.0, side.sgn()) if side.is_complex() else torch.where(side < 0, -1.0, 1.0)
    return Q.mul_(sign.to(Q.dtype).unsqueeze(-2))
