"""Doing: the elementwise region of a step, decode -> rule -> encode -> weight. One function, run as it is or compiled to one pass.

The compiler of torch.compile, Inductor, fuses the region where that pays. What may change between steps is an argument of it,
never a constant, so that it is compiled once for each shape. Adafactor's means and the classes of GaLore(base) are not elementwise
and run as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.inductor import call, has_compiler
from galore_torch.ops import write
from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.codecs import Seed, StoredTensor, matrix_shape, noise
from galore_torch.ops.int8_weight import Int8Weight, row_unit, rows_of
from galore_torch.ops.int8_weight import move as move_int8
from galore_torch.slots.rules import Numbers, Rule

# Elements from which a region is compiled unless the group says otherwise. On one core of a 2.8 GHz Xeon an Adam pass takes 10 us and
# 1.1 ns an element compiled, 20 us and 3 ns an element as it is: it pays early, but every shape takes seconds to compile.
WORTHWHILE = 1 << 15

Values = Mapping[str, Tensor]  # the storage tensors of moments, by state key


@dataclass(frozen=True)
class FusedStep:
    """What stays the same over all steps; equal regions share one compiled function."""

    rule: Rule
    moments: tuple[StoredTensor, ...]
    maximize: bool
    compute_dtype: torch.dtype


@dataclass
class WeightUpdate:
    """The move of a weight: W <- decay_factor W - scale update, ``rounded`` to bf16 or INT8 stochastically, or to nearest."""

    weight: Tensor
    scale: Any
    decay_factor: Any
    rounded: bool


def fuses(weight: Tensor, elements: int, wish: bool | None) -> bool:
    """Whether a region of so many elements is compiled: ``wish``, or by its size; never without a compiler, or for others' subclasses."""
    if wish is False or (wish is None and elements < WORTHWHILE):
        return False
    return type(weight) in (Tensor, torch.nn.Parameter, Int8Weight) and has_compiler(weight.device.type)


def step(
    region: FusedStep,
    low: Tensor,
    is_finite: Tensor | bool,
    state: Values,
    numbers: Numbers,
    seeds: Iterator[int],
    fuse: bool,
    result: Tensor | WeightUpdate,
) -> None:
    """One step of the rule on R and its moments, in place. The update goes into ``result``: a tensor, which may be R, or a weight.

    low: R, any float dtype. ``is_finite``: whether it is finite; when not, moments stay and the update is zero.
    """
    change = result if isinstance(result, WeightUpdate) else None
    tables: tuple[Any, ...] | None = None
    scale_shrink: tuple[Any, ...] = ()
    if fuse := fuse and is_finite is not False:
        tables = tuple(stored.tables(low.device) for stored in region.moments)
        lifted = _lift((*numbers, change.scale, change.decay_factor) if change else numbers, region.compute_dtype)
        numbers, scale_shrink = lifted[: len(numbers)], lifted[len(numbers) :]
    elif change:
        scale_shrink = change.scale, change.decay_factor
    for rows in _row_chunks(region, low, fuse, change.weight if change else low):
        views, part = _views(region, state, rows), low if rows is None else low[rows]
        drawn: list[Any] = [next(seeds) for _ in region.moments]
        if fuse:
            drawn = [_noise(seed, part) if stored.codec == "bf16" else None for stored, seed in zip(region.moments, drawn, strict=True)]
        arguments = (part, is_finite, views, numbers, drawn, tables)
        if change:
            weight = change.weight.detach() if rows is None else rows_of(change.weight, rows)  # the compiler looks at a plain tensor
            rounding: Seed | None = next(seeds) if change.rounded else None
            if fuse:
                rounding = _noise(rounding, part)
                call(move_weight, region, *arguments, weight, *scale_shrink, rounding)
            else:
                move_weight(region, *arguments, weight, *scale_shrink, rounding)
            continue
        assert isinstance(result, Tensor)
        into = None if result is low else result if rows is None else result[rows]
        if fuse:
            call(move_into, region, *arguments, into)
        else:
            move_into(region, *arguments, into)


def move(
    region: FusedStep,
    low: Tensor,
    is_finite: Tensor | bool,
    views: Values,
    numbers: Numbers,
    seeds: Sequence[Seed | None],
    tables: Sequence[tuple[Tensor, ...] | None] | None,
) -> Tensor:
    """decode -> rule -> encode: the update of these rows, a new tensor in the arithmetic dtype."""
    if is_finite is False:
        return torch.zeros_like(low, dtype=region.compute_dtype)
    low = low.to(region.compute_dtype)
    tables = tables or [None] * len(region.moments)
    with only_if(is_finite, list(views.values())):
        values = {stored.name: stored.decode(views, table) for stored, table in zip(region.moments, tables, strict=True)}
        update = region.rule.update(-low if region.maximize else low, values, numbers)
        for stored, seed, table in zip(region.moments, seeds, tables, strict=True):
            stored.encode(views, values[stored.name], seed, table)
    return update if is_finite is True else torch.where(torch.as_tensor(is_finite), update, 0.0)


def move_into(region: FusedStep, *arguments: Any) -> None:
    """`move` into the tensor that follows its arguments, or into R itself where that is None: one tensor is handed in once."""
    into = arguments[0] if arguments[-1] is None else arguments[-1]
    into.copy_(move(region, *arguments[:-1]))


def move_weight(region: FusedStep, *arguments: Any) -> None:
    """`move`, and W <- decay_factor W - scale update. After the arguments of `move`: weight, scale, decay_factor and seed of `subtract`."""
    weight, scale, decay_factor, seed = arguments[-4:]
    write.subtract(weight, move(region, *arguments[:-4]), scale, decay_factor, seed)


@contextmanager
def only_if(condition: Tensor | bool, tensors: list[Tensor]) -> Iterator[None]:
    """Undo, on the device, what the block does to ``tensors`` unless the 0-d ``condition`` holds; free when it is True."""
    before = [] if condition is True else [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=False):
        tensor.copy_(torch.where(torch.as_tensor(condition), tensor, old))


def subtract(weight: Tensor, update: Tensor, scale: Any, decay_factor: Any, seed: Seed | None) -> None:
    """`write.subtract`, compiled."""
    real = torch.promote_types(weight.dtype, torch.float32)
    scale, decay_factor = _lift((scale, decay_factor), real)
    if isinstance(weight, Int8Weight):
        call(_move_int8, None, *weight.stored, update, scale, decay_factor, _noise(seed, update))
    else:
        call(_subtract, None, weight.detach(), update, scale, decay_factor, _noise(seed, update))


def _subtract(_: Any, *arguments: Any) -> None:
    write.subtract(*arguments)


def _move_int8(_: Any, *arguments: Any) -> None:
    move_int8(*arguments)


def _views(region: FusedStep, state: Values, rows: slice | None) -> Values:
    views: dict[str, Tensor] = {}
    for stored in region.moments:
        views |= {key: state[key] for key in stored.keys} if rows is None else stored.rows(state, rows)
    return views


def _row_chunks(region: FusedStep, low: Tensor, fuse: bool, weight: Tensor) -> Iterator[slice | None]:
    """Slices of the first axis, that fit the cache and cut no int8 block of a moment or the weight; None for everything at once.

    A compiled pass has no temporaries to keep in the cache, but for int8: the maximum of a block is known after a first pass.
    """
    limit = chunk_elements(low.device)
    whole = fuse and all(stored.codec != "int8" for stored in region.moments)
    if whole or not region.rule.elementwise or low.numel() <= limit:
        yield None
        return
    unit = math.lcm(row_unit(weight), *(stored.block for stored in region.moments if stored.codec == "int8" and stored.axis == 0))
    for units in parts(-(-low.shape[0] // unit), limit // (unit * low[0].numel())):
        yield slice(units.start * unit, min(units.stop * unit, low.shape[0]))


def _lift(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """0-d tensors; a compiled function takes floats for constants. What is a tensor already stays on its device."""
    if any(isinstance(value, Tensor) for value in values):
        return tuple(value.reshape(()).to(dtype) if isinstance(value, Tensor) else _scalars((value,), dtype)[0] for value in values)
    return _scalars(values, dtype)


def _noise(seed: Seed | None, like: Tensor) -> Seed | None:
    return noise(*matrix_shape(like.shape), seed, like.device) if isinstance(seed, int) else seed


@lru_cache(maxsize=64)
def _scalars(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Made once a step for all parameters of a group."""
    return torch.tensor(values, dtype=dtype, device="cpu").unbind()
