"""Slots: what the inner optimizer does with a gradient. Tensors in, tensors out; nothing here knows about subspaces.

A rule names its moments, moves them in place, and answers with an update that already carries the learning rate: the weight
moves by minus the update. Arithmetic is in the dtype of the gradient given: fp32 or fp64, real or complex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from galore_torch.ops.linalg import as_real, squared

Group = Mapping[str, Any]  # a parameter group: hyperparameters by name
Moments = dict[str, Tensor]
Numbers = tuple[Any, ...]  # floats or 0-d tensors
Rms = Callable[[], Tensor]  # the root mean square of the weight, 0-d, in fp32 or fp64


@dataclass(frozen=True)
class Moment:
    """One running average of a gradient R (... x rows x columns).

    ``kind``: how it crosses a change of basis: "first" moves like R, "second" like |R|^2 and is real, "other" not at all.
    ``mean_over``: the axis of R that is averaged away (-1 or -2), or None when the moment has R's shape.
    """

    kind: Literal["first", "second", "other"]
    mean_over: int | None = None
    fill: float = 0.0

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        if self.mean_over is None:
            return full
        return full[:-1] if self.mean_over == -1 else full[:-2] + full[-1:]


SMALLEST = 1e-3  # the root mean square that a smaller weight is taken for, as Adafactor's own


def step_size(rms: Rms, group: Group, step: int) -> Any:
    """The group's own; with ``scale_parameter`` a 0-d tensor that follows the weight."""
    return by_weight(group["lr"], rms, SMALLEST) if group["scale_parameter"] else group["lr"]


def by_weight(lr: Any, rms: Rms, least: float) -> Tensor:
    """lr max(least, RMS(W)), 0-d: the step of Adafactor (Shazeer & Stern, arXiv 1804.04235, section 8), relative to the weight."""
    size = rms().nan_to_num(0.0, posinf=0.0)  # one weight that is not finite, or too large to square, must not take the others with it
    relative: Tensor = size.clamp_min(least) * (lr.reshape(()) if isinstance(lr, Tensor) else lr)
    return relative


@dataclass(frozen=True)
class Rule:
    """``moments(shape of R, group)`` names the state; ``update(R, moments, numbers(group, step, lr))`` is one step, from step 1.

    ``update`` changes the moments in place, leaves R as it is, and returns a new tensor of R's shape. ``numbers`` is everything
    else it depends on: floats or 0-d tensors, computed on the host, so that a compiled update serves every step and schedule.
    ``elementwise``: every element moves by itself, so the engine may hand over a few rows at a time, or compile the update.
    ``lr(rms, group, step)`` is the step size: a float, or a 0-d tensor where it follows the weight, whose root mean square is ``rms()``.
    ``blend(group)``: (first moment, a, b), where the moment becomes a moment + b R; None: there is no such moment.
    ``recovery``: the one recovery that it is written for, which no other rule has; None: all others.
    ``coarse``: whether four bits hold its moments well enough; a codec of so few stores those of ``rest`` in eight.
    ``rest``: the rule of parameters that are not projected; None: this one.
    """

    moments: Callable[[tuple[int, ...], Group], dict[str, Moment]]
    numbers: Callable[[Group, int, Any], Numbers]
    update: Callable[[Tensor, Moments, Numbers], Tensor]
    elementwise: bool = True
    lr: Callable[[Rms, Group, int], Any] = step_size
    blend: Callable[[Group], tuple[str, float, float]] | None = None
    recovery: str | None = None
    coarse: bool = False
    rest: Rule | None = None


ADAM = {"exp_avg": Moment("first"), "exp_avg_sq": Moment("second")}


def adam_moments(shape: tuple[int, ...], group: Group) -> dict[str, Moment]:
    return ADAM


def adam_numbers(group: Group, step: int, lr: Any) -> Numbers:
    beta1, beta2 = group["betas"]
    if group["correct_bias"]:
        lr = lr * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
    return lr, 1 - beta1, 1 - beta2, group["eps"]


def adam(R: Tensor, moments: Moments, numbers: Numbers) -> Tensor:
    """Adam (Kingma & Ba, arXiv 1412.6980, Alg. 1, in the form of section 2 that moves the bias corrections into the step size).

    R: any shape; moments of R's shape. eps is added to the root of the uncorrected second moment, as galore-torch 1.0 does.
    Of a complex R the second moment is that of |R|^2, one real number: no step depends on the phase that a basis happens to have.
    """
    lr, new1, new2, eps = numbers
    m = moments["exp_avg"].lerp_(R, new1)
    v = moments["exp_avg_sq"].lerp_(squared(R), new2)
    return divided(m, v.sqrt().add_(eps)).mul_(lr)


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, a new tensor; the denominator is real, and used up. torch would divide complex numbers as such."""
    if numerator.is_complex():
        return numerator * denominator.reciprocal_()
    return torch.div(numerator, denominator, out=denominator)


def adafactor_moments(shape: tuple[int, ...], group: Group) -> dict[str, Moment]:
    factored = {"exp_avg_sq_row": Moment("second", -1), "exp_avg_sq_col": Moment("second", -2)}
    names = factored if len(shape) >= 2 else {"exp_avg_sq": Moment("second")}
    return names if group["beta1"] is None else {**names, "exp_avg": Moment("first")}


def adafactor_numbers(group: Group, step: int, lr: Any) -> Numbers:
    fresh = step ** group["decay_rate"]  # 1 - beta2 of eq. 33
    return lr, fresh, group["eps"][0], group["clip_threshold"], 1 - (group["beta1"] or 0.0)


def adafactor(R: Tensor, moments: Moments, numbers: Numbers) -> Tensor:
    """Adafactor (Shazeer & Stern, arXiv 1804.04235, Alg. 4 for matrices, Alg. 5 for vectors). ``lr``: see `adafactor_lr`.

    The second moment of a matrix is the outer product of its row and column means; the update is clipped by its root mean
    square. A first moment, when asked for, averages updates (learning rate included), as transformers does.
    """
    lr, fresh, eps, clip_threshold, new1 = numbers
    square = squared(R).add_(eps)
    if "exp_avg_sq" in moments:
        update = R * moments["exp_avg_sq"].lerp_(square, fresh).rsqrt()
    else:
        row = moments["exp_avg_sq_row"].lerp_(square.mean(-1), fresh)
        col = moments["exp_avg_sq_col"].lerp_(square.mean(-2), fresh)
        del square  # full size: gone before the update is made
        update = R * (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        update.mul_(col.rsqrt().unsqueeze(-2))
    rms = torch.linalg.vector_norm(as_real(update)) / math.sqrt(update.numel())
    update.mul_(lr / (rms / clip_threshold).clamp_(min=1.0))
    if "exp_avg" in moments:
        update = moments["exp_avg"].lerp_(update, new1).clone()
    return update


def adafactor_lr(rms: Rms, group: Group, step: int) -> Any:
    """The step size of Adafactor (arXiv 1804.04235, sections 8 and 9.2): a float, or a 0-d tensor when it follows the weight."""
    lr = group["lr"]
    if group["relative_step"]:
        lr = min(1e-6 * step if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(step))
    return by_weight(lr, rms, group["eps"][1]) if group["scale_parameter"] else lr


def adagrad_moments(shape: tuple[int, ...], group: Group) -> dict[str, Moment]:
    return {"sum": Moment("second", fill=group["initial_accumulator_value"])}


def adagrad_numbers(group: Group, step: int, lr: Any) -> Numbers:
    return lr / (1 + (step - 1) * group["lr_decay"]), group["eps"]


def adagrad(R: Tensor, moments: Moments, numbers: Numbers) -> Tensor:
    """Adagrad (Duchi et al., JMLR 12, 2011, eq. 1, diagonal form), with torch's ``lr_decay``."""
    lr, eps = numbers
    total = moments["sum"].add_(squared(R))
    return divided(R, total.sqrt().add_(eps)).mul_(lr)


def momentum_moments(shape: tuple[int, ...], group: Group) -> dict[str, Moment]:
    return {"momentum_buffer": Moment("first")} if group["momentum"] else {}


def momentum_numbers(group: Group, step: int, lr: Any) -> Numbers:
    """Of the buffer's memory, of R in the buffer, and of R and the buffer in the update."""
    mu, kept = group["momentum"], 1 - (group["dampening"] if step > 1 else 0.0)
    return (mu, kept, lr, lr * mu) if group["nesterov"] or not mu else (mu, kept, lr * 0.0, lr)


def momentum(R: Tensor, moments: Moments, numbers: Numbers) -> Tensor:
    """SGD with momentum, as torch.optim.SGD: buffer = mu buffer + (1 - dampening) R, undamped at the first step."""
    mu, kept, direct, buffered = numbers
    if not moments:
        return R * direct
    buffer = moments["momentum_buffer"].mul_(mu).add_(R * kept)
    return (R * direct).add_(buffer * buffered)


def muon_moments(shape: tuple[int, ...], group: Group) -> dict[str, Moment]:
    return {"momentum_buffer": Moment("first")}


def muon_numbers(group: Group, step: int, lr: Any) -> Numbers:
    """Of `momentum`: M <- R + mu M, and the update is R + mu M, Nesterov's (Jordan et al., 2024)."""
    mu = group["momentum"]
    return mu, 1.0, lr, lr * mu


def averaged(group: Group) -> tuple[str, float, float]:
    """m <- beta1 m + (1 - beta1) R."""
    return "exp_avg", group["betas"][0], 1 - group["betas"][0]


def summed(group: Group) -> tuple[str, float, float]:
    """M <- mu M + (1 - dampening) R."""
    return "momentum_buffer", group["momentum"], 1 - group.get("dampening", 0.0)


RULES = {
    "adam": Rule(adam_moments, adam_numbers, adam, blend=averaged),
    "adafactor": Rule(adafactor_moments, adafactor_numbers, adafactor, elementwise=False, lr=adafactor_lr),
    "adagrad": Rule(adagrad_moments, adagrad_numbers, adagrad),
    "momentum": Rule(momentum_moments, momentum_numbers, momentum, blend=summed),
}
RULES["muon"] = Rule(muon_moments, muon_numbers, momentum, blend=summed, recovery="orthogonal", coarse=True, rest=RULES["adam"])
