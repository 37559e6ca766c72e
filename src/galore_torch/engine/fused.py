"""Doing: the elementwise region of a step, decode -> rule -> encode -> weight. One function, run as it is or compiled to one pass.

The compiler of torch.compile, Inductor, fuses the region where that pays. What may change between steps is an argument of it,
never a constant, so that it is compiled once for each shape. Adafactor's means and the classes of GaLore(base) are not elementwise
and run as they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops.codecs import Seed, Stored, matrix_shape, noise
from galore_torch.ops.int8_weight import Int8Weight, row_unit, rows_of
from galore_torch.ops.int8_weight import move as move_int8
from galore_torch.ops.linalg import chunk_elements, parts
from galore_torch.slots import recovery
from galore_torch.slots.rules import Numbers, Rule

# Elements from which a region is compiled unless the group says otherwise. On one core of a 2.8 GHz Xeon an Adam pass takes 10 us and
# 1.1 ns an element compiled, 20 us and 3 ns an element as it is: it pays early, but every shape takes seconds to compile.
WORTHWHILE = 1 << 15

Values = Mapping[str, Tensor]  # the storage tensors of moments, by state key


@dataclass(frozen=True)
class Region:
    """What stays the same over all steps; equal regions share one compiled function."""

    rule: Rule
    moments: tuple[Stored, ...]
    maximize: bool
    real: torch.dtype


@dataclass
class Change:
    """The move of a weight: W <- shrink W - scale update, ``rounded`` to bf16 or INT8 stochastically, or to nearest."""

    weight: Tensor
    scale: Any
    shrink: Any
    rounded: bool


def fuses(weight: Tensor, elements: int, wish: bool | None) -> bool:
    """Whether a region of so many elements is compiled: ``wish``, or by its size; never without a compiler, or for others' subclasses."""
    if wish is False or (wish is None and elements < WORTHWHILE):
        return False
    return type(weight) in (Tensor, torch.nn.Parameter, Int8Weight) and has_compiler(weight.device.type)


@lru_cache(maxsize=8)
def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs to write code for this kind of device: a C++ compiler, or Triton."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about parts of it that the import touches
        try:
            torch.compile(lambda: None)  # complains of a Python that it does not know
            if device == "cpu":
                from torch._inductor.cpp_builder import get_cpp_compiler

                return bool(get_cpp_compiler())
            from torch.utils._triton import has_triton

            return device == "cuda" and has_triton()
        except Exception:  # whatever it is, there is nothing to compile with
            return False


def step(
    region: Region,
    low: Tensor,
    good: Tensor | bool,
    state: Values,
    numbers: Numbers,
    seeds: Iterator[int],
    fuse: bool,
    result: Tensor | Change,
) -> None:
    """One step of the rule on R and its moments, in place. The update goes into ``result``: a tensor, which may be R, or a weight.

    low: R, any float dtype. ``good``: whether it is finite; when not, moments stay and the update is zero.
    """
    change = result if isinstance(result, Change) else None
    tables: tuple[Any, ...] | None = None
    scale_shrink: tuple[Any, ...] = ()
    if fuse := fuse and good is not False:
        tables = tuple(stored.tables(low.device) for stored in region.moments)
        lifted = _lift((*numbers, change.scale, change.shrink) if change else numbers, region.real)
        numbers, scale_shrink = lifted[: len(numbers)], lifted[len(numbers) :]
    elif change:
        scale_shrink = change.scale, change.shrink
    for rows in _row_chunks(region, low, fuse, change.weight if change else low):
        views, part = _views(region, state, rows), low if rows is None else low[rows]
        drawn: list[Any] = [next(seeds) for _ in region.moments]
        if fuse:
            drawn = [_noise(seed, part) if stored.codec == "bf16" else None for stored, seed in zip(region.moments, drawn, strict=True)]
        arguments = (part, good, views, numbers, drawn, tables)
        if change:
            weight = change.weight.detach() if rows is None else rows_of(change.weight, rows)  # the compiler looks at a plain tensor
            rounding: Seed | None = next(seeds) if change.rounded else None
            if fuse:
                rounding = _noise(rounding, part)
                _call(move_weight, region, *arguments, weight, *scale_shrink, rounding)
            else:
                move_weight(region, *arguments, weight, *scale_shrink, rounding)
            continue
        assert isinstance(result, Tensor)
        into = None if result is low else result if rows is None else result[rows]
        if fuse:
            _call(move_into, region, *arguments, into)
        else:
            move_into(region, *arguments, into)


def move(
    region: Region,
    low: Tensor,
    good: Tensor | bool,
    views: Values,
    numbers: Numbers,
    seeds: Sequence[Seed | None],
    tables: Sequence[tuple[Tensor, ...] | None] | None,
) -> Tensor:
    """decode -> rule -> encode: the update of these rows, a new tensor in the arithmetic dtype."""
    if good is False:
        return torch.zeros_like(low, dtype=region.real)
    low = low.to(region.real)
    tables = tables or [None] * len(region.moments)
    with only_if(good, list(views.values())):
        values = {stored.name: stored.decode(views, table) for stored, table in zip(region.moments, tables, strict=True)}
        update = region.rule.update(-low if region.maximize else low, values, numbers)
        for stored, seed, table in zip(region.moments, seeds, tables, strict=True):
            stored.encode(views, values[stored.name], seed, table)
    return update if good is True else torch.where(torch.as_tensor(good), update, 0.0)


def move_into(region: Region, *arguments: Any) -> None:
    """`move` into the tensor that follows its arguments, or into R itself where that is None: one tensor is handed in once."""
    into = arguments[0] if arguments[-1] is None else arguments[-1]
    into.copy_(move(region, *arguments[:-1]))


def move_weight(region: Region, *arguments: Any) -> None:
    """`move`, and W <- shrink W - scale update. Arguments: those of `move`, then weight, scale, shrink and seed of `subtract`."""
    weight, scale, shrink, seed = arguments[-4:]
    recovery.subtract(weight, move(region, *arguments[:-4]), scale, shrink, seed)


@contextmanager
def only_if(condition: Tensor | bool, tensors: list[Tensor]) -> Iterator[None]:
    """Undo, on the device, what the block does to ``tensors`` unless the 0-d ``condition`` holds; free when it is True."""
    before = [] if condition is True else [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=False):
        tensor.copy_(torch.where(torch.as_tensor(condition), tensor, old))


def subtract(weight: Tensor, update: Tensor, scale: Any, shrink: Any, seed: Seed | None) -> None:
    """`recovery.subtract`, compiled."""
    real = torch.promote_types(weight.dtype, torch.float32)
    scale, shrink = _lift((scale, shrink), real)
    if isinstance(weight, Int8Weight):
        _call(_move_int8, None, *weight.stored, update, scale, shrink, _noise(seed, update))
    else:
        _call(_subtract, None, weight.detach(), update, scale, shrink, _noise(seed, update))


def _subtract(_: Any, *arguments: Any) -> None:
    recovery.subtract(*arguments)


def _move_int8(_: Any, *arguments: Any) -> None:
    move_int8(*arguments)


def _views(region: Region, state: Values, rows: slice | None) -> Values:
    views: dict[str, Tensor] = {}
    for stored in region.moments:
        views |= {key: state[key] for key in stored.keys} if rows is None else stored.rows(state, rows)
    return views


def _row_chunks(region: Region, low: Tensor, fuse: bool, weight: Tensor) -> Iterator[slice | None]:
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


# --- compiling ------------------------------------------------------------------------------------------------------------

Program = Callable[..., Any]
programs: dict[Any, Program | None] = {}  # None: what the compiler could not do, and runs as it is


def _call(function: Callable[..., Any], region: Any, *arguments: Any) -> Any:
    """``function(region, *arguments)``, compiled once for each region and each size, stride and dtype of the arguments.

    Inductor is called without Dynamo in front of it: the key says all that a guard would ask, in a fifth of the time. A failing
    compiler is no error: it fails before it has run anything, and the function runs as it is from then on.
    """
    tensors: list[Any] = []
    _flatten(arguments, tensors)
    key = (function, region, *[(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors])
    try:
        program = programs[key]
    except KeyError:
        program = programs[key] = _compiled(function, region, arguments, tensors)
    return function(region, *arguments) if program is None else program(*tensors)


def _compiled(function: Callable[..., Any], region: Any, arguments: Any, tensors: list[Any]) -> Program | None:
    from torch._inductor import compile as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*values: Tensor) -> Any:
        return function(region, *_filled(arguments, iter(values)))

    try:
        graph = make_fx(flat, tracing_mode="fake")(*tensors)  # fake tensors: nothing is computed
        program: Program = inductor(graph, tensors)
    except Exception:  # whatever a compiler may complain of
        return None
    return program


def _flatten(value: Any, tensors: list[Any]) -> None:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, tuple | list):
        for item in value:
            _flatten(item, tensors)
    elif isinstance(value, dict):
        _flatten(tuple(value.values()), tensors)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nest with other tensors in their places."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        return [_filled(item, tensors) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return value


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
