"""From (shape, dtype, group) to a view, ranks and sizes. The ONE source of every state size.

Recomputed wherever it is needed and never remembered, so a loaded optimizer, a fresh one and a planner agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops.codecs import StoredTensor, TensorSpec
from galore_torch.slots.carry import CARRIES
from galore_torch.slots.projectors import PROJECTORS, Projector, Stored
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import Moment, Rule
from galore_torch.slots.torch_rule import BaseRule

AnyRule = Rule | BaseRule
State = dict[str, Any]
Group = Mapping[str, Any]
KERNEL = 16  # a 3-D weight with a last or middle axis below this is a convolution's kernel, and not a batch of matrices


@dataclass(frozen=True)
class Layout:
    """How one parameter is seen by the engine.

    ``view``: (rows, columns), or (matrices, rows, columns) for a batch such as the weights of experts; the shape itself at full rank, and
    for a projector that takes tensors with all of their axes.
    ``ranks``: projected axis of the view, counted from its end: -2 = rows and -1 = columns -> rank; empty at full rank.
    ``scaled``: whether the group's scale applies; it does to a matrix whose rank turned out not to be smaller.
    ``projector``, ``basis_codec``: as they are resolved for this parameter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[int, ...]
    ranks: Mapping[int, int] = field(hash=False)
    scaled: bool
    projector: str
    basis_codec: str

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the parameter's arithmetic: fp32 or fp64, or complex with such parts."""
        return torch.promote_types(self.dtype, torch.float32)

    @cached_property
    def is_tensor(self) -> bool:
        """Whether it is projected as a tensor with all of its axes, and not as matrices."""
        return bool(self.ranks) and PROJECTORS[self.projector].modes is not None

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """(matrices,) of a projected batch, else ()."""
        return self.view[:-2] if self.ranks and not self.is_tensor else ()

    @cached_property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the gradient that the rule sees."""
        first = len(self.view)
        return tuple(self.ranks.get(axis - first, size) for axis, size in enumerate(self.view))

    @cached_property
    def bases(self) -> dict[int, Stored]:
        """axis -> how its basis is stored."""
        if not self.ranks:
            return {}
        return PROJECTORS[self.projector].state_spec(self.view, self.ranks, self.basis_codec, self.compute_dtype)

    @cached_property
    def long_axis(self) -> int:
        """The axis of R, from 0, that int8 blocks run along: inside one singular direction, so the one that is not projected.

        Where neither or both are, the last, or the longest when the last is too short for blocks (a convolution's kernel); in a tensor too.
        """
        axes = len(self.low_shape)
        if len(self.ranks) == 1 and not self.is_tensor:
            return axes - 2 if -1 in self.ranks else axes - 1
        last = max(0, axes - 1)
        if not axes or self.low_shape[last] >= 64:
            return last
        first = len(self.batch)
        return first + self.low_shape[first:].index(max(self.low_shape[first:]))

    @cached_property
    def one(self) -> Layout:
        """Of one matrix of the batch."""
        return replace(self, shape=self.view[-2:], view=self.view[-2:]) if self.batch else self


@dataclass(frozen=True)
class ParamView:
    """One parameter in one step: what all of the engine hands on, and derives from nothing again."""

    weight: Tensor
    state: State
    group: Group
    rule: AnyRule
    layout: Layout

    @property
    def projector(self) -> Projector:
        return PROJECTORS[self.group["projector"]]


def view_of(weight: Tensor, state: State, group: Group, rule: AnyRule) -> ParamView:
    """The view of a parameter; ``weight`` has its local shape. Its group names the projector that serves this parameter."""
    layout = layout_of(weight, group)
    if layout.projector != group["projector"]:
        group = {**group, "projector": layout.projector}
    return ParamView(weight, state, group, rule, layout)


def layout_of(weight: Tensor, group: Group) -> Layout:
    return make_layout(tuple(weight.shape), weight.dtype, group)


def make_layout(shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> Layout:
    """The layout of a parameter of a (local) shape in a group."""
    rank = tuple(group["rank"]) if isinstance(group["rank"], list) else group["rank"]
    keys = rank, group["proj_type"], group["projector"], group["basis_codec"]
    return _make_layout(shape, dtype, keys, group["batch_dims"], group["tensor"])


@lru_cache(maxsize=4096)
def _make_layout(shape: tuple[int, ...], dtype: torch.dtype, keys: tuple[Any, ...], batch_dims: int | None, tensor: bool | str) -> Layout:
    rank, proj_type, projector, codec = keys
    if codec == "weight":
        codec = "bf16" if dtype.itemsize == 2 else "fp32"
    view = matrices(shape, batch_dims)
    scaled = rank is not None and len(shape) > 1
    if tensor and (tensor != "auto" or dtype.is_complex or (len(shape) > 2 and len(view) == 2)):
        projector = "tucker"
    row = PROJECTORS[projector]
    if row.modes is not None:
        return Layout(shape, dtype, shape, row.modes(shape, rank) if scaled else {}, scaled, projector, codec)
    if scaled and (isinstance(rank, tuple) or dtype.is_complex):
        raise ValueError(
            f"rank={rank!r} of a parameter of shape {shape} and {dtype}: complex weights, and a rank for each dimension, are projected as "
            "tensors. Give their group tensor=True, or tensor='auto', which leaves real matrices to a single rank; without a rank complex "
            "weights train at full rank"
        )
    resolved = fits(view, rank, row.axes)
    axes = () if resolved is None else projected_axes(view, proj_type) if row.axes is None else row.axes
    found = {axis: row.fit(view[axis], resolved) for axis in axes if resolved is not None}
    ranks = {axis: rank for axis, rank in found.items() if rank is not None}
    if not ranks or len(ranks) < len(found):
        return Layout(shape, dtype, shape, {}, scaled, projector, codec)
    return Layout(shape, dtype, view, ranks, scaled, projector, codec)


def matrices(shape: tuple[int, ...], batch_dims: int | None = None) -> tuple[int, ...]:
    """A tensor seen as matrices: (rows, columns), or (matrices, rows, columns). Vectors stay as they are.

    ``batch_dims`` leading dimensions count matrices, of which the next is the rows and the product of the rest the columns; a tensor that
    has fewer than two more is one matrix. None: one for a 3-D weight whose other two are at least `KERNEL`, as experts have, else none.
    """
    if len(shape) < 2:
        return shape
    if batch_dims is None:
        batch_dims = int(len(shape) == 3 and min(shape[1:]) >= KERNEL)
    if not batch_dims or len(shape) < batch_dims + 2:
        return shape[0], prod(shape[1:])
    return prod(shape[:batch_dims]), shape[batch_dims], prod(shape[batch_dims + 1 :])


def fits(view: tuple[int, ...], rank: int | float | None, axes: tuple[int, ...] | None = None) -> int | None:
    """The rank in use: None when the group has none, for vectors, and where it is not smaller than the matrix.

    A fraction is one of the short side, or of the axes that a projector always takes.
    """
    if rank is None or len(view) < 2:
        return None
    short = min(view[axis] for axis in axes or (-2, -1))
    rank = max(1, int(rank * short)) if isinstance(rank, float) else rank
    return rank if rank < short else None


def projected_axes(view: tuple[int, ...], proj_type: str) -> tuple[int, ...]:
    """The projected axes by the published table: std projects the short side, reverse_std the long one; a square counts as tall."""
    tall = view[-2] >= view[-1]
    short, long = ((-1,), (-2,)) if tall else ((-2,), (-1,))
    return {"std": short, "reverse_std": long, "left": (-2,), "right": (-1,), "full": (-2, -1)}[proj_type]


def stored_moments(layout: Layout, group: Group, rule: Rule) -> tuple[tuple[StoredTensor, Moment], ...]:
    """How each moment of the rule is stored.

    Under ``min_8bit_size`` elements (of one matrix of a batch) int8 gives way to fp32: the bytes are few and the blocks too short.
    """
    moments = tuple(rule.moments(layout.low_shape, group).items())
    return _stored_moments(layout, moments, group["state_codec"], group["min_8bit_size"])


@lru_cache(maxsize=4096)
def _stored_moments(
    layout: Layout, moments: tuple[tuple[str, Moment], ...], state_codec: str, min_8bit_size: int
) -> tuple[tuple[StoredTensor, Moment], ...]:
    out = []
    for name, moment in moments:
        shape = moment.shape(layout.low_shape)
        small = not shape or prod(shape[len(layout.batch) :]) < min_8bit_size
        codec = "fp32" if small and state_codec == "int8" else state_codec
        axis = layout.long_axis if len(shape) == len(layout.low_shape) else len(shape) - 1
        dtype = layout.compute_dtype
        if moment.kind == "second" and dtype.is_complex:  # |R|^2
            dtype = dtype.to_real()
        out.append((StoredTensor(name, shape, codec, axis, moment.kind != "second", dtype, moment.fill), moment))
    return tuple(out)


def carried_moments(view: ParamView) -> dict[str, tuple[StoredTensor, Moment]]:
    """The moments that a transport takes across a change of basis, by name: how each is stored, and its kind."""
    layout, rule = view.layout, view.rule
    if isinstance(rule, Rule):
        pairs = stored_moments(layout, view.group, rule)
        return {stored.name: (stored, moment) for stored, moment in pairs if moment.kind != "other"}
    moments = rule.moments(layout.one.low_shape, view.group).items()
    held = {name: StoredTensor(name, layout.low_shape, compute_dtype=layout.compute_dtype) for name, _ in moments}
    return {name: (held[name], moment) for name, moment in moments if moment.kind != "other"}


def stored_error(layout: Layout, group: Group) -> StoredTensor | None:
    """How the carry of a projected parameter is stored; None where there is none."""
    carry = CARRIES[group["carry"]]
    return carry.state_spec(layout.view, layout.dtype, layout.compute_dtype) if carry and layout.ranks else None


def state_spec(layout: Layout, group: Group, rule: AnyRule) -> dict[str, TensorSpec]:
    """Every state tensor of one parameter: key -> shape, dtype, first value. Two Python numbers, step and index, stand beside them."""
    keys = group["gap_range"] and group["update_proj_gap"], group["recovery"], group["carry"]
    if isinstance(rule, BaseRule):
        inside = layout.dtype if not layout.ranks else layout.compute_dtype
        inner = rule.spec(layout.one.low_shape, inside, group)
        return _slots_spec(layout, *keys) | {key: replace(spec, shape=(*layout.batch, *spec.shape)) for key, spec in inner.items()}
    return _state_spec(layout, keys, stored_moments(layout, group, rule))


@lru_cache(maxsize=4096)
def _state_spec(layout: Layout, keys: tuple[Any, ...], moments: tuple[tuple[StoredTensor, Moment], ...]) -> dict[str, TensorSpec]:
    spec = _slots_spec(layout, *keys)
    for stored, _ in moments:
        spec |= stored.spec()
    return spec


def _slots_spec(layout: Layout, first_gap: int | None, recovery: str, carry: str | None) -> dict[str, TensorSpec]:
    """The state of every slot but the rule's. ``first_gap``: steps to the first refreshes where the gap adapts, else None."""
    if not layout.ranks:
        return {}
    ready = TensorSpec(layout.batch, torch.bool, host=True)
    spec = {} if PROJECTORS[layout.projector].find is None else {"basis_ready": ready}
    if first_gap:
        spec |= {"gap": TensorSpec((), torch.int64, first_gap, host=True), "gap_start": TensorSpec((), torch.int64, host=True)}
    for stored in layout.bases.values():
        spec |= stored.spec()
    spec |= RECOVERIES[recovery].state_spec(layout.batch, layout.compute_dtype)
    if error := stored_error(layout, {"carry": carry}):
        spec |= error.spec()
    return spec
