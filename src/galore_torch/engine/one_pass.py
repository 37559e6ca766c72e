"""The whole step of one parameter in one native pass over G, W and the moments, for rows that have one. The plain road is its oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_torch.engine.fused import fuses
from galore_torch.engine.layout import ParamView
from galore_torch.ops import write
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import RULES, Rule


def in_one_pass(view: ParamView, grad: Tensor) -> bool:
    """Do the step, or say that the plain road has to: False, and nothing was changed.

    It does it for fp32 on the CPU where the group lets a step be compiled. grad: the weight's shape.
    """
    weight, state, group, layout, rule = view.weight, view.state, view.group, view.layout, view.rule
    native, reads = view.projector.adam, RECOVERIES[group["recovery"]].reads
    residual = "moments" in reads
    if native is None or rule is not RULES["adam"] or (reads and not residual):
        return False
    if group["carry"] or group["state_codec"] != "fp32" or isinstance(group["lr"], Tensor):
        return False
    if not all(tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (weight, grad)):
        return False
    if len(layout.ranks) != 1 or not write.is_plain(weight) or not fuses(weight, weight.numel(), group, state["step"]):
        return False
    assert isinstance(rule, Rule)
    step = state["step"] + 1
    lr, *new, eps = rule.numbers(group, step, rule.lr(weight, group, step))
    decay_factor = 1 - group["lr"] * group["weight_decay"]
    late = decay_factor if group["decay"] == "after" else 1.0
    numbers = (*new, lr * group["scale"] * late, eps, decay_factor, -1.0 if group["maximize"] else 1.0)
    moments = (state["exp_avg"], state["exp_avg_sq"])
    is_finite = native(weight.view(layout.view), grad.view(layout.view), moments, numbers, residual)
    if is_finite is None:
        return False
    if not is_finite:
        write.decay(weight, decay_factor)
    state["step"] = step
    return True
