"""The whole step of one parameter in one pass over G, W and the moments, for projectors that have one. The plain road is its oracle.

The projector's row says what does it on a kind of device. Of means, where that has nothing, what Inductor makes of `means_pass`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.fused import fuses, lift
from galore_torch.engine.in_full import close, is_coded, opened
from galore_torch.engine.inductor import call
from galore_torch.engine.layout import ParamView
from galore_torch.engine.refresh import STREAMS
from galore_torch.engine.whole_rules import rms_of
from galore_torch.ops import native, write
from galore_torch.ops.linalg import finite, readable
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import RULES, Rule


def in_one_pass(view: ParamView, grad: Tensor) -> bool:
    """Do the step, or say that the plain road has to: False, and nothing was changed.

    It does it where the group lets a step be compiled. grad: the layout's view; its basis is the one that this step uses.
    """
    weight, state, group, layout, rule = view.weight, view.state, view.group, view.layout, view.rule
    take, residual = view.projector.adam.get(weight.device.type), RECOVERIES[group["recovery"]].residual
    if take is None or residual is None or rule != RULES["adam"] or not weight.numel():
        return False
    if group["carry"] or isinstance(group["lr"], Tensor):
        return False
    if group["scale_parameter"] and (layout.cuts or not readable(weight)):  # processes that share a weight go one way, and sum once
        return False
    if not (weight.is_contiguous() and grad.is_contiguous() and write.is_plain(weight)):
        return False
    if is_coded(view) and not _decodes(view, grad, residual):
        return False
    if not fuses(weight, weight.numel(), group, state["step"]):
        return False
    assert isinstance(rule, Rule)
    step = state["step"] + 1
    rate = float(rule.lr(partial(rms_of, view), group, step))
    lr, *new, eps = rule.numbers(group, step, rate)
    decay_factor = 1 - rate * group["weight_decay"]
    late = decay_factor if group["decay"] == "after" else 1.0
    numbers = (*new, lr * group["scale"] * late, eps, decay_factor, -1.0 if group["maximize"] else 1.0)
    matrix = weight if weight.shape == layout.view else weight.view(layout.view)
    full = opened(view, fuse=True)
    moments = (full.state["exp_avg"], full.state["exp_avg_sq"])
    basis = (state[key] for stored in layout.bases.values() for key in stored.keys)
    seed = step * STREAMS + len(moments) if group["stochastic_rounding"] and write.can_round(weight) else None
    is_finite = take(matrix, grad, (*moments, *basis), native.AdamStep(numbers, residual, seed, rate * late))
    if is_finite is None and view.projector.averages and residual != native.SIGNS and weight.dtype == grad.dtype == torch.float32:
        is_finite = _compiled(matrix, grad, moments, numbers, residual)
    if is_finite is None:
        return False
    if not is_finite:
        write.decay(weight, decay_factor)
    elif full is not view:
        close(view, full, True if readable(grad) else finite(grad), step * STREAMS, fuse=True)
    torch.autograd.graph.increment_version(weight)  # neither a pointer nor a compiled pass tells autograd, which looks at the weight
    state["step"] = step
    return True


def _decodes(view: ParamView, grad: Tensor, residual: int) -> bool:
    """Whether there is a pass for which coded moments are decoded, and it pays: not for rows alone, which are one compiled region anyway.

    Of rows the host has to know whether they were finite.
    """
    if not view.weight.dtype == grad.dtype == torch.float32:
        return False
    if view.projector.averages:
        return residual != native.SIGNS
    return residual == native.SIGNS and readable(grad) and not view.layout.batch and native.library() is not None


def _compiled(weight: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], numbers: tuple[float, ...], residual: int) -> bool:
    """`means_pass`, compiled. Whether the gradient is finite, where the host may look; else True, and the pass itself sees to it."""
    is_finite = finite(grad)
    if readable(grad) and not bool(is_finite):
        return False
    mask = None if readable(grad) else is_finite
    call(means_pass, residual, weight, grad, moments, (*lift(numbers, torch.float32), mask))
    return True


def means_pass(residual: int, weight: Tensor, grad: Tensor, moments: Any, numbers: Any) -> None:
    """One step of Adam on the means of neighbours, in place; ``residual``: what of G is used beside them, as `AdamStep` says.

    weight, grad (... x m x n), moments m and v (... x r x c). numbers: those of `AdamStep`, and whether G is finite, 0-d, or
    None where it is.
    """
    new1, new2, size, eps, decay, sign, is_finite = numbers
    rows, columns = moments[0].shape[-2:]

    def blocks(tensor: Tensor) -> Tensor:
        """(... x r x tall x c x wide); a mean is a block of one element."""
        return tensor.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))

    G, W, (m, v) = blocks(grad) * sign, blocks(weight), (blocks(each) for each in moments)
    mean = G.mean((-3, -1), keepdim=True)
    rest = G - mean if residual else torch.zeros_like(mean)
    own, shared = (rest.square(), 0.0) if residual == 1 else (0.0, rest.square().mean((-3, -1), keepdim=True))
    new_m, new_v = m + new1 * (mean - m), v + new2 * (mean.square() + shared - v)
    update = size * (new_m + rest) / ((new_v + own).sqrt() + eps)
    if is_finite is not None:
        new_m, new_v, update = torch.where(is_finite, new_m, m), torch.where(is_finite, new_v, v), torch.where(is_finite, update, 0.0)
    m.copy_(new_m)
    v.copy_(new_v)
    W.copy_(decay * W - update)
