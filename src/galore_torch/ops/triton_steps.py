"""Ops: steps of Adam in one pass over G, W and the moments, in Triton. `ops.twins` imports it where a weight on a GPU asks for it.

The plain road is its oracle. Arithmetic is fp32; weights and gradients are fp32 or bf16, moments fp32. No step waits for the device:
whether a gradient is finite is a number there, which the kernels read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_torch.ops import codecs
from galore_torch.ops.codecs import noise
from galore_torch.ops.linalg import norm
from galore_torch.ops.native import AdamStep

TILE = 2048  # elements of G that one program works on
DTYPES = (torch.float32, torch.bfloat16)
LARGEST = tl.constexpr(codecs.LARGEST)


def block_means(weight: Tensor, grad: Tensor, tensors: tuple[Tensor, ...], how: AdamStep) -> bool | None:
    """`ops.native.block_means` on a GPU, of one axis or both: True, for the device sees to a gradient that is not finite, or None."""
    if how.residual > 1:  # Inductor makes one, the plain road the other
        return None
    if not _fits(weight, grad):
        return None
    m, v = tensors
    rows, columns = m.numel() // m.shape[-1], m.shape[-1]
    tall, wide = weight.shape[-2] // m.shape[-2], weight.shape[-1] // m.shape[-1]
    means = TILE // (tall * wide)
    if not means:
        return None
    across = min(means, triton.next_power_of_2(columns))
    down = means // across
    grid = triton.cdiv(rows, down), triton.cdiv(columns, across)
    sizes = {"TALL": tall, "WIDE": wide, "DOWN": down, "ACROSS": across}
    shape = weight.shape[-2], rows, columns
    arguments = (weight, grad, m, v, norm(grad), *_noise(weight, how.seed), *shape, *how.numbers)
    _launch(_means_kernel, grid, arguments, RESIDUAL=how.residual, ROUNDS=how.seed is not None, **sizes)
    return True


def rows(weight: Tensor, grad: Tensor, tensors: tuple[Tensor, ...], how: AdamStep) -> bool | None:
    """Adam on the rows of a set that follow each other, around the end too, and the decay on all; as `block_means` otherwise.

    weight, grad (... x m x n); tensors: the moments (... x r x n) and the set (... x r), int64. A gradient counts as finite where its rows
    of the set are.
    """
    if how.residual or not _fits(weight, grad):
        return None
    m, v, index = tensors
    length, n, rank = weight.shape[-2], weight.shape[-1], m.shape[-2]
    block = min(TILE, triton.next_power_of_2(n))
    columns, sizes = triton.cdiv(n, block), (length, n, rank)
    squares = torch.zeros((), dtype=torch.float32, device=weight.device)
    _launch(_squares_kernel, (index.numel(), columns), (grad, index, squares, *sizes), BLOCK=block)
    decays = how.numbers[4] != 1.0
    grid = (weight.numel() // n if decays else index.numel()), columns
    arguments = (weight, grad, m, v, index, squares, *_noise(weight, how.seed), *sizes, *how.numbers)
    _launch(_rows_kernel, grid, arguments, DECAYS=decays, ROUNDS=how.seed is not None, BLOCK=block)
    return True


def _fits(weight: Tensor, grad: Tensor) -> bool:
    return weight.dtype in DTYPES and grad.dtype in DTYPES


def _noise(weight: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    """Of stochastic rounding, for the rows and columns of each matrix; anything where nothing is rounded."""
    return (weight, weight) if seed is None else noise(weight.shape[-2], weight.shape[-1], seed, weight.device)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton takes the current device
        kernel[grid](*arguments, **constants)


@triton.jit
def _moved(moment, value, new):
    """moment + new (value - moment)"""
    return moment + new * (value - moment)


@triton.jit
def _update(m, v, size, eps):
    return size * tl.div_rn(m, tl.sqrt_rn(v) + eps)


@triton.jit
def _store(weight, at, W, inside, row_noise, column_noise, ROUNDS: tl.constexpr):
    """W, fp32, into the weight: to nearest, or as `codecs.stochastic_round` does it."""
    if weight.dtype.element_ty == tl.bfloat16:  # to nearest by hand too, for the interpreter's conversion cuts off
        bits = W.to(tl.int32, bitcast=True)
        noise = (row_noise + column_noise) & 0xFFFF if ROUNDS else 0x7FFF + ((bits >> 16) & 1)
        W = tl.where(tl.abs(W) < LARGEST, ((bits + noise) & -65536).to(tl.float32, bitcast=True), W)
    tl.store(weight + at, W.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _means_kernel(
    weight, grad, m, v, norm_of_grad, row_noise, column_noise, length, rows, columns, new1, new2, size, eps, decay, sign,
    TALL: tl.constexpr, WIDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, RESIDUAL: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """A tile of DOWN x ACROSS means of TALL x WIDE elements each, on axes 0, 2 and 1, 3. rows and columns: of all means."""
    i = (tl.program_id(0).to(tl.int64) * DOWN + tl.arange(0, DOWN))[:, None, None, None]
    j = (tl.program_id(1) * ACROSS + tl.arange(0, ACROSS))[None, None, :, None]
    down, across = tl.arange(0, TALL)[None, :, None, None], tl.arange(0, WIDE)[None, None, None, :]
    inside = (i < rows) & (j < columns)
    row, column = i * TALL + down, j * WIDE + across
    at, at_full = i * columns + j, row * (columns * WIDE) + column
    is_finite = tl.load(norm_of_grad) < float("inf")  # no NaN either

    G = sign * tl.load(grad + at_full, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(G, 3, keep_dims=True), 1, keep_dims=True) * (1.0 / (TALL * WIDE))
    old_m, old_v = tl.load(m + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
    new_m, new_v = _moved(old_m, mean, new1), _moved(old_v, mean * mean, new2)
    if RESIDUAL:
        rest = G - mean
        update = _update(new_m + rest, new_v + rest * rest, size, eps)
    else:
        update = _update(new_m, new_v, size, eps)
    W = decay * tl.load(weight + at_full, mask=inside, other=0.0).to(tl.float32) - tl.where(is_finite, update, 0.0)
    if ROUNDS:
        row_noise = tl.load(row_noise + row % length, mask=i < rows)
        column_noise = tl.load(column_noise + column, mask=j < columns)
    _store(weight, at_full, W, inside, row_noise, column_noise, ROUNDS)
    tl.store(m + at, tl.where(is_finite, new_m, old_m), mask=inside)
    tl.store(v + at, tl.where(is_finite, new_v, old_v), mask=inside)


@triton.jit
def _squares_kernel(grad, index, squares, length, n, rank, BLOCK: tl.constexpr):
    """Adds up the squares of G's rows of the set, a part of one row in each program."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = ((row // rank).to(tl.int64) * length + tl.load(index + row)) * n
    G = tl.load(grad + start + column, mask=column < n, other=0.0).to(tl.float32)
    tl.atomic_add(squares, tl.sum(G * G))


@triton.jit
def _rows_kernel(
    weight, grad, m, v, index, squares, row_noise, column_noise, length, n, rank, new1, new2, size, eps, decay, sign,
    DECAYS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of one row of W in each program: of all rows where they decay, else of those of the set."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    if DECAYS:
        matrix, in_matrix = row // length, row % length
        place = (in_matrix - tl.load(index + matrix * rank) + length) % length  # in the set, where below rank
    else:
        matrix = row // rank
        place, in_matrix = (row % rank).to(tl.int64), tl.load(index + row)
    at_full = (matrix.to(tl.int64) * length + in_matrix) * n + column
    W = decay * tl.load(weight + at_full, mask=inside, other=0.0).to(tl.float32)
    if place < rank:
        at = (matrix.to(tl.int64) * rank + place) * n + column
        is_finite = tl.load(squares) < float("inf")
        G = sign * tl.load(grad + at_full, mask=inside, other=0.0).to(tl.float32)
        old_m, old_v = tl.load(m + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
        new_m, new_v = _moved(old_m, G, new1), _moved(old_v, G * G, new2)
        W -= tl.where(is_finite, _update(new_m, new_v, size, eps), 0.0)
        tl.store(m + at, tl.where(is_finite, new_m, old_m), mask=inside)
        tl.store(v + at, tl.where(is_finite, new_v, old_v), mask=inside)
    if ROUNDS:
        row_noise, column_noise = tl.load(row_noise + in_matrix), tl.load(column_noise + column, mask=inside)
    _store(weight, at_full, W, inside, row_noise, column_noise, ROUNDS)
