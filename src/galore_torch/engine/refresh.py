"""When a basis is due, how it is found, and how the moments cross the change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.fused import only_if
from galore_torch.engine.layout import Group, Layout, ParamView, State, bases_of
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.engine.stored import carried_moments
from galore_torch.ops.codecs import StoredTensor
from galore_torch.ops.linalg import measured, readable
from galore_torch.ops.outer import OuterProduct
from galore_torch.ops.sharded import ShardedMatrix
from galore_torch.ops.write import WeightUpdate
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.rules import Moment, Rule
from galore_torch.slots.sparse_tucker import SET, modes
from galore_torch.slots.subspace import Bases, Overlaps, kept_share
from galore_torch.slots.transport import TRANSPORTS

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many there are
Gradient = Tensor | OuterProduct | SharedGradient  # as a tensor, or as what is only multiplied
STREAMS = 1 << 20  # random streams a step: the step counts them up from the first, a refresh takes the last 64


def refresh_is_due(state: State, group: Group, first: bool = True) -> bool:
    """Whether this gradient refreshes a basis: once in every gap, and whenever there is one that no usable gradient has made.

    ``first``: whether it begins a step; bases in use do not change within one. Never where the projector's subspace stays.
    """
    if PROJECTORS[group["projector"]].find is None:
        return False
    return not has_basis(state) or (first and gap_is_over(state, group))


def has_basis(state: State) -> bool:
    """Whether every matrix has a basis that a usable gradient made, where one is needed."""
    ready = state.get("basis_ready")
    return ready is None or bool(ready if ready.dim() == 0 else ready.all())


def gap_is_over(state: State, group: Group) -> bool:
    """Parameters take turns over the gap, spread by the golden ratio, so that no step carries all refreshes; only the first does.

    ``projector="svd"`` keeps the published schedule, where all refresh at steps 0, T, 2T, ... With ``gap_range`` the length of the gap, and
    the step where it began, are state of the parameter.
    """
    if group["gap_range"] is not None:
        return bool(state["step"] - state["gap_start"] >= state["gap"])
    return (state["step"] - _shift(state, group)) % group["update_proj_gap"] == 0


def _shift(state: State, group: Group) -> int:
    """The step of the first gap on which this parameter's turn comes."""
    return int(group["update_proj_gap"] * (state["index"] * GOLDEN % 1.0)) if PROJECTORS[group["projector"]].in_turn else 0


def refresh(view: ParamView, grad: Gradient | ShardedMatrix, first: bool = True) -> None:
    """New bases from this gradient, moments carried over; nothing changes, on the device, where the gradient is not usable.

    Usable is what a projector needs: a gradient that is finite and not zero, a momentum that is so, or nothing where it looks at neither.
    grad: of the layout's view, or its factors, or what all processes have of it: a projector that needs the matrix gets it. Each matrix of
    a batch has its own basis: those without one get it from the first gradient they can use, the others at the end of the gap.
    ``first``: whether the gradient begins its step; a later micro-batch changes no basis in use.
    """
    state, group = view.state, view.group
    if isinstance(grad, Tensor):
        grad = _together(view, grad)
    if not isinstance(grad, Tensor) and view.projector.whole:
        grad = grad.dense()
    is_usable, scaled = measured(grad, len(view.layout.batch)) if isinstance(grad, Tensor | ShardedMatrix) else grad.measured()
    ready, can = state["basis_ready"].reshape(-1), is_usable.reshape(-1)  # (matrices,), on the host and on the device
    keeps = scaled.is_zero if isinstance(scaled, SharedGradient) else None  # of a weight that no process has used: as if it were not asked
    if not _looks(view):  # the first basis needs no gradient; without a set of rows, each would be the first one
        can = torch.ones_like(can) if keeps is None else ~(keeps.reshape(-1) & ready.to(can.device))
    elif view.projector.follows:  # the momentum is asked, once the gradient has been added to it
        can = can | ready.to(can.device)
    grad = grad if view.projector.follows else scaled  # a moment that is added to it is not scaled
    wanted = torch.ones_like(ready) if first and gap_is_over(state, group) else ~ready
    begins = not bool(ready.any())
    for warm in (True, False):
        chosen = wanted & (ready if warm else ~ready)
        if readable(grad):
            chosen = chosen & can
        if not bool(chosen.any()):
            continue
        C = _renew_some(view, grad, warm, chosen, can)
        if group["gap_range"] is not None and (warm or begins):
            _begin_gap(view, C if warm else None, can[chosen.to(can.device)] if view.layout.batch else can)
    if view.projector.follows:  # the basis in use is the best one until there is another momentum
        can = can | ready.to(can.device)
    after = can if not view.layout.batch else torch.where(wanted.to(can.device), can, ready.to(can.device))
    after = after if keeps is None else torch.where(keeps.reshape(-1), ready.to(can.device), after)
    # Where processes share a matrix they must all know at the next step whether it has a basis: its refresh is theirs together.
    state["basis_ready"].copy_(after.view(state["basis_ready"].shape), non_blocking=view.place is None)


def _looks(view: ParamView) -> bool:
    """Whether the next bases depend on the gradient."""
    return view.projector.looks and not _is_random(view)


def _is_random(view: ParamView) -> bool:
    """Whether ``random_after`` has come."""
    random_from = view.group["random_after"]
    return random_from is not None and bool(view.state["step"] >= random_from)


def _together(view: ParamView, grad: Tensor) -> Tensor | ShardedMatrix:
    """The whole gradient, of which this process holds a part; one whose matrices are whole here is itself."""
    rows, columns = view.part(-2), view.part(-1)
    return ShardedMatrix(grad, rows, columns) if rows or columns else grad


def _renew_some(view: ParamView, grad: Gradient | ShardedMatrix, warm: bool, chosen: Tensor, can: Tensor) -> Overlaps:
    """`_renew` for some matrices of a batch: they are taken out, and put back."""
    if bool(chosen.all()):
        return _renew(view, grad, warm, can)
    at = chosen.nonzero().flatten().to(grad.device)  # indices of matrices
    layout = replace(view.layout, view=(len(at), *view.layout.view[-2:]), whole=(len(at), *view.layout.whole[-2:]))
    held = [
        key for stored in (*view.layout.bases.values(), *(stored for stored, _ in carried_moments(view).values())) for key in stored.keys
    ]
    state = {"step": view.state["step"], **{key: view.state[key][at] for key in held}}
    found = can[at]
    C = _renew(replace(view, state=state, layout=layout), grad[at], warm, found)
    can[at] = found
    for key in held:
        view.state[key][at] = state[key]
    return C


def _renew(view: ParamView, grad: Gradient | ShardedMatrix, warm: bool, can: Tensor) -> Overlaps:
    """New bases for all matrices of the view; C = new basis^T old basis. ``warm``: whether the old ones may be started from.

    ``can``: which gradients are usable; narrowed, in place, to those that made a finite basis.
    """
    state, layout, follows = view.state, view.layout, view.projector.follows
    if not readable(grad) and not follows:
        grad = _where(can, grad, layout)
    old = _decoded(view) if warm else None
    seed = state["step"] if warm else 0  # the first basis does not depend on how long its gradient was awaited
    find, overlap = PROJECTORS["random"].find if _is_random(view) else view.projector.find, view.projector.overlap
    assert find is not None
    exact = grad.to(layout.compute_dtype)
    if follows:
        exact = exact if old is None else _first_moment(view, exact)
        is_usable, exact = measured(exact, len(layout.batch)) if isinstance(exact, Tensor | ShardedMatrix) else exact.measured()
        can &= is_usable.reshape(-1)
        if not readable(exact) or not bool(can.all()):
            exact = _where(can, exact, layout)
    found = find(exact, layout.ranks, old, seed)
    del exact  # a copy of the whole gradient, where that is of 16 bits
    for basis in found.values():  # whatever became of the gradient in there: the old basis is the better one
        total = basis.flatten(len(layout.batch)).sum(-1)
        can &= (total - total) == 0
    moments = carried_moments(view) if state["step"] else {}
    stored = (*layout.bases.values(), *(stored for stored, _ in moments.values()))
    with only_if(True if readable(grad) and bool(can.all()) else can, [state[key] for tensor in stored for key in tensor.keys]):
        C = overlap(found, _decoded(view) if old is None else old) if overlap else {}
        for axis, one in layout.bases.items():
            one.encode(state, found[axis], None)
        _transport(view, C, moments)
    return C


def _where(can: Tensor, grad: Any, layout: Layout) -> Any:
    """Zeros in the place of matrices that are not usable: a decomposition must not meet NaN."""
    return torch.where(can.view(*layout.batch, 1, 1), grad, 0.0) if isinstance(grad, Tensor) else grad.where(can)


def _first_moment(view: ParamView, grad: Any) -> Any:
    """b G + a P M in full size: the first moment M that this gradient is about to make (`Rule.blend`), in the basis P in use."""
    _, kept, new = blend_of(view)
    sign = -1.0 if view.group["maximize"] else 1.0
    here = (grad.local if isinstance(grad, ShardedMatrix) else grad) * (sign * new)
    add_momentum(view, here, kept)
    return replace(grad, local=here) if isinstance(grad, ShardedMatrix) else here


def add_momentum(view: ParamView, full: Tensor, factor: float) -> Tensor:
    """full <- full + factor P M, in place, with the first moment M; full has the view's shape."""
    view.projector.project_back(WeightUpdate(full, -factor), moments_of(view)[blend_of(view)[0]], bases_of(view))
    return full


def blend_of(view: ParamView) -> tuple[str, float, float]:
    """(name, a, b) of the rule's first moment, M <- a M + b R."""
    assert isinstance(view.rule, Rule)
    assert view.rule.blend is not None
    return view.rule.blend(view.group)


def _decoded(view: ParamView) -> Bases:
    return {axis: stored.decode(view.state) for axis, stored in view.layout.bases.items()}


class _Values(MutableMapping[str, Tensor]):
    """Moments by name, each decoded when it is looked up and stored when it is set: no two in full unless somebody asks for them.

    ``seed`` starts the random streams of what is set.
    """

    def __init__(self, state: State, stored: Mapping[str, StoredTensor], seed: int):
        self.state, self.stored, self.seeds = state, stored, itertools.count(seed)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].decode(self.state)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.stored[name].encode(self.state, value, next(self.seeds))

    def __delitem__(self, name: str) -> None:
        raise TypeError("a parameter keeps its moments")

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def moments_of(view: ParamView) -> MutableMapping[str, Tensor]:
    """The moments that a projection changes, by name, each decoded when it is looked up and stored when it is set."""
    stored = {name: stored for name, (stored, _) in carried_moments(view).items()}
    return _Values(view.state, stored, view.state["step"] * STREAMS + STREAMS - 128)


def _transport(view: ParamView, C: Overlaps, moments: Mapping[str, tuple[StoredTensor, Moment]]) -> None:
    stored = {name: pair[0] for name, pair in moments.items()}
    kinds = {name: pair[1] for name, pair in moments.items()}
    values = _Values(view.state, stored, view.state["step"] * STREAMS + STREAMS - 64)
    for name, value in _moved(view, C, values, kinds):
        values[name] = value


def _moved(view: ParamView, C: Overlaps, values: Mapping[str, Tensor], kinds: Mapping[str, Moment]) -> Iterator[tuple[str, Tensor]]:
    """What the transport makes of the moments, by name; where R has single elements too, of both parts."""
    apply, shape, step = TRANSPORTS[view.group["transport"]].apply, view.layout.core_shape, view.state["step"]
    if not view.projector.elements:
        yield from apply(C, values, kinds, view.group, step)
        return
    core = {name: value[: prod(shape)].view(shape) for name, value in values.items()}
    elements = {name: value[prod(shape) :] for name, value in values.items()}
    on_core = apply(modes(C), core, kinds, view.group, step)
    for (name, value), (_, beside) in zip(on_core, apply({SET: C[SET]}, elements, kinds, view.group, step), strict=True):
        yield name, torch.cat([value.reshape(-1), beside])


def _begin_gap(view: ParamView, C: Overlaps | None, can: Tensor) -> None:
    """A gap begins at this step, of a length that follows the overlaps C of the matrices that ``can``; the first gap where C is None."""
    state, group = view.state, view.group
    if C is None:
        state["gap_start"].fill_(state["step"] + (_shift(state, group) or state["gap"]) - state["gap"])
        return
    share = (kept_share(C).reshape(-1) * can).sum() / can.sum().clamp_min(1)
    gap = adapted_gap(share, int(state["gap"]), group["gap_range"], group["overlap_range"])
    state["gap"].copy_(torch.where(can.any(), gap, state["gap"].to(gap.device)), non_blocking=view.place is None)
    state["gap_start"].fill_(state["step"])


def adapted_gap(overlap: Tensor, gap: int, gap_range: Sequence[int], overlap_range: Sequence[float]) -> Tensor:
    """Steps to the next refresh, a 0-d int64 on the device of ``overlap``: the share of the old subspace that the new one kept, 0-d.

    From the upper end of ``overlap_range`` on it doubles the gap, below the lower end it halves it. `kept_share` is blind to signs and to
    rotations within the subspace, which Q-GaLore's cosine of one singular vector (arXiv 2407.08296, section 3.2) is not.
    """
    low, high = overlap_range
    longer, shorter = min(2 * gap, gap_range[1]), max(gap // 2, gap_range[0])
    return torch.where(overlap >= high, longer, torch.where(overlap < low, shorter, gap))
