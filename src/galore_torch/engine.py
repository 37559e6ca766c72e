"""Doing: one gradient's way through the five slots, one parameter at a time.

    compress   refresh the basis if it is due (projector, transport), then R = project(G)
    apply      decode -> rule -> encode on R, a few rows at a time, then W <- (1 - lr wd) W - scale * project_back(N)

The engine allocates nothing that lasts (layout.state_spec sizes the state) and waits for no device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.base_rule import BaseRule
from galore_torch.codecs import Stored
from galore_torch.layout import AnyRule, Layout, layout, state_spec, stored_bases, stored_moments
from galore_torch.linalg import mode_product, usable
from galore_torch.projectors import PROJECTORS
from galore_torch.recovery import project_back, subtract
from galore_torch.rules import Moment, Moments, Rule
from galore_torch.transport import TRANSPORTS

State = dict[str, Any]
Group = Mapping[str, Any]
STREAMS = 1 << 20  # random streams a step: the step counts them up from the first, a refresh takes the last 64
CHUNK = 1 << 17  # elements an elementwise rule works on at a time: its temporaries stay in the cache


def plan_of(weight: Tensor, group: Group) -> Layout:
    return layout(tuple(weight.shape), weight.dtype, group["rank"], group["proj_type"])


def new_state(weight: Tensor, group: Group, rule: AnyRule) -> State:
    """The whole state of one parameter, made at once so that no checkpoint tool has to step to see it."""
    spec = state_spec(plan_of(weight, group), group, rule)
    return {"step": 0, **{key: tensor.allocate(weight.device) for key, tensor in spec.items()}}


def compress(weight: Tensor, grad: Tensor, state: State, group: Group, rule: AnyRule) -> Tensor:
    """The gradient the rule sees: R = basis^T G (GaLore, arXiv 2403.03507, Alg. 2), in fp32 or fp64; G itself at full rank.

    grad: the weight's shape, any float dtype. Refreshes the basis from this gradient when step % update_proj_gap == 0 or the
    last refresh met a gradient that was zero or not finite.
    """
    plan = plan_of(weight, group)
    if plan.rank is None:
        return grad
    grad_MN = grad.reshape(plan.matrix)
    if state["step"] % group["update_proj_gap"] == 0 or not state["basis_ready"]:
        _refresh(grad_MN, state, plan, group, rule)
    return project(grad, state, plan, group)


def project(grad: Tensor, state: State, plan: Layout, group: Group) -> Tensor:
    """R in the bases as they are, in fp32 or fp64."""
    return _project(grad.reshape(plan.matrix), _bases(state, plan, group)).to(plan.real)


def apply(weight: Tensor, low: Tensor, state: State, group: Group, rule: AnyRule) -> None:
    """One step of the rule on ``low`` (what `compress` returned) and of the weight, in place.

    A gradient that is not finite is skipped: it changes neither moments nor direction, and the weight only decays.
    """
    plan = plan_of(weight, group)
    finite: Tensor | bool = torch.linalg.vector_norm(low).isfinite()  # NaN or Inf in G reaches R, whatever the basis
    if low.is_cpu:
        finite = bool(finite)  # nothing to wait for: the masks below cost nothing
    step = state["step"] + 1
    if isinstance(rule, BaseRule):
        low = low if finite is True else torch.where(torch.as_tensor(finite), low, 0.0)
        _apply_base(weight, low, state, group, rule, plan)
    else:
        _apply_rule(weight, low, finite, state, group, rule, plan, step)
    state["step"] = step


def _project(matrix: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """basis^T X, X basis or left^T X right, in the dtype of X."""
    for mode, basis in bases.items():
        matrix = mode_product(matrix, basis.mT.to(matrix.dtype), mode)
    return matrix


def _bases(state: State, plan: Layout, group: Group) -> dict[int, Tensor]:
    return {mode: stored.decode(state) for mode, stored in stored_bases(plan, group).items()}


def _refresh(grad_MN: Tensor, state: State, plan: Layout, group: Group, rule: AnyRule) -> None:
    """New bases from this gradient, moments carried over; nothing changes, on the device, when the gradient is not usable."""
    assert plan.rank is not None
    good = usable(grad_MN)
    found = PROJECTORS[group["projector"]](torch.where(good, grad_MN, 0.0).to(plan.real), plan.rank)
    C = {}
    for mode, stored in stored_bases(plan, group).items():
        old = stored.decode(state)
        new = torch.where(good, found[mode], old)
        C[mode] = new.mT @ old  # (r, m) @ (m, r)
        stored.encode(state, new, None)
    if state["step"] and group["transport"] != "keep":
        seed = state["step"] * STREAMS + STREAMS - 64
        for i, (moment_stored, moment) in enumerate(_moments(plan, group, rule)):
            value = moment_stored.decode(state)
            moved = TRANSPORTS[group["transport"]](C, value, moment.kind, moment.mean_over)
            moment_stored.encode(state, torch.where(good, moved, value), seed + i)
    state["basis_ready"].copy_(good, non_blocking=True)


def _moments(plan: Layout, group: Group, rule: AnyRule) -> list[tuple[Stored, Moment]]:
    if isinstance(rule, Rule):
        return stored_moments(plan, group, rule)
    moments = rule.moments(plan.low_shape, group).items()
    return [(Stored(key, plan.low_shape, real=plan.real), moment) for key, moment in moments if moment.kind != "other"]


def _apply_rule(
    weight: Tensor, low: Tensor, finite: Tensor | bool, state: State, group: Group, rule: Rule, plan: Layout, step: int
) -> None:
    lr = rule.lr(weight, group, step)
    shrink = 1 - lr * group["weight_decay"] if group["weight_decay"] else 1.0
    factor = (1.0 if plan.rank is None else group["scale"]) * (shrink if group["decay"] == "after" else 1.0)
    shrink = _foldable(shrink, weight)
    moments = [stored for stored, _ in stored_moments(plan, group, rule)]
    streams = itertools.count(step * STREAMS)
    rounded = weight.dtype == torch.bfloat16 and group["stochastic_rounding"]
    update = low.new_empty(plan.low_shape, dtype=plan.real) if plan.rank is not None else None
    for rows in _row_chunks(low, rule, moments):
        views = {stored.name: stored.rows(state, rows) if rows else state for stored in moments}
        part = _rule_step(low[rows] if rows else low, finite, views, moments, group, rule, step, lr, streams, plan.real)
        part.mul_(factor)
        if update is None:
            subtract(weight[rows] if rows else weight, part, shrink, next(streams) if rounded else None)
        elif rows:
            update[rows] = part
        else:
            update = part
    if update is not None:
        _recover(weight, update, state, plan, group, shrink, next(streams) if rounded else None)


def _foldable(shrink: Any, weight: Tensor) -> float:
    """Weight decay as a number to fold into the update. A 0-d tensor cannot be read on the host: it is applied here."""
    if isinstance(shrink, Tensor):
        weight.mul_(shrink.to(weight.dtype))
        return 1.0
    return float(shrink)


def _row_chunks(low: Tensor, rule: Rule, moments: list[Stored]) -> Iterator[slice | None]:
    """Slices of the first axis, of about CHUNK elements, that cut no int8 block; None for everything at once."""
    if not rule.elementwise or low.numel() <= CHUNK:
        yield None
        return
    rows = max(1, CHUNK // low[0].numel())
    blocks = {stored.block for stored in moments if stored.codec == "int8" and stored.axis == 0}
    for block in blocks:
        rows = -(-rows // block) * block
    for start in range(0, low.shape[0], rows):
        yield slice(start, min(start + rows, low.shape[0]))


def _rule_step(
    low: Tensor,
    finite: Tensor | bool,
    views: Mapping[str, Mapping[str, Tensor]],
    moments: list[Stored],
    group: Group,
    rule: Rule,
    step: int,
    lr: Any,
    streams: Iterator[int],
    real: torch.dtype,
) -> Tensor:
    """decode -> rule -> encode on some rows: the elementwise region. Returns the update of these rows."""
    low = low.to(real)
    if finite is False:
        return torch.zeros_like(low)
    values = {stored.name: stored.decode(views[stored.name]) for stored in moments}
    before: Moments = {}
    if finite is not True:
        low = torch.where(finite, low, 0.0)
        before = {name: value.clone() for name, value in values.items()}
    update = rule.update(-low if group["maximize"] else low, values, group, step, lr)
    if finite is not True:
        update = torch.where(finite, update, 0.0)
        values = {name: torch.where(finite, value, before[name]) for name, value in values.items()}
    for stored in moments:
        stored.encode(views[stored.name], values[stored.name], next(streams))
    return update


def _recover(weight: Tensor, update: Tensor, state: State, plan: Layout, group: Group, shrink: float, seed: int | None) -> None:
    """W <- shrink W - project_back(update); a weight that is no matrix in memory (channels last) goes through a copy."""
    bases = _bases(state, plan, group)
    if _is_matrix(weight):
        project_back(weight.view(plan.matrix), update, bases, shrink, seed)
        return
    matrix = weight.reshape(plan.matrix)
    project_back(matrix, update, bases, shrink, seed)
    weight.copy_(matrix.view(weight.shape))


def _is_matrix(weight: Tensor) -> bool:
    """Whether the axes after the first can be flattened without a copy."""
    inner = zip(weight.stride()[1:-1], weight.stride()[2:], weight.shape[2:], strict=True)
    return all(outer == stride * size for outer, stride, size in inner)


def _apply_base(weight: Tensor, low: Tensor, state: State, group: Group, rule: BaseRule, plan: Layout) -> None:
    """Run the torch.optim class: on the weight itself, or on its coordinates x = basis^T W and back by W += scale * basis dx.

    A gradient that is not finite counts as zero here, for the class keeps its own books.
    """
    moments = {key: state[key] for key in rule.spec(plan.low_shape, plan.real)} if state["step"] else None
    if plan.rank is None:
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        return
    x = _project(weight.reshape(plan.matrix), _bases(state, plan, group)).to(plan.real)
    before = x.clone()
    shrink = 1.0
    if rule.decouples(group) and group["weight_decay"]:
        shrink = _foldable(1 - group["lr"] * group["weight_decay"], weight)
        group = {**group, "weight_decay": 0.0}
    state.update(rule.step_(x, low, moments, group))
    rounded = weight.dtype == torch.bfloat16 and group["stochastic_rounding"]
    seed = (state["step"] + 1) * STREAMS if rounded else None
    _recover(weight, before.sub_(x).mul_(group["scale"]), state, plan, group, shrink, seed)
