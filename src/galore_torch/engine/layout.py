"""From (local shape, placement, dtype, group) to a view, ranks and sizes; `engine.stored` says what state that makes.

Recomputed wherever it is needed and never remembered, so a loaded optimizer, a fresh one and a planner agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_torch.choices import FULL
from galore_torch.engine.sharding import Place, Placed, local, place_of
from galore_torch.ops.sharded import Part
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import Rule
from galore_torch.slots.sparse_tucker import SET, count
from galore_torch.slots.subspace import Bases, Projector, Stored
from galore_torch.slots.torch_rule import BaseRule

AnyRule = Rule | BaseRule
State = dict[str, Any]
Group = Mapping[str, Any]
KERNEL = 16  # a 3-D weight with a last or middle axis below this is a convolution's kernel, and not a batch of matrices


class Cut(NamedTuple):
    """``axis`` of the view, from 0, and dimension ``dim`` of the parameter, which ``ways`` processes share."""

    axis: int
    ways: int
    dim: int


@dataclass(frozen=True)
class Layout:
    """How one parameter is seen by the engine.

    ``view``: (rows, columns), or (matrices, rows, columns) for a batch such as the weights of experts; the shape itself at full rank, and
    for a projector that takes tensors with all of their axes. A recovery of whole matrices sees one that its rank does not shorten with
    the projector "identity" and the length of an axis for its rank.
    ``ranks``: projected axis of the view, counted from its end: -2 = rows and -1 = columns -> rank; empty at full rank. 0 -> how many
    single elements stand beside the core, for a projector that keeps some.
    ``scaled``: whether the group's scale applies; it does to a matrix whose rank turned out not to be smaller.
    ``projector``, ``basis_codec``: as they are resolved for this parameter. ``whole``: the view of the whole parameter, of which ``view``
    is this process' part; ``cuts``: the axes where they may differ. What is chosen by size is chosen by the whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[int, ...]
    ranks: Mapping[int, int] = field(hash=False)
    scaled: bool
    projector: str
    basis_codec: str
    whole: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

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
        return self._low(self.view)

    @cached_property
    def whole_low_shape(self) -> tuple[int, ...]:
        """The same of the whole parameter."""
        return self._low(self.whole)

    @cached_property
    def core_shape(self) -> tuple[int, ...]:
        """Shape of the part of it that is no single elements."""
        return self._core(self.view)

    def _low(self, view: tuple[int, ...]) -> tuple[int, ...]:
        core = self._core(view)
        return (prod(core) + self.ranks[SET],) if SET in self.ranks else core

    def _core(self, view: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.ranks.get(axis - len(view), size) for axis, size in enumerate(view))

    @cached_property
    def bases(self) -> dict[int, Stored]:
        """axis -> how its basis is stored: whole on every process, also where the axis is cut."""
        if not self.ranks:
            return {}
        view = self.view if self.is_tensor else (*self.batch, *self.whole[-2:])
        return PROJECTORS[self.projector].state_spec(view, self.ranks, self.basis_codec, self.compute_dtype)

    @cached_property
    def long_axis(self) -> int:
        """The axis of R, from 0, that int8 blocks run along: inside one singular direction, so the one that is not projected.

        Where neither or both are, the last, or the longest when the last is too short for blocks (a convolution's kernel); in a tensor too.
        """
        low = self.whole_low_shape
        axes = len(low)
        if len(self.ranks) == 1 and not self.is_tensor:
            return axes - 2 if -1 in self.ranks else axes - 1
        last = max(0, axes - 1)
        if not axes or low[last] >= 64:
            return last
        first = len(self.batch)
        return first + low[first:].index(max(low[first:]))

    def cut(self, axis: int) -> Cut | None:
        """Of an axis of the view, from 0 or from the end; None where each process has it whole."""
        return next((cut for cut in self.cuts if cut.axis == axis % len(self.view)), None)

    @cached_property
    def entire(self) -> Layout:
        """Of the whole parameter; it is stored as its parts are."""
        return replace(self, shape=self.whole, view=self.whole) if self.cuts else self

    @cached_property
    def one(self) -> Layout:
        """Of one matrix of the batch."""
        if not self.batch:
            return self
        cuts = tuple(cut._replace(axis=cut.axis - 1) for cut in self.cuts if cut.axis)
        return replace(self, shape=self.view[-2:], view=self.view[-2:], whole=self.whole[-2:], cuts=cuts)


@dataclass(frozen=True)
class ParamView:
    """One parameter in one step: what all of the engine hands on, and derives from nothing again.

    ``weight`` and ``state`` are what this process holds: plain tensors. ``place``: the processes that hold the rest, or None.
    """

    weight: Tensor
    state: State
    group: Group
    rule: AnyRule
    layout: Layout
    place: Place | None = None

    @property
    def projector(self) -> Projector:
        return PROJECTORS[self.group["projector"]]

    def part(self, axis: int) -> Part | None:
        """This process' part of an axis of the view, -2 = rows and -1 = columns; None where it is whole."""
        cut = self.layout.cut(axis)
        return self.place.part(cut.dim) if self.place and cut else None

    @property
    def parts(self) -> list[Part]:
        """Of the axes of one matrix that are cut; of all dimensions at full rank."""
        cuts = [cut for cut in self.layout.cuts if cut.axis >= len(self.layout.batch)]
        return [self.place.part(cut.dim) for cut in cuts] if self.place else []  # type: ignore[misc]


def view_of(p: Tensor, state: State, group: Group, rule: AnyRule) -> ParamView:
    """The view of a parameter, which may be a DTensor. Its group names the projector that serves this parameter."""
    weight, place = local(p), place_of(p)
    layout = _layout_at(weight, group, place)
    if layout.projector != group["projector"]:
        group = {**group, "projector": layout.projector}
    return ParamView(weight, state, group, rule_of(layout, rule), layout, place)


def rule_of(layout: Layout, rule: AnyRule) -> AnyRule:
    """The rule of one parameter of an optimizer whose rule is ``rule``: one for matrices has another for the rest."""
    return rule.rest if isinstance(rule, Rule) and rule.rest and not layout.ranks else rule


def bases_of(view: ParamView) -> Bases:
    """The bases as they are for products with the part of the matrix that is here."""
    bases = {axis: stored.read(view.state) for axis, stored in view.layout.bases.items()}
    parts = {axis: view.part(axis) for axis in bases} if view.place else {}
    return bases | {axis: part.of(bases[axis], -2) for axis, part in parts.items() if part}


def layout_of(p: Tensor, group: Group) -> Layout:
    return _layout_at(local(p), group, place_of(p))


def _layout_at(weight: Tensor, group: Group, place: Place | None) -> Layout:
    return make_layout(tuple(weight.shape), weight.dtype, group, place.placed if place else None)


def make_layout(shape: tuple[int, ...], dtype: torch.dtype, group: Group, placed: Placed | None = None) -> Layout:
    """The layout of a parameter of a (local) shape in a group; ``placed``: where the shape is a shard of a whole.

    Raises ValueError where the group asks for a basis on an axis that is cut, and there is one that is not.
    """
    rank = tuple(group["rank"]) if isinstance(group["rank"], list) else group["rank"]
    keys = rank, group["proj_type"], group["projector"], group["basis_codec"]
    seen_as = group["batch_dims"], group["tensor"], group["sparse"], RECOVERIES[group["recovery"]].whole
    return _make_layout(shape, dtype, keys, seen_as, placed)


@lru_cache(maxsize=4096)
def _make_layout(
    shape: tuple[int, ...], dtype: torch.dtype, keys: tuple[Any, ...], seen_as: tuple[Any, ...], placed: Placed | None
) -> Layout:
    rank, proj_type, projector, codec = keys
    batch_dims, tensor, sparse, unshortened = seen_as
    if codec == "weight":
        codec = "bf16" if dtype.itemsize == 2 else "fp32"
    full = placed.shape if placed else shape
    own = tuple(Cut(dim, ways, dim) for dim, ways in placed.cuts) if placed else ()
    leading = _leading(full, batch_dims)
    whole = _as_matrices(full, leading)
    scaled = rank is not None and len(shape) > 1
    if tensor and (tensor != "auto" or dtype.is_complex or (len(shape) > 2 and len(whole) == 2)):
        projector = "tucker"
    if projector == "tucker" and sparse is not None:
        projector = "tucker_sparse"
    row = PROJECTORS[projector]
    if row.modes is not None:
        modes = row.modes(full, rank) if scaled else {}
        if modes and row.elements:
            modes = {**modes, SET: count(full, sparse)}
        if modes and own:
            raise ValueError(
                f"a parameter of shape {full} is cut between processes, and is to be projected as a tensor, along every dimension: every "
                "step would gather it. Leave tensor=False, which projects it as matrices, or train it in a group without a rank"
            )
        return Layout(shape, dtype, shape, modes, scaled, projector, codec, full, own)
    if scaled and (isinstance(rank, tuple) or dtype.is_complex):
        auto = "" if tensor else ", or tensor='auto', which leaves real matrices to a single rank"
        raise ValueError(
            f"rank={rank!r} of a parameter of shape {full} and {dtype}: complex weights, and a rank for each dimension, are projected as "
            f"tensors. Give their group tensor=True{auto}; without a rank complex weights train at full rank"
        )
    resolved = fits(whole, rank, row.axes)
    if resolved is None and scaled and unshortened:
        resolved, projector, row = max(whole), "identity", PROJECTORS["identity"]
    cuts = () if placed is None or resolved is None else _cut_axes(placed, leading)
    axes = () if resolved is None else _free_axes(whole, proj_type, projector, cuts)
    found = {axis: row.fit(whole[axis], resolved) for axis in axes if resolved is not None}
    ranks = {axis: rank for axis, rank in found.items() if rank is not None}
    if not ranks or len(ranks) < len(found):
        return Layout(shape, dtype, shape, {}, scaled, projector, codec, full, own)
    return Layout(shape, dtype, _as_matrices(shape, leading), ranks, scaled, projector, codec, whole, cuts)


def matrices(shape: tuple[int, ...], batch_dims: int | None = None) -> tuple[int, ...]:
    """A tensor seen as matrices: (rows, columns), or (matrices, rows, columns). Vectors stay as they are.

    ``batch_dims`` leading dimensions count matrices, of which the next is the rows and the product of the rest the columns; a tensor that
    has fewer than two more is one matrix. None: one for a 3-D weight whose other two are at least `KERNEL`, as experts have, else none.
    """
    return _as_matrices(shape, _leading(shape, batch_dims))


def _leading(shape: tuple[int, ...], batch_dims: int | None) -> int:
    """How many leading dimensions count matrices."""
    if batch_dims is None:
        batch_dims = int(len(shape) == 3 and min(shape[1:]) >= KERNEL)
    return batch_dims if len(shape) >= batch_dims + 2 else 0


def _as_matrices(shape: tuple[int, ...], leading: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return shape
    if not leading:
        return shape[0], prod(shape[1:])
    return prod(shape[:leading]), shape[leading], prod(shape[leading + 1 :])


def _cut_axes(placed: Placed, leading: int) -> tuple[Cut, ...]:
    """The cuts through a view as matrices, of which ``leading`` dimensions count them."""
    cuts = []
    for dim, ways in placed.cuts:
        if (dim < leading and leading > 1) or (dim > leading and len(placed.shape) > leading + 2):
            raise ValueError(
                f"a parameter of shape {placed.shape} is cut along its dimension {dim}, which is one of several that its view as matrices "
                f"joins: shard it along dimension {leading}, or train it at full rank, in a group without a rank"
            )
        rows = 1 if leading else 0
        cuts.append(Cut(0 if dim < leading else rows if dim == leading else rows + 1, ways, dim))
    return tuple(cuts)


def _free_axes(whole: tuple[int, ...], proj_type: str, projector: str, cuts: tuple[Cut, ...]) -> tuple[int, ...]:
    """The projected axes. Those that no process shares, for then only a refresh communicates: "std" follows, others are refused.

    Where both are shared, as under tensor parallelism with FSDP2, the published table says which, and each step adds up R.
    """
    row = PROJECTORS[projector]
    wished = row.axes or projected_axes(whole, proj_type)
    shared = {cut.axis - len(whole): cut for cut in cuts}
    taken = [axis for axis in (-2, -1) if axis in shared]
    free = [axis for axis in (-2, -1) if axis not in shared]
    if not taken or wished == tuple(free):
        return wished
    follows = row.axes is None and (proj_type == "std" or projector == "identity")
    if free and follows:
        return tuple(free)
    if not free and len(wished) == 1 and row.axes is None and row.find is not None:
        return wished
    if projector == "identity":
        raise ValueError(
            f"the rows and the columns of a parameter of shape {whole} are both shared among processes, and it is to be seen whole, with "
            f"rank={FULL!r} or one that does not shorten it: give it a rank below {min(whole[-2:])}"
        )
    name = {-2: "rows", -1: "columns"}
    what = f"projector={projector!r}" if row.axes or (follows and not free) else f"proj_type={proj_type!r}"
    cure = "a projector such as 'power'" + (f" and proj_type='std', which takes the {name[free[0]]} here" if free else " and one side")
    raise ValueError(
        f"{what} projects the {' and '.join(name[axis] for axis in wished)} of a parameter of shape {whole}, whose "
        f"{' and '.join(f'{name[axis]} are shared among {shared[axis].ways} processes' for axis in taken)}: every step would gather them. "
        f"Use {cure}"
    )


def fits(view: tuple[int, ...], rank: int | float | str | None, axes: tuple[int, ...] | None = None) -> int | None:
    """The rank in use: None when the group has none or that of the matrix, for vectors, and where it is not smaller than the matrix, or
    where that has no elements.

    A fraction is one of the short side, or of the axes that a projector always takes.
    """
    if rank is None or isinstance(rank, str) or len(view) < 2 or 0 in view:  # "full"
        return None
    short = min(view[axis] for axis in axes or (-2, -1))
    rank = max(1, int(rank * short)) if isinstance(rank, float) else rank
    return rank if rank < short else None


def projected_axes(view: tuple[int, ...], proj_type: str) -> tuple[int, ...]:
    """The projected axes by the published table: std projects the short side, reverse_std the long one; a square counts as tall."""
    tall = view[-2] >= view[-1]
    short, long = ((-1,), (-2,)) if tall else ((-2,), (-1,))
    return {"std": short, "reverse_std": long, "left": (-2,), "right": (-1,), "full": (-2, -1)}[proj_type]
