"""How a weight is written: plain, rounded to 16 bits, or INT8. Which of them it is, is asked here alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops import linalg
from galore_torch.ops.codecs import Seed, stochastic_round
from galore_torch.ops.int8_codes import move
from galore_torch.ops.int8_weight import Int8Weight, row_parts, row_unit, rows_of

__all__ = [
    "WeightUpdate",
    "decay",
    "row_unit",
    "rows_of",
    "subtract",
    "subtract_elements",
    "subtract_product",
    "subtract_rows",
    "subtract_spread",
    "viewed",
]

Subtract = Callable[[Tensor, Tensor, Any, Any, Seed | None], None]
ELEMENTS = 1 << 18  # the random stream of single elements, behind those of a matrix' parts


def fits_gemm(weight: Tensor) -> bool:
    """Whether a product may be added into the weight as it lies in memory: not where the result has to be rounded."""
    return weight.dtype.itemsize > 2 and not isinstance(weight, Int8Weight)


def can_round(weight: Tensor) -> bool:
    """Whether the weight may be rounded at random."""
    return weight.dtype == torch.bfloat16 or isinstance(weight, Int8Weight)


def is_coarse(weight: Tensor) -> bool:
    """Whether rounding steps are so large that parameters must not share their random numbers: INT8."""
    return isinstance(weight, Int8Weight)


def is_plain(weight: Tensor) -> bool:
    """Whether it is one ordinary tensor: neither INT8 nor a subclass of others."""
    return type(weight) in (Tensor, torch.nn.Parameter)


def norm(weight: Tensor) -> Tensor:
    """The 2-norm of all elements, 0-d, in fp32 or fp64; of an INT8 weight a few rows at a time."""
    if isinstance(weight, Int8Weight):
        return torch.linalg.vector_norm(torch.stack([linalg.norm(weight.rows(rows).dequantize()) for rows in row_parts(weight)]))
    return linalg.norm(weight)


def storages(weight: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that hold it, for `subtract_stored`: the weight itself, or what an INT8 weight holds."""
    return weight.stored if isinstance(weight, Int8Weight) else (weight.detach(),)


def mark_written(weight: Tensor) -> None:
    """Tell autograd, which looks at the weight, that it was written through its storages."""
    if isinstance(weight, Int8Weight):
        torch.autograd.graph.increment_version(weight)


def subtract(weight: Tensor, update: Tensor, scale: Any, decay_factor: Any, seed: Seed | None) -> None:
    """W <- decay_factor W - scale update, elementwise and in place. Any shape; update in any float dtype, and used up.

    ``scale`` and ``decay_factor`` are floats or 0-d tensors.
    """
    if isinstance(weight, Int8Weight):
        move(*weight.stored, update, scale, decay_factor, seed)
        return
    if fits_gemm(weight):
        decay(weight, decay_factor)
        weight.sub_(update.mul_(scale))
        return
    new = weight.float().mul_(decay_factor).sub_(update.float().mul_(scale))
    weight.copy_(new if seed is None else stochastic_round(new, seed))


def subtract_stored(stored: tuple[Tensor, ...], update: Tensor, scale: Any, decay_factor: Any, seed: Seed | None) -> None:
    """`subtract` for the `storages` of a weight."""
    if len(stored) == 3:
        move(stored[0], stored[1], stored[2], update, scale, decay_factor, seed)
    else:
        subtract(stored[0], update, scale, decay_factor, seed)


@contextmanager
def viewed(weight: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The weight in another shape; one whose memory is not in that order (a kernel in channels_last) by a copy, written back at the end."""
    seen = weight if tuple(weight.shape) == shape else weight.reshape(shape)
    yield seen
    if seen is not weight and seen.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        weight.copy_(seen.view(weight.shape))


@dataclass(frozen=True)
class WeightUpdate:
    """W <- decay_factor W - scale update, before the update is known.

    weight: (m x n) or a batch of them (E x m x n). ``scale`` and ``decay_factor`` are floats or 0-d tensors; ``seed`` is None, or that of
    stochastic rounding; ``subtract`` does the elementwise part, as it is or compiled.
    """

    weight: Tensor
    scale: Any = 1.0
    decay_factor: Any = 1.0
    seed: int | None = None
    subtract: Subtract = subtract


def subtract_product(change: WeightUpdate, left: Tensor, right: Tensor) -> None:
    """W <- decay_factor W - scale left right, in place: one GEMM into the weight with the decay folded in, where nothing is rounded.

    left (m x r), right (r x n), in fp32 or fp64, batched as the weight is. The product for a rounded weight runs in its `product_dtype`,
    a few rows at a time: no full-size temporary.
    """
    weight = change.weight
    if fits_gemm(weight):
        beta = _beta(weight, change.decay_factor)
        gemm = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
        gemm(left.to(weight.dtype), right.to(weight.dtype), beta=beta, alpha=-change.scale)
        return
    if weight.dim() == 3:
        for one, left_MR, right_RN in zip(_each(change), left, right, strict=True):
            subtract_product(one, left_MR, right_RN)
        return
    dtype = linalg.product_dtype(weight.dtype, weight.device.type)
    right = right.to(dtype)
    for part, rows in _row_parts(change):
        part.subtract(part.weight, left[rows].to(dtype) @ right, change.scale, change.decay_factor, part.seed)


def subtract_rows(change: WeightUpdate, index: Tensor, values: Tensor) -> None:
    """W <- decay_factor W - scale values at the rows ``index`` (r), which are all different; other rows only decay.

    values (r x n) in fp32 or fp64; index and values batched as the weight is.
    """
    weight = change.weight
    if fits_gemm(weight):
        decay(weight, change.decay_factor)
        values = values.to(weight.dtype)
        if weight.dim() == 2:
            weight.index_add_(0, index, values, alpha=-change.scale)
        else:
            weight.scatter_add_(1, index.unsqueeze(-1).expand_as(values), values * -change.scale)
        return
    if weight.dim() == 3:
        for one, index_R, values_RN in zip(_each(change), index, values, strict=True):
            subtract_rows(one, index_R, values_RN)
        return
    padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
    place = index.new_full((weight.shape[0],), values.shape[0]).index_copy_(0, index, torch.arange(len(index), device=index.device))
    for part, rows in _row_parts(change):
        part.subtract(part.weight, padded[place[rows]], change.scale, change.decay_factor, part.seed)


def subtract_elements(change: WeightUpdate, index: Tensor, values: Tensor) -> None:
    """W <- W - scale values at the elements ``index`` (k) of W flattened, which are all different; the decay was another's part.

    values (k) in fp32 or fp64, or complex with such parts; used up. Not for INT8.
    """
    seed = None if change.seed is None else change.seed + ELEMENTS
    with viewed(change.weight, (change.weight.numel(),)) as flat:
        some = flat[index]
        subtract(some, values, change.scale, 1.0, seed)
        flat.index_copy_(0, index, some)


def subtract_spread(change: WeightUpdate, low: Tensor) -> None:
    """W <- decay_factor W - scale E low, in place, where E gives each element of a block of neighbours the block's value in ``low``.

    low (r x n), (m x r) or (r x r') in fp32 or fp64, batched as the weight is; r divides m or n.
    """
    subtract_parts(change, low, lambda low, rows: spread(low, change.weight.shape[-2:], rows))


def subtract_parts(change: WeightUpdate, tensors: Any, make: Callable[[Any, slice], Tensor]) -> None:
    """W <- decay_factor W - scale make(tensors, rows), a few rows at a time: no full-size temporary.

    ``tensors``: one, or a tuple of them, batched as the weight is. ``make`` gives the update of some rows of one matrix, a new tensor.
    """
    if change.weight.dim() == 3:
        for i, one in enumerate(_each(change)):
            subtract_parts(one, tuple(each[i] for each in tensors) if isinstance(tensors, tuple) else tensors[i], make)
        return
    for part, rows in _row_parts(change):
        part.subtract(part.weight, make(tensors, rows), change.scale, change.decay_factor, part.seed)


def spread(low: Tensor, shape: tuple[int, ...], rows: slice) -> Tensor:
    """Some rows of E low (m x n), each element with the value of its block: a new tensor of low's dtype."""
    tall, wide = shape[0] // low.shape[0], shape[1] // low.shape[1]
    blocks = torch.arange(rows.start, rows.stop, device=low.device) // tall
    return low[blocks].repeat_interleave(wide, -1)


def decay(weight: Tensor, decay_factor: Any) -> None:
    """W <- decay_factor W, in place, for a weight that is not rounded."""
    if isinstance(decay_factor, Tensor) or decay_factor != 1.0:
        weight.mul_(decay_factor)


def _beta(weight: Tensor, decay_factor: Any) -> float:
    """The decay as a factor inside a GEMM. A 0-d tensor cannot go there without reading it on the host: it is applied here."""
    if isinstance(decay_factor, Tensor):
        weight.mul_(decay_factor)
        return 1.0
    return float(decay_factor)


def _row_parts(change: WeightUpdate) -> Iterator[tuple[WeightUpdate, slice]]:
    """A few rows of a matrix at a time, each with a random stream of its own."""
    for stream, rows in enumerate(row_parts(change.weight)):
        seed = None if change.seed is None else change.seed + stream
        yield replace(change, weight=rows_of(change.weight, rows), seed=seed), rows


def _each(change: WeightUpdate) -> Iterator[WeightUpdate]:
    """Each matrix of a batch."""
    return (replace(change, weight=weight) for weight in change.weight)
