"""Doing: one gradient's way through the five slots, one parameter at a time.

    compress   refresh the basis if it is due (projector, transport), then R = project(G)
    apply      decode -> rule -> encode on R in one pass (elementwise), then W <- (1 - lr wd) W - scale * project_back(N)

The engine allocates nothing that lasts (layout.state_spec sizes the state) and waits for no device.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine import fused as elementwise
from galore_torch.engine.fused import only_if
from galore_torch.engine.layout import AnyRule, Layout, layout, state_spec, stored_bases, stored_moments
from galore_torch.ops import linalg
from galore_torch.ops.codecs import Stored
from galore_torch.ops.int8_weight import Int8Weight
from galore_torch.ops.linalg import finite, readable, usable
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import fits_gemm, project_back, subtract
from galore_torch.slots.rules import Moment, Rule
from galore_torch.slots.torch_rule import BaseRule
from galore_torch.slots.transport import TRANSPORTS

State = dict[str, Any]
Group = Mapping[str, Any]
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many there are
STREAMS = 1 << 20  # random streams a step: the step counts them up from the first, a refresh takes the last 64


def plan_of(weight: Tensor, group: Group) -> Layout:
    return layout(tuple(weight.shape), weight.dtype, group["rank"], group["proj_type"])


def new_state(weight: Tensor, group: Group, rule: AnyRule, turn: int) -> State:
    """The whole state of one parameter, made at once so that no checkpoint tool has to step to see it.

    ``turn`` numbers the optimizer's parameters: it decides on which step of the gap this one refreshes.
    """
    spec = state_spec(plan_of(weight, group), group, rule)
    return {"step": 0, "turn": turn, **{key: tensor.allocate(weight.device) for key, tensor in spec.items()}}


def refresh_is_due(state: State, group: Group) -> bool:
    """Whether this step refreshes the basis: once in every gap, and whenever there is none that a usable gradient made.

    Parameters take turns over the gap, spread by the golden ratio, so that no step carries all refreshes; only the first
    does. ``projector="svd"`` keeps the published schedule, where all refresh at steps 0, T, 2T, ... With ``gap_range`` the
    length of the gap, and the step where it began, are state of the parameter.
    """
    if not state["basis_ready"]:
        return True
    if group["gap_range"] is not None:
        return bool(state["step"] - state["gap_start"] >= state["gap"])
    return (state["step"] - _shift(state, group)) % group["update_proj_gap"] == 0


def _shift(state: State, group: Group) -> int:
    """The step of the first gap on which this parameter's turn comes."""
    return 0 if group["projector"] == "svd" else int(group["update_proj_gap"] * (state["turn"] * GOLDEN % 1.0))


def compress(weight: Tensor, grad: Tensor, state: State, group: Group, rule: AnyRule) -> Tensor:
    """The gradient the rule sees: R = basis^T G (GaLore, arXiv 2403.03507, Alg. 2), in fp32 or fp64; G itself at full rank.

    grad: the weight's shape, any float dtype. Refreshes the basis from this gradient when that is due.
    """
    plan = plan_of(weight, group)
    if plan.rank is None:
        return grad
    if refresh_is_due(state, group):
        _refresh(grad.reshape(plan.matrix), state, plan, group, rule)
    return project(grad, state, plan, group)


def project(grad: Tensor, state: State, plan: Layout, group: Group) -> Tensor:
    """basis^T X, X basis or left^T X right in the bases as they are, in fp32 or fp64. A new tensor."""
    low = grad.reshape(plan.matrix)
    for mode, basis in _bases(state, plan, group).items():
        low = linalg.project(low, basis, mode)
    return low.to(plan.real)


def apply(weight: Tensor, low: Tensor, state: State, group: Group, rule: AnyRule, spare: bool = False) -> None:
    """One step of the rule on ``low`` (what `compress` returned) and of the weight, in place.

    ``spare``: nobody needs a projected ``low`` afterwards, and the update may take its place.
    A gradient that is not finite is skipped: it changes neither moments nor direction, and the weight only decays.
    """
    plan = plan_of(weight, group)
    if not weight.numel():  # an empty shard
        state["step"] += 1
        return
    good: Tensor | bool = finite(low)  # NaN or Inf in G reaches R, whatever the basis
    if readable(low):
        good = bool(good)
    step = state["step"] + 1
    if isinstance(rule, BaseRule):
        low = low if good is True else torch.where(torch.as_tensor(good), low, 0.0)
        _apply_base(weight, low, state, group, rule, plan)
    else:
        _apply_rule(weight, low, good, state, group, rule, plan, step, spare)
    if isinstance(weight, Int8Weight):
        torch.autograd.graph.increment_version(weight)  # its codes were written, and autograd looks at the weight
    state["step"] = step


def _bases(state: State, plan: Layout, group: Group) -> dict[int, Tensor]:
    return {mode: stored.decode(state) for mode, stored in stored_bases(plan, group["basis_codec"]).items()}


def _refresh(grad_MN: Tensor, state: State, plan: Layout, group: Group, rule: AnyRule) -> None:
    """New bases from this gradient, moments carried over; nothing changes, on the device, when the gradient is not usable."""
    assert plan.rank is not None
    good: Tensor | bool = usable(grad_MN)
    if readable(grad_MN):
        good = bool(good)
        if not good:
            state["basis_ready"].fill_(False)
            return
    else:
        grad_MN = torch.where(torch.as_tensor(good), grad_MN, 0.0)  # a decomposition must not meet NaN
    stored_in = stored_bases(plan, group["basis_codec"])
    ready = bool(state["basis_ready"])
    previous = {mode: stored.decode(state) if ready else None for mode, stored in stored_in.items()}
    seed = state["step"] if ready else 0  # the first basis does not depend on how long its gradient was awaited
    found = PROJECTORS[group["projector"]](grad_MN.to(plan.real), plan.rank, previous, seed)
    with only_if(good, [state[key] for key, spec in state_spec(plan, group, rule).items() if key in state and not spec.host]):
        C = {}
        for mode, stored in stored_in.items():
            C[mode] = found[mode].mT @ stored.decode(state)  # (r, m) @ (m, r)
            stored.encode(state, found[mode], None)
        if state["step"] and group["transport"] != "keep":
            seed = state["step"] * STREAMS + STREAMS - 64
            for i, (moment_stored, moment) in enumerate(_moments(plan, group, rule)):
                value = moment_stored.decode(state)
                moved = TRANSPORTS[group["transport"]](C, value, moment.kind, moment.mean_over)
                moment_stored.encode(state, moved, seed + i)
    if group["gap_range"] is not None:
        if ready:
            gap = adapted_gap(C, int(state["gap"]), group["gap_range"], group["overlap_range"])
            state["gap"].copy_(torch.where(torch.as_tensor(good), gap, state["gap"].to(gap.device)), non_blocking=True)
        state["gap_start"].fill_(state["step"] + (0 if ready else (_shift(state, group) or state["gap"]) - state["gap"]))
    state["basis_ready"].copy_(torch.as_tensor(good), non_blocking=True)


def adapted_gap(C: Mapping[int, Tensor], gap: int, gap_range: Sequence[int], overlap_range: Sequence[float]) -> Tensor:
    """Steps to the next refresh, a 0-d int64 on the device of C = new basis^T old basis (r x r), one for each projected mode.

    The overlap ||C||_F^2 / r, the share of the old subspace that the new one kept (the mean over modes), doubles the gap from the
    upper end of ``overlap_range`` on and halves it below the lower end. It is blind to signs and to rotations within the
    subspace, which Q-GaLore's cosine of one singular vector (arXiv 2407.08296, section 3.2) is not.
    """
    overlap = torch.stack([matrix.square().sum() / matrix.shape[-1] for matrix in C.values()]).mean()
    low, high = overlap_range
    longer, shorter = min(2 * gap, gap_range[1]), max(gap // 2, gap_range[0])
    return torch.where(overlap >= high, longer, torch.where(overlap < low, shorter, gap))


def _moments(plan: Layout, group: Group, rule: AnyRule) -> Sequence[tuple[Stored, Moment]]:
    if isinstance(rule, Rule):
        return stored_moments(plan, group, rule)
    moments = rule.moments(plan.low_shape, group).items()
    return [(Stored(key, plan.low_shape, real=plan.real), moment) for key, moment in moments if moment.kind != "other"]


def _apply_rule(
    weight: Tensor, low: Tensor, good: Tensor | bool, state: State, group: Group, rule: Rule, plan: Layout, step: int, spare: bool
) -> None:
    lr = rule.lr(weight, group, step)
    shrink = 1 - lr * group["weight_decay"] if group["weight_decay"] else 1.0
    scale = group["scale"] if plan.scaled else 1.0
    late = shrink if group["decay"] == "after" else 1.0  # decay after the update shrinks the update too
    if plan.rank is None or not isinstance(late, Tensor):
        scale, late = scale * late, 1.0
    seeds, rounded = itertools.count(_first_seed(weight, state, step)), _is_rounded(weight, group)
    region = elementwise.Region(rule, tuple(stored for stored, _ in stored_moments(plan, group, rule)), group["maximize"], plan.real)
    numbers, fuse = rule.numbers(group, step, lr), rule.elementwise and elementwise.fuses(weight, low.numel(), group["compile"])
    if plan.rank is None:
        fuse = fuse and not isinstance(weight, Int8Weight)
        change = elementwise.Change(weight, scale, shrink, rounded)
        elementwise.step(region, low, good, state, numbers, seeds, fuse, change)
        return
    update = low if spare else torch.empty_like(low)
    elementwise.step(region, low, good, state, numbers, seeds, fuse, update)
    if isinstance(late, Tensor):
        update.mul_(late)
    _recover(weight, update, state, plan, group, scale, _foldable(shrink, weight), next(seeds) if rounded else None)


def _is_rounded(weight: Tensor, group: Group) -> bool:
    return group["stochastic_rounding"] and (weight.dtype == torch.bfloat16 or isinstance(weight, Int8Weight))


def _first_seed(weight: Tensor, state: State, step: int) -> int:
    """Where the random streams of this step begin. INT8 is coarse: there each parameter has streams of its own."""
    if not isinstance(weight, Int8Weight):
        return step * STREAMS
    return ((step * 0x9E3779B97F4A7C15 + state["turn"] * 0xC2B2AE3D27D4EB4F) >> 13) & 0x7FFFFFFF


def _foldable(shrink: Any, weight: Tensor) -> Any:
    """Weight decay as a factor to fold into the update.

    A 0-d tensor cannot go into a GEMM without reading it on the host: it is applied here. Rounded weights have no such GEMM.
    """
    if isinstance(shrink, Tensor) and fits_gemm(weight):
        weight.mul_(shrink)
        return 1.0
    return shrink


def _recover(weight: Tensor, update: Tensor, state: State, plan: Layout, group: Group, scale: float, shrink: Any, seed: int | None) -> None:
    """W <- shrink W - scale project_back(update); a weight that is no matrix in memory (channels last) goes through a copy."""
    bases = _bases(state, plan, group)
    fuse = not fits_gemm(weight) and elementwise.fuses(weight, weight.numel(), group["compile"])
    write = elementwise.subtract if fuse else subtract
    if _is_matrix(weight):
        matrix = weight if weight.dim() == 2 else weight.view(plan.matrix)
        project_back(matrix, update, bases, scale, shrink, seed, write)
        return
    matrix = weight.reshape(plan.matrix)
    project_back(matrix, update, bases, scale, shrink, seed, write)
    weight.copy_(matrix.view(weight.shape))


def _is_matrix(weight: Tensor) -> bool:
    """Whether the axes after the first can be flattened without a copy."""
    inner = zip(weight.stride()[1:-1], weight.stride()[2:], weight.shape[2:], strict=True)
    return all(outer == stride * size for outer, stride, size in inner)


def _apply_base(weight: Tensor, low: Tensor, state: State, group: Group, rule: BaseRule, plan: Layout) -> None:
    """Run the torch.optim class: on the weight itself, or on its coordinates x = basis^T W and back by W += scale * basis dx.

    A gradient that is not finite counts as zero here, for the class keeps its own books. A matrix that trains at full rank in a
    group with a rank keeps the group's scale: W <- shrink W + scale dW.
    """
    moments = {key: state[key] for key in rule.spec(plan.low_shape, plan.real, group)} if state["step"] else None
    if not plan.scaled:
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        return
    x = None if plan.rank is None else project(weight, state, plan, group)
    shrink, decay = 1.0, group["weight_decay"]
    if rule.decouples(group) and decay:
        shrink = _foldable(1 - group["lr"] * decay, weight)
        group = {**group, "weight_decay": 0.0}
    if x is None:
        start = weight.clone()
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        if group["scale"] != 1 or group["weight_decay"] != decay:
            weight.mul_(group["scale"]).add_(start * (shrink - group["scale"]))
        return
    before = x.clone()
    state.update(rule.step_(x, low, moments, group))
    seed = _first_seed(weight, state, state["step"] + 1) if _is_rounded(weight, group) else None
    _recover(weight, before.sub_(x), state, plan, group, group["scale"], shrink, seed)
