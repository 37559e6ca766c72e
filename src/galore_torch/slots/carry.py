"""Slot 5: what is remembered of what was dropped? A table of `Carry` rows; None remembers nothing.

A row reads the full gradient, so it cannot work where that is not kept (`engine.recipe.check_kept`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.ops.codecs import StoredTensor
from galore_torch.ops.write import WeightUpdate


@dataclass(frozen=True)
class Carry:
    """``state_spec(view, dtype of the weight, compute_dtype)``: how what is remembered, of the parameter's view, is stored.

    ``add(G, remembered)``: the gradient that the step sees, a new tensor. ``keep(G, R, project_back)``: what to remember after it; G, that
    gradient, is used up. ``project_back(change, R)`` takes R, in full size, from a tensor.
    """

    state_spec: Callable[[tuple[int, ...], torch.dtype, torch.dtype], StoredTensor]
    add: Callable[[Tensor, Tensor], Tensor]
    keep: Callable[[Tensor, Tensor, Callable[[WeightUpdate, Tensor], None]], Tensor]


def error_spec(view: tuple[int, ...], dtype: torch.dtype, compute_dtype: torch.dtype) -> StoredTensor:
    """As large as the weight, in 16 bits where the weight is."""
    return StoredTensor("error", view, "bf16" if dtype.itemsize == 2 else "fp32", compute_dtype=compute_dtype)


def add_error(G: Tensor, error: Tensor) -> Tensor:
    """A = G + e."""
    return error + G


def keep_error(A: Tensor, R: Tensor, project_back: Callable[[WeightUpdate, Tensor], None]) -> Tensor:
    """e = A - P P^T A: what the projection dropped is added to the next gradient (error feedback; LDAdam, arXiv 2410.16103, Alg. 1).

    LDAdam adds what its moments lose at a change of basis too; here that is the transport's part.
    """
    project_back(WeightUpdate(A), R)
    return A


CARRIES: dict[str | None, Carry | None] = {None: None, "error_feedback": Carry(error_spec, add_error, keep_error)}
