"""Optim: Adam's beta2 from tokens, which stays right when the batch changes. Imports no torch."""

from __future__ import annotations

import math


def beta2_of_half_life(tokens_per_step: float, half_life: float = 1e7) -> float:
    """The beta2 at which a squared gradient's weight has halved after ``half_life`` tokens (arXiv 2507.07101, section 3.2).

    tokens_per_step: of all processes and micro-batches of one update. A run tuned at 0.999 and 16,384 tokens a step has a half-life of 11.4
    million: at 1,024 tokens it wants 0.99994, at half a million 0.969.

    Raises ValueError for numbers that are not above 0.
    """
    for name, value in (("tokens_per_step", tokens_per_step), ("half_life", half_life)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is no number of tokens: give one above 0, such as 16384")
    return float(0.5 ** (tokens_per_step / half_life))
