"""Doing: one gradient's way through the five slots, one parameter at a time.

    compress   refresh the basis if it is due (projector, transport), then R = project(G)
    apply      decode -> rule -> encode on R in one pass (elementwise), then W <- (1 - lr wd) W - scale * project_back(N)

The engine allocates nothing that lasts (layout.state_spec sizes the state) and waits for no device.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine import fused as elementwise
from galore_torch.engine.layout import AnyRule, Layout, make_layout, state_spec, stored_bases, stored_moments
from galore_torch.engine.refresh import STREAMS, Group, State, refresh, refresh_is_due
from galore_torch.ops import linalg
from galore_torch.ops.int8_weight import Int8Weight
from galore_torch.ops.linalg import finite, readable
from galore_torch.ops.write import fits_gemm, subtract
from galore_torch.slots.recovery import project_back
from galore_torch.slots.rules import Rule
from galore_torch.slots.torch_rule import BaseRule


def layout_of(weight: Tensor, group: Group) -> Layout:
    return make_layout(tuple(weight.shape), weight.dtype, group["rank"], group["proj_type"])


def new_state(weight: Tensor, group: Group, rule: AnyRule, turn: int) -> State:
    """The whole state of one parameter, made at once so that no checkpoint tool has to step to see it.

    ``turn`` numbers the optimizer's parameters: it decides on which step of the gap this one refreshes.
    """
    spec = state_spec(layout_of(weight, group), group, rule)
    return {"step": 0, "index": turn, **{key: tensor.allocate(weight.device) for key, tensor in spec.items()}}


def compress(weight: Tensor, grad: Tensor, state: State, group: Group, rule: AnyRule) -> Tensor:
    """The gradient the rule sees: R = basis^T G (GaLore, arXiv 2403.03507, Alg. 2), in fp32 or fp64; G itself at full rank.

    grad: the weight's shape, any float dtype. Refreshes the basis from this gradient when that is due.
    """
    layout = layout_of(weight, group)
    if layout.rank is None:
        return grad
    if refresh_is_due(state, group):
        refresh(grad.reshape(layout.matrix), state, layout, group, rule)
    return project(grad, state, layout, group)


def project(grad: Tensor, state: State, layout: Layout, group: Group) -> Tensor:
    """basis^T X, X basis or left^T X right in the bases as they are, in fp32 or fp64. A new tensor."""
    low = grad.reshape(layout.matrix)
    for mode, basis in _bases(state, layout, group).items():
        low = linalg.project(low, basis, mode)
    return low.to(layout.compute_dtype)


def apply(weight: Tensor, low: Tensor, state: State, group: Group, rule: AnyRule, reuse_low: bool = False) -> None:
    """One step of the rule on ``low`` (what `compress` returned) and of the weight, in place.

    ``reuse_low``: nobody needs a projected ``low`` afterwards, and the update may take its place.
    A gradient that is not finite is skipped: it changes neither moments nor direction, and the weight only decays.
    """
    layout = layout_of(weight, group)
    if not weight.numel():  # an empty shard
        state["step"] += 1
        return
    is_finite: Tensor | bool = finite(low)  # NaN or Inf in G reaches R, whatever the basis
    if readable(low):
        is_finite = bool(is_finite)
    step = state["step"] + 1
    if isinstance(rule, BaseRule):
        low = low if is_finite is True else torch.where(torch.as_tensor(is_finite, device=low.device), low, 0.0)
        _apply_base(weight, low, state, group, rule, layout)
    else:
        _apply_rule(weight, low, is_finite, state, group, rule, layout, step, reuse_low)
    if isinstance(weight, Int8Weight):
        torch.autograd.graph.increment_version(weight)  # its codes were written, and autograd looks at the weight
    state["step"] = step


def _bases(state: State, layout: Layout, group: Group) -> dict[int, Tensor]:
    return {mode: stored.decode(state) for mode, stored in stored_bases(layout, group["basis_codec"]).items()}


def _apply_rule(
    weight: Tensor,
    low: Tensor,
    is_finite: Tensor | bool,
    state: State,
    group: Group,
    rule: Rule,
    layout: Layout,
    step: int,
    reuse_low: bool,
) -> None:
    lr = rule.lr(weight, group, step)
    decay_factor = 1 - lr * group["weight_decay"] if group["weight_decay"] else 1.0
    scale = group["scale"] if layout.scaled else 1.0
    late = decay_factor if group["decay"] == "after" else 1.0  # decay after the update shrinks the update too
    if layout.rank is None or not isinstance(late, Tensor):
        scale, late = scale * late, 1.0
    seeds, rounded = itertools.count(_first_seed(weight, state, step)), _is_rounded(weight, group)
    region = elementwise.FusedStep(
        rule, tuple(stored for stored, _ in stored_moments(layout, group, rule)), group["maximize"], layout.compute_dtype
    )
    numbers, fuse = rule.numbers(group, step, lr), rule.elementwise and elementwise.fuses(weight, low.numel(), group["compile"])
    if layout.rank is None:
        fuse = fuse and not isinstance(weight, Int8Weight)
        change = elementwise.WeightUpdate(weight, scale, decay_factor, rounded)
        elementwise.step(region, low, is_finite, state, numbers, seeds, fuse, change)
        return
    update = low if reuse_low else torch.empty_like(low)
    elementwise.step(region, low, is_finite, state, numbers, seeds, fuse, update)
    if isinstance(late, Tensor):
        update.mul_(late)
    _recover(weight, update, state, layout, group, scale, _foldable(decay_factor, weight), next(seeds) if rounded else None)


def _is_rounded(weight: Tensor, group: Group) -> bool:
    return group["stochastic_rounding"] and (weight.dtype == torch.bfloat16 or isinstance(weight, Int8Weight))


def _first_seed(weight: Tensor, state: State, step: int) -> int:
    """Where the random streams of this step begin. INT8 is coarse: there each parameter has streams of its own."""
    if not isinstance(weight, Int8Weight):
        return step * STREAMS
    return ((step * 0x9E3779B97F4A7C15 + state["index"] * 0xC2B2AE3D27D4EB4F) >> 13) & 0x7FFFFFFF


def _foldable(decay_factor: Any, weight: Tensor) -> Any:
    """Weight decay as a factor to fold into the update.

    A 0-d tensor cannot go into a GEMM without reading it on the host: it is applied here. Rounded weights have no such GEMM.
    """
    if isinstance(decay_factor, Tensor) and fits_gemm(weight):
        weight.mul_(decay_factor)
        return 1.0
    return decay_factor


def _recover(
    weight: Tensor, update: Tensor, state: State, layout: Layout, group: Group, scale: float, decay_factor: Any, seed: int | None
) -> None:
    """W <- decay_factor W - scale project_back(update); a weight that is no matrix in memory (channels last) goes through a copy."""
    bases = _bases(state, layout, group)
    fuse = not fits_gemm(weight) and elementwise.fuses(weight, weight.numel(), group["compile"])
    write = elementwise.subtract if fuse else subtract
    if _is_matrix(weight):
        matrix = weight if weight.dim() == 2 else weight.view(layout.matrix)
        project_back(matrix, update, bases, scale, decay_factor, seed, write)
        return
    matrix = weight.reshape(layout.matrix)
    project_back(matrix, update, bases, scale, decay_factor, seed, write)
    weight.copy_(matrix.view(weight.shape))


def _is_matrix(weight: Tensor) -> bool:
    """Whether the axes after the first can be flattened without a copy."""
    inner = zip(weight.stride()[1:-1], weight.stride()[2:], weight.shape[2:], strict=True)
    return all(outer == stride * size for outer, stride, size in inner)


def _apply_base(weight: Tensor, low: Tensor, state: State, group: Group, rule: BaseRule, layout: Layout) -> None:
    """Run the torch.optim class: on the weight itself, or on its coordinates x = basis^T W and back by W += scale * basis dx.

    A gradient that is not finite counts as zero here, for the class keeps its own books. A matrix that trains at full rank in a
    group with a rank keeps the group's scale: W <- decay_factor W + scale dW.
    """
    moments = {key: state[key] for key in rule.spec(layout.low_shape, layout.compute_dtype, group)} if state["step"] else None
    if not layout.scaled:
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        return
    x = None if layout.rank is None else project(weight, state, layout, group)
    decay_factor, decay = 1.0, group["weight_decay"]
    if rule.decouples(group) and decay:
        decay_factor = _foldable(1 - group["lr"] * decay, weight)
        group = {**group, "weight_decay": 0.0}
    if x is None:
        start = weight.clone()
        state.update(rule.step_(weight, low.to(weight.dtype), moments, group))
        if group["scale"] != 1 or group["weight_decay"] != decay:
            weight.mul_(group["scale"]).add_(start * (decay_factor - group["scale"]))
        return
    before = x.clone()
    state.update(rule.step_(x, low, moments, group))
    seed = _first_seed(weight, state, state["step"] + 1) if _is_rounded(weight, group) else None
    _recover(weight, before.sub_(x), state, layout, group, group["scale"], decay_factor, seed)
