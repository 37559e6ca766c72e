"""Slot 5: what is remembered of what was dropped? A table of `Carry` rows; None remembers nothing.

A row reads the full gradient, so it cannot work where that is not kept (`engine.recipe.check_kept`). What it remembers has the weight's
shape and is stored by the group's ``carry_codec`` (`engine.stored.stored_error`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from galore_torch.ops.write import WeightUpdate


@dataclass(frozen=True)
class Carry:
    """``add(G, remembered)``: the gradient that the step sees, a new tensor. ``keep(G, R, project_back)``: what to remember after it; G,
    that gradient, is used up. ``project_back(change, R)`` takes R, in full size, from a tensor.

    ``momentum``: whether what the first moment M <- a M + b R loses at a change of basis is remembered too, a / b (P M - P' M'): as a part
    of the gradient it adds to all later updates what the lost part of M would have added.
    """

    add: Callable[[Tensor, Tensor], Tensor]
    keep: Callable[[Tensor, Tensor, Callable[[WeightUpdate, Tensor], None]], Tensor]
    momentum: bool = False


def add_error(G: Tensor, error: Tensor) -> Tensor:
    """A = G + e."""
    return error + G


def keep_error(A: Tensor, R: Tensor, project_back: Callable[[WeightUpdate, Tensor], None]) -> Tensor:
    """e = A - P P^T A: what the projection dropped is added to the next gradient (error feedback; LDAdam, arXiv 2410.16103, Alg. 1)."""
    project_back(WeightUpdate(A), R)
    return A


CARRIES: dict[str | None, Carry | None] = {
    None: None,
    "error_feedback": Carry(add_error, keep_error),
    "momentum_feedback": Carry(add_error, keep_error, momentum=True),
}
