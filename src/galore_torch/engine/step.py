"""One gradient's way through the five slots, one parameter at a time: `step`, read from top to bottom.

Where gradients do not stay (a fused backward pass that projects them), its first half is `compress` and its second `apply`.
The engine allocates nothing that lasts (stored.state_spec sizes the state) and waits for no device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_torch.engine import fused
from galore_torch.engine.in_full import close, opened, reads_coded
from galore_torch.engine.layout import AnyRule, Group, Layout, ParamView, State, bases_of
from galore_torch.engine.layout import layout_of as layout_of
from galore_torch.engine.layout import view_of as view_of
from galore_torch.engine.one_pass import in_one_pass
from galore_torch.engine.refresh import STREAMS, Gradient, add_momentum, blend_of, moments_of, refresh, refresh_is_due
from galore_torch.engine.sharding import local
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.engine.stored import state_spec, stored_error, stored_moments
from galore_torch.engine.whole_rules import all_hold, of_whole, rms_of, whole_rule
from galore_torch.ops import write
from galore_torch.ops.linalg import all_finite, finite
from galore_torch.ops.outer import OuterProduct
from galore_torch.ops.sharded import Part
from galore_torch.ops.write import WeightUpdate
from galore_torch.slots.carry import CARRIES
from galore_torch.slots.recovery import RECOVERIES, Seen
from galore_torch.slots.rules import Numbers, Rule
from galore_torch.slots.subspace import Bases
from galore_torch.slots.torch_rule import BaseRule


def new_state(p: Tensor, group: Group, rule: AnyRule, index: int) -> State:
    """The whole state of one parameter, made at once so that no checkpoint tool has to step to see it: of a DTensor, this process' part.

    ``index`` numbers the optimizer's parameters: it decides on which step of the gap this one refreshes.
    """
    spec = state_spec(layout_of(p, group), group, rule)
    return {"step": 0, "index": index, **{key: tensor.allocate(local(p).device) for key, tensor in spec.items()}}


def step(view: ParamView, grad: Tensor) -> None:
    """One step of one parameter from its full gradient: the weight's shape, any float dtype. Works for every row of every slot."""
    if not view.layout.ranks:
        apply(view, grad)
        return
    carry, error = CARRIES[view.group["carry"]], stored_error(view.layout, view.group)
    grad = _as_view(grad, view.layout)
    if carry and error:
        grad = carry.add(grad, error.decode(view.state))
    lost = None
    if refresh_is_due(view.state, view.group):
        if carry and carry.momentum and view.state["step"]:
            lost = add_momentum(view, torch.zeros_like(grad, dtype=view.layout.compute_dtype), 1.0)
        refresh(view, grad)
        if lost is not None:
            add_momentum(view, lost, -1.0)
    if in_one_pass(view, grad):
        return
    part = _own_rows(view)
    low = project(view, grad) if part is None else grad[part]  # rows that are only read are not copied
    apply(view, low, grad)
    if not (carry and error):
        return
    is_finite = all_finite(grad)
    if is_finite is not False:
        kept = carry.keep(grad, low, partial(project_back, bases=bases_of(view), view=view))
        if lost is not None:
            _, old, new = blend_of(view)
            kept.add_(lost, alpha=(-1.0 if view.group["maximize"] else 1.0) * old / new)
        with fused.only_if(is_finite, [view.state[key] for key in error.keys]):
            error.encode(view.state, kept, view.state["step"] * STREAMS + STREAMS - 65)


def compress(view: ParamView, grad: Gradient, first: bool = True) -> Tensor:
    """R = project(G), in fp32 or fp64, after a refresh of the basis from this gradient when that is due; G itself at full rank.

    grad: the weight's shape or its view's, or the factors of a projected matrix's gradient, or what this and other processes have of it,
    of which R is this one's. ``first``: whether it begins a step; a further micro-batch only gives a basis to matrices that the earlier
    ones could give none.
    """
    if isinstance(grad, Tensor):
        if not view.layout.ranks:
            return grad
        grad = _as_view(grad, view.layout)
    if refresh_is_due(view.state, view.group, first):
        refresh(view, grad, first)
    return project(view, grad)


def _own_rows(view: ParamView) -> slice | None:
    """The rows that are all the step moves: it may then write into them as into a weight at full rank. None where it may not."""
    layout, group, weight, part = view.layout, view.group, view.weight, view.projector.part
    if part is None:  # asked first: a dense basis is not decoded for this
        return None
    if isinstance(view.rule, BaseRule) or group["recovery"] != "project_back" or group["carry"] or weight.shape != layout.view:
        return None
    if not write.is_plain(weight) or (group["weight_decay"] and not write.fits_gemm(weight)):  # rounded, other rows move at random
        return None
    return part(bases_of(view))


def project(view: ParamView, grad: Gradient) -> Tensor:
    """R in the bases as they are, in fp32 or fp64. A new tensor. Of a shared gradient this process's R alone, or its part of
    the mean where the weight is cut."""
    if isinstance(grad, SharedGradient):
        low = torch.zeros(view.layout.entire.low_shape, dtype=view.layout.compute_dtype, device=grad.device)
        for term in grad.terms:
            low += project(view, term)
        return share_out(view, low) if view.place else low
    if isinstance(grad, OuterProduct):
        low = OuterProduct(project_factor(view, grad.left, -2), project_factor(view, grad.right, -1)).dense()
    else:
        low = view.projector.project(_as_view(grad, view.layout), bases_of(view))
        for axis in view.layout.ranks:
            if part := view.part(axis):
                low = part.total(low)
    return low.to(view.layout.compute_dtype)


def share_out(view: ParamView, low: Tensor) -> Tensor:
    """Of the mean over processes of R, of a whole weight that is cut between them, the part that belongs to the part of the weight here."""
    assert view.place is not None
    dims = {cut.dim: cut.axis for cut in view.layout.cuts}
    return view.place.scattered_mean(low.to(view.layout.compute_dtype), dims).to(view.weight.device)


def project_factor(view: ParamView, factor: Tensor, axis: int) -> Tensor:
    """The factor of G that spans ``axis`` (T x m for -2, T x n for -1), as short as the rank where the axis is projected; in its dtype."""
    stored = view.layout.bases.get(axis)
    if stored is None:
        return factor
    basis = {axis: stored.read(view.state)}
    low = view.projector.project(factor, basis) if axis == -1 else view.projector.project(factor.mT, basis).mT
    return low.to(factor.dtype)


def project_back(change: WeightUpdate, low: Tensor, bases: Bases, view: ParamView) -> None:
    """W <- decay_factor W - scale (low in full size), in place."""
    view.projector.project_back(change, low, bases)


def unproject(view: ParamView, low: Tensor, out: Tensor) -> None:
    """The gradient of the weight's shape that lies in the subspace and whose R is ``low``, into ``out``."""
    with write.viewed(out, view.layout.view) as matrix:
        matrix.zero_()
        project_back(WeightUpdate(matrix, -1.0), low, bases_of(view), view)


def _as_view(tensor: Tensor, layout: Layout) -> Tensor:
    return tensor if tensor.shape == layout.view else tensor.reshape(layout.view)


def apply(view: ParamView, low: Tensor, grad: Tensor | None = None) -> None:
    """One step of the rule on ``low`` (what `compress` returned) and of the weight, in place.

    ``grad``: the full gradient, of the layout's view, where it is there: rows that read it work only then, and ``low`` may be used up
    unless a row reads that too. A gradient that is not finite is skipped: it changes neither moments nor direction, and the weight only
    decays.
    A rule that is not elementwise sees the matrices of a batch one at a time.
    """
    if view.weight.numel() or view.place:  # an empty shard keeps step with the others
        if view.layout.batch and not (isinstance(view.rule, Rule) and view.rule.elementwise):
            _apply_each(view, low, grad)
        else:
            _apply(view, low, grad)
        write.mark_written(view.weight)
    view.state["step"] += 1


def _apply_each(view: ParamView, low: Tensor, grad: Tensor | None) -> None:
    """`_apply` for each matrix of a batch, as if it were a parameter of its own; its state is views."""
    with write.viewed(view.weight, view.layout.view) as weights:
        for i, weight in enumerate(weights):
            own = {key: value for key, value in view.state.items() if key not in ("gap", "gap_start")}
            state = {key: value[i] if isinstance(value, Tensor) else value for key, value in own.items()}
            one = replace(view, weight=weight, state=dict(state), layout=view.layout.one)
            _apply(one, low[i], None if grad is None else grad[i])
            for key, value in one.state.items():
                if value is not state[key]:  # a class of GaLore(base) may hold a new tensor
                    view.state[key][i] = value


def _apply(view: ParamView, low: Tensor, grad: Tensor | None) -> None:
    is_finite = all_finite(grad if grad is not None and _hides(view) else low)
    if view.place and _is_seen_whole(view):  # its shards are skipped as one
        is_finite = all_hold(view, is_finite, low)
    if isinstance(view.rule, BaseRule):
        _apply_base(view, low if is_finite is True else torch.where(torch.as_tensor(is_finite, device=low.device), low, 0.0), view.rule)
    else:
        _apply_rule(view, low, is_finite, grad, view.rule)


def _hides(view: ParamView) -> bool:
    """Whether G may hold NaN or Inf that R does not show, and that the step would meet.

    Through a basis that is multiplied they reach R. The elements of a mean may cancel, and rows beside the set are not in R.
    """
    if not view.layout.ranks:
        return False
    recovery = RECOVERIES[view.group["recovery"]]
    return view.projector.averages or (view.projector.part is not None and "grad" in recovery.reads and not recovery.elementwise)


def _is_seen_whole(view: ParamView) -> bool:
    """Whether its step looks at the whole of a matrix, of which processes hold parts."""
    if not isinstance(view.rule, Rule):
        return False
    return not view.rule.elementwise or (bool(view.layout.ranks) and RECOVERIES[view.group["recovery"]].whole)


def _apply_rule(view: ParamView, low: Tensor, is_finite: Tensor | bool, grad: Tensor | None, rule: Rule) -> None:
    weight, group, layout, step = view.weight, view.group, view.layout, view.state["step"] + 1
    if layout.ranks and reads_coded(view):
        fuse = fused.fuses(weight, low.numel(), group, view.state["step"])
        full = opened(view, fuse)
        _apply_rule(full, low, is_finite, grad, rule)
        close(view, full, is_finite, _first_seed(weight, view.state, step), fuse)
        return
    rule = whole_rule(view, rule)
    lr = rule.lr(partial(rms_of, view), group, step)
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # torch allows a tensor of one element
    decay_factor = 1 - lr * group["weight_decay"] if group["weight_decay"] else 1.0
    scale = group["scale"] if layout.scaled else 1.0
    late = decay_factor if group["decay"] == "after" else 1.0  # decay after the update shrinks the update too
    first = _first_seed(weight, view.state, step)
    seed = first if _is_rounded(weight, group) else None
    stored = tuple(stored for stored, _ in stored_moments(layout, group, rule))
    region = fused.FusedStep(rule, stored, group["maximize"], layout.compute_dtype)
    inputs = fused.Inputs(low, is_finite, view.state, rule.numbers(group, step, lr), itertools.count(first))
    fuse = rule.elementwise and fused.fuses(weight, low.numel(), group, view.state["step"])
    part = _own_rows(view) if layout.ranks else None
    if not layout.ranks or part:
        change = WeightUpdate(weight if part is None else weight.detach()[part], scale * late, decay_factor, seed)
        fused.step(region, inputs, fuse and not write.is_coarse(weight), change)
        if part:
            for others in ((0, part.start), (part.stop, len(weight))) if group["weight_decay"] else ():
                write.decay(weight[slice(*others)], decay_factor)
        return
    recovery = RECOVERIES[group["recovery"]]
    update = torch.empty_like(low) if grad is None or recovery.reads or group["carry"] else low
    fused.step(region, inputs, fuse, update)
    if not recovery.remakes and (isinstance(late, Tensor) or recovery.reads):
        update.mul_(late)
    else:
        scale = scale * late
    seed = next(inputs.seeds) if seed is not None else None
    seen = Known(low, grad, lr if recovery.remakes else lr * late, is_finite, inputs.numbers)
    _recover(view, WeightUpdate(weight, scale, decay_factor, seed), update, seen)


def _is_rounded(weight: Tensor, group: Group) -> bool:
    return group["stochastic_rounding"] and write.can_round(weight)


def _first_seed(weight: Tensor, state: State, step: int) -> int:
    """Where the random streams of this step begin. INT8 is coarse: there each parameter has streams of its own."""
    if not write.is_coarse(weight):
        return step * STREAMS
    return ((step * 0x9E3779B97F4A7C15 + state["index"] * 0xC2B2AE3D27D4EB4F) >> 13) & 0x7FFFFFFF


class Known(NamedTuple):
    """What a step knows when its update has been made: R, G where it is there, the step size, whether R is finite, the rule's numbers."""

    low: Tensor
    grad: Tensor | None
    lr: Any = None
    is_finite: Tensor | bool = True
    numbers: Numbers = ()


def _recover(view: ParamView, change: WeightUpdate, update: Tensor, known: Known) -> None:
    """The update reaches the weight."""
    layout, group, recovery = view.layout, view.group, RECOVERIES[view.group["recovery"]]
    low, grad, lr, is_finite, numbers = known
    if view.projector.elements:  # which have a factor of their own in the place of the scale
        update[prod(layout.core_shape) :].mul_(group["sparse_scale"] / group["scale"])
    if "grad" in recovery.reads and grad is None:
        raise ValueError(f"recovery={group['recovery']!r} reads the full gradient, which is not kept here: see engine.recipe.check_kept")
    compiled = not write.fits_gemm(view.weight) and fused.fuses(view.weight, view.weight.numel(), group, view.state["step"])
    subtract = fused.subtract if compiled else write.subtract
    bases = cache(partial(bases_of, view))  # decoded where they are asked for, once

    def back(change: WeightUpdate, low: Tensor) -> None:
        project_back(change, low, bases(), view)

    read = (low if "low" in recovery.reads else None), (grad if "grad" in recovery.reads else None)
    with write.viewed(view.weight, layout.view) as matrix:
        change = WeightUpdate(matrix, change.scale, change.decay_factor, change.seed, subtract)
        sign = -1.0 if group["maximize"] else 1.0
        seen = Seen(back, tuple(layout.ranks), layout.whole, *read, lr, view.state, sign, numbers=numbers, is_finite=is_finite)
        if parts := view.parts:
            along = [part for axis in layout.ranks if (part := view.part(axis))]
            seen = replace(seen, total=partial(_added_up, parts), along=partial(_added_up, along), of_whole=partial(of_whole, view))
        if "moments" in recovery.reads:
            seen = replace(seen, moments=moments_of(view))
        recovery.apply(change, update, seen)


def _added_up(parts: Sequence[Part], tensor: Tensor) -> Tensor:
    return reduce(lambda sum, part: part.total(sum), parts, tensor)


def _apply_base(view: ParamView, low: Tensor, rule: BaseRule) -> None:
    """Run the torch.optim class: on the weight itself, or on its coordinates x = project(W) and back by W += scale * project_back(dx).

    A gradient that is not finite counts as zero here, for the class keeps its own books. A matrix that trains at full rank in a
    group with a rank keeps the group's scale: W <- decay_factor W + scale dW.
    """
    weight, state, group, layout = view.weight, view.state, view.group, view.layout
    moments = {key: state[key] for key in rule.spec(layout.low_shape, layout.compute_dtype, group)} if state["step"] else None
    if not layout.scaled:
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        return
    x = project(view, weight) if layout.ranks else None
    decay_factor, decay = 1.0, group["weight_decay"]
    if rule.decouples(group) and decay:
        decay_factor = 1 - group["lr"] * decay
        group = {**group, "weight_decay": 0.0}
    if x is None:
        start = weight.clone()
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        if group["scale"] != 1 or group["weight_decay"] != decay:
            weight.mul_(group["scale"]).add_(start * (decay_factor - group["scale"]))
        return
    before = x.clone()
    state.update(rule.step_(x, low, moments, group))
    dx = before.sub_(x)
    dx = torch.where(finite(dx), dx, 0.0)  # coordinates of a weight near the end of its range are Inf, and their difference NaN
    seed = _first_seed(weight, state, state["step"] + 1) if _is_rounded(weight, group) else None
    _recover(view, WeightUpdate(weight, group["scale"], decay_factor, seed), dx, Known(low, None))
