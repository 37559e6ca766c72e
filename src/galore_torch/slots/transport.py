"""Slot 2: how do moments cross a change of basis? A table of `Transport` rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.ops.linalg import mode_product, squared
from galore_torch.slots.rules import Group, Moment
from galore_torch.slots.subspace import Overlaps, is_set

Values = Mapping[str, Tensor]  # the moments in the old basis, by name


@dataclass(frozen=True)
class Transport:
    """``apply(C, values, moments, group, step)`` yields (name, its value in the new basis) for every moment that changes.

    C: new basis^T old basis (r' x r) for each projected axis; of a set of rows or elements the place of each in the old set (r'), int64,
    -1 where it is new. ``values`` holds all moments of one parameter, each decoded when it is looked up; what is yielded is stored at
    once, so look up what a value depends on before you yield. ``step``: how many steps have made them.
    ``turns``: whether it reads C. ``adam``: whether it is written for Adam's two moments.
    """

    apply: Callable[[Overlaps, Values, Mapping[str, Moment], Group, int], Iterator[tuple[str, Tensor]]]
    turns: bool = False
    adam: bool = False


def keep(C: Overlaps, values: Values, moments: Mapping[str, Moment], group: Group, step: int) -> Iterator[tuple[str, Tensor]]:
    """Leave the numbers where they are, as galore-torch 1.0 does: wrong whenever a basis vector turns or changes its sign."""
    return iter(())


def reset(C: Overlaps, values: Values, moments: Mapping[str, Moment], group: Group, step: int) -> Iterator[tuple[str, Tensor]]:
    """Forget."""
    for name in moments:
        yield name, values[name].new_zeros(values[name].shape)


def rotate(C: Overlaps, values: Values, moments: Mapping[str, Moment], group: Group, step: int) -> Iterator[tuple[str, Tensor]]:
    """Carry the moments over: m' = C m, and v' = (C * C) v + (what C * C has lost of each row) x mean v.

    m = basis^T (mean gradient), so C m is its part in the new basis (GoLore, arXiv 2410.11289; LDAdam, arXiv 2410.16103).
    v holds expected squares; for coordinates without correlation the square of C carries them. A new direction that lies
    outside the old subspace has no history: it is given the mean of the old ones, for a second moment near zero would
    make its first updates 1 / sqrt(1 - beta2) times too large. Every C_ij enters squared, so flipping a basis vector
    changes nothing; C = I is the identity; r = m leaves basis m unchanged. Of a complex basis C * C is |C|^2.
    A tensor's moments are carried along each of its modes. One averaged over an axis (Adafactor's factors) has the others alone.
    Of a set of rows or elements those that stay keep theirs, and new ones have m = 0 and the mean v.
    """
    for name, moment in moments.items():
        value, second = values[name], moment.kind == "second"
        for axis, matrix in C.items():
            if axis == moment.mean_over:
                continue
            if moment.mean_over is not None:  # the axis that is missing keeps its place, with a length of 1
                value = value.unsqueeze(moment.mean_over)
            if is_set(matrix):
                value = _chosen(value, matrix, axis, value.mean(axis, keepdim=True) if second else 0.0)
            else:
                value = mode_product(value, (_spreading(matrix) if second else matrix).to(value.dtype), axis)
            if moment.mean_over is not None:
                value = value.squeeze(moment.mean_over)
        yield name, value


def _spreading(C: Tensor) -> Tensor:
    """C * C, with what a row of it has lost spread over all of the row: the mean is a product with a constant matrix."""
    matrix = squared(C)
    lost = (1 - matrix.sum(-1, keepdim=True)).clamp_min(0)
    return matrix + lost / matrix.shape[-1]


def _chosen(value: Tensor, places: Tensor, axis: int, new: Tensor | float) -> Tensor:
    """The slices of ``value`` along ``axis`` at these places (... x r'), and ``new`` where there is none."""
    behind = places[(..., *[None] * max(0, -1 - axis))]  # one for each dimension after the axis
    there = behind.clamp_min(0)
    if places.dim() == 1:
        kept = value.index_select(axis, there.flatten())
    else:
        kept = value.gather(axis, there.expand(*places.shape, *value.shape[places.dim() :]))
    return torch.where(behind >= 0, kept, torch.as_tensor(new, dtype=kept.dtype, device=kept.device), out=kept)


def predict(C: Overlaps, values: Values, moments: Mapping[str, Moment], group: Group, step: int) -> Iterator[tuple[str, Tensor]]:
    """Carry Adam's moments over as LDAdam does (arXiv 2410.16103, section 3.1): m' = C m, and v' from what they say of mean and variance,
    v' = (1 - beta2^t) |(C * C) (v^ - |m^|^2) + |C m^|^2| with the bias-corrected m^ and v^.

    A new direction outside of the old subspace starts without history: write it with a beta2 such as 0.99.
    """
    if not moments:
        return
    (beta1, beta2), m, v = group["betas"], values["exp_avg"], values["exp_avg_sq"]
    seen = 1 - beta2**step
    mean = squared(m / (1 - beta1**step)).mul_(seen)
    spread, turned = v - mean, m
    for axis, matrix in C.items():
        if is_set(matrix):
            spread, turned = (_chosen(value, matrix, axis, 0.0) for value in (spread, turned))
            continue
        spread = mode_product(spread, squared(matrix).to(v.dtype), axis)
        turned = mode_product(turned, matrix.to(m.dtype), axis)
    yield "exp_avg_sq", spread.add_(squared(turned), alpha=seen / (1 - beta1**step) ** 2).abs_()
    yield "exp_avg", turned


TRANSPORTS = {
    "keep": Transport(keep),
    "reset": Transport(reset),
    "rotate": Transport(rotate, turns=True),
    "predict": Transport(predict, turns=True, adam=True),
}
