"""How a weight is written: plain, rounded to 16 bits, or INT8. Which of them it is, is asked here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from galore_torch.ops.codecs import Seed, stochastic_round
from galore_torch.ops.int8_weight import Int8Weight, move


def fits_gemm(weight: Tensor) -> bool:
    """Whether a product may be added into the weight as it lies in memory: not where the result has to be rounded."""
    return weight.dtype.itemsize > 2 and not isinstance(weight, Int8Weight)


def subtract(weight: Tensor, update: Tensor, scale: Any, decay_factor: Any, seed: Seed | None) -> None:
    """W <- decay_factor W - scale update, elementwise and in place. Any shape; update in any float dtype, and used up.

    ``scale`` and ``decay_factor`` are floats or 0-d tensors.
    """
    if isinstance(weight, Int8Weight):
        move(*weight.stored, update, scale, decay_factor, seed)
        return
    if fits_gemm(weight):
        if isinstance(decay_factor, Tensor) or decay_factor != 1.0:
            weight.mul_(decay_factor)
        weight.sub_(update.mul_(scale))
        return
    new = weight.float().mul_(decay_factor).sub_(update.float().mul_(scale))
    weight.copy_(new if seed is None else stochastic_round(new, seed))
