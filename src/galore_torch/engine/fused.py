"""The elementwise region of a step, decode -> rule -> encode -> weight: one function, run as it is or compiled to one pass.

The compiler of torch.compile, Inductor, fuses the region where that pays. What may change between steps is an argument of it,
never a constant, so that it is compiled once for each shape. Adafactor's means and the classes of GaLore(base) are not elementwise
and run as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.inductor import call, has_compiler, is_disabled, pays
from galore_torch.engine.sharding import local
from galore_torch.ops import write
from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.codecs import CODED, Seed, StoredTensor, matrix_shape, noise
from galore_torch.ops.write import WeightUpdate
from galore_torch.slots.rules import Group, Numbers, Rule

WORTHWHILE = 1 << 15  # elements from which a region is compiled unless the group says otherwise, once that `pays`
CODES = 4  # a pass over int8 moments takes so many times as long, where it is not compiled

Values = Mapping[str, Tensor]  # the storage tensors of moments, by state key


@dataclass(frozen=True)
class FusedStep:
    """What stays the same over all steps; equal regions share one compiled function."""

    rule: Rule
    moments: tuple[StoredTensor, ...]
    maximize: bool
    compute_dtype: torch.dtype

    @property
    def compiles(self) -> bool:
        """Whether Inductor's code is right: of a last int8 block that is shorter than a vector register it reads past the end."""
        return all(stored.codec != "int8" or stored.shape[stored.axis] % stored.block == 0 for stored in self.moments)


@dataclass(frozen=True)
class Inputs:
    """What one step of the rule works on: R in any float dtype, the storage tensors of its moments, its numbers and random streams.

    ``is_finite``: whether R is; when not, moments stay and the update is zero.
    """

    low: Tensor
    is_finite: Tensor | bool
    state: Values
    numbers: Numbers
    seeds: Iterator[int]


def fuses(weight: Tensor, elements: int, group: Group, step: int) -> bool:
    """Whether a region of so many elements is compiled: as the group wishes, or when ``step`` steps of all its parameters of this shape
    were worth it; never without a compiler, or for others' subclasses.
    """
    wish = group["compile"]
    if wish is False or (wish is None and (elements < WORTHWHILE or not _paid(weight, elements, group, step))):
        return False
    if weight.is_complex():  # the compiler has no complex arithmetic
        return False
    return (write.is_plain(weight) or write.is_coarse(weight)) and has_compiler(weight.device.type) and not is_disabled()


def _paid(weight: Tensor, elements: int, group: Group, step: int) -> bool:
    """Parameters of one shape share one compiled function, and are counted where their number decides."""
    device, params = weight.device.type, group.get("params", [weight])
    if group["state_codec"] in CODED:
        elements *= CODES
    if pays(device, elements, step) or not pays(device, elements, step * len(params)):
        return pays(device, elements, step)
    return pays(device, elements, step * sum(local(p).shape == weight.shape for p in params))


def step(region: FusedStep, inputs: Inputs, fuse: bool, result: Tensor | WeightUpdate) -> None:
    """One step of the rule on R and its moments, in place. The update goes into ``result``: a tensor, which may be R, or a weight."""
    low, is_finite, numbers, seeds = inputs.low, inputs.is_finite, inputs.numbers, inputs.seeds
    change = result if isinstance(result, WeightUpdate) else None
    factors: tuple[Any, ...] = (change.scale, change.decay_factor) if change else ()
    tables: tuple[Any, ...] | None = None
    if fuse := fuse and is_finite is not False and region.compiles:
        tables = tuple(stored.tables(low.device) for stored in region.moments)
        lifted = lift((*numbers, *factors), region.compute_dtype)
        numbers, factors = lifted[: len(numbers)], lifted[len(numbers) :]
    for rows in _row_chunks(region, low, fuse, change.weight if change else low):
        part = low if rows is None else low[rows]
        drawn: list[Any] = [next(seeds) for _ in region.moments]
        if fuse:
            drawn = [_noise(seed, part) if stored.codec == "bf16" else None for stored, seed in zip(region.moments, drawn, strict=True)]
        arguments = (part, is_finite, _views(region, inputs.state, rows), numbers, drawn, tables)
        if change:
            weight = change.weight.detach() if rows is None else write.rows_of(change.weight, rows)  # a compiler looks at a plain tensor
            rounding: Seed | None = None if change.seed is None else next(seeds)
            if fuse:
                call(move_weight, region, arguments, weight, (*factors, _noise(rounding, part)))
            else:
                move_weight(region, arguments, weight, (*factors, rounding))
            continue
        assert isinstance(result, Tensor)
        into = None if result is low else result if rows is None else result[rows]
        if fuse:
            call(move_into, region, arguments, into)
        else:
            move_into(region, arguments, into)


def move(region: FusedStep, arguments: Any) -> Tensor:
    """decode -> rule -> encode: the update of some rows, a new tensor in the arithmetic dtype.

    ``arguments``: R, whether it is finite, the storage tensors of its moments, the rule's numbers, a seed for each moment, and the
    codecs' tables.
    """
    low, is_finite, views, numbers, seeds, tables = arguments
    if is_finite is False:
        return torch.zeros_like(low, dtype=region.compute_dtype)
    low = low.to(region.compute_dtype)
    tables = tables or [None] * len(region.moments)
    with only_if(is_finite, list(views.values())):
        values = {stored.name: stored.decode(views, table) for stored, table in zip(region.moments, tables, strict=True)}
        update = region.rule.update(-low if region.maximize else low, values, numbers)
        for stored, seed, table in zip(region.moments, seeds, tables, strict=True):
            stored.encode(views, values[stored.name], seed, table)
    return update if is_finite is True else torch.where(torch.as_tensor(is_finite, device=update.device), update, 0.0)


def move_into(region: FusedStep, arguments: Any, into: Tensor | None) -> None:
    """`move` into a tensor, or into R itself where that is None: one tensor is handed in once."""
    (arguments[0] if into is None else into).copy_(move(region, arguments))


def move_weight(region: FusedStep, arguments: Any, weight: Tensor, factors: Any) -> None:
    """`move`, and W <- decay_factor W - scale update. ``factors``: scale, decay_factor and seed of `write.subtract`."""
    write.subtract(weight, move(region, arguments), *factors)


@contextmanager
def only_if(condition: Tensor | bool, tensors: list[Tensor]) -> Iterator[None]:
    """Undo, on the device, what the block does to ``tensors`` unless the 0-d ``condition`` holds; free when it is True.

    A condition for each index of their first axis undoes it there.
    """
    before = [] if condition is True else [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=False):
        holds = torch.as_tensor(condition, device=tensor.device)
        if len(holds.shape):
            holds = holds.view(-1, *[1] * (tensor.dim() - 1))
        tensor.copy_(torch.where(holds, tensor, old))


def subtract(weight: Tensor, update: Tensor, scale: Any, decay_factor: Any, seed: Seed | None) -> None:
    """`write.subtract`, compiled."""
    factors = (*lift((scale, decay_factor), torch.promote_types(weight.dtype, torch.float32)), _noise(seed, update))
    call(_subtract_stored, None, write.storages(weight), update, factors)


def _subtract_stored(_: Any, stored: Any, update: Tensor, factors: Any) -> None:
    write.subtract_stored(stored, update, *factors)


def _views(region: FusedStep, state: Values, rows: slice | None) -> Values:
    views: dict[str, Tensor] = {}
    for stored in region.moments:
        views |= {key: state[key] for key in stored.keys} if rows is None else stored.rows(state, rows)
    return views


def _row_chunks(region: FusedStep, low: Tensor, fuse: bool, weight: Tensor) -> Iterator[slice | None]:
    """Slices of the first axis, that fit the cache and cut no block of codes of a moment or the weight; None for everything at once.

    A compiled pass has no temporaries to keep in the cache, but for codes: the maximum of a block is known after a first pass.
    """
    limit = chunk_elements(low.device)
    whole = fuse and all(stored.codec not in CODED for stored in region.moments)
    whole = whole or not all(stored.has_rows for stored in region.moments)
    if whole or not region.rule.elementwise or low.numel() <= limit:
        yield None
        return
    unit = math.lcm(write.row_unit(weight), *(stored.block for stored in region.moments if stored.codec in CODED and stored.axis == 0))
    for units in parts(-(-low.shape[0] // unit), limit // (unit * low[0].numel())):
        yield slice(units.start * unit, min(units.stop * unit, low.shape[0]))


def lift(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
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
