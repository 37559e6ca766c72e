"""Two optimizers that keep nothing of a matrix, as their papers have them: what every byte of state has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDS = 5  # of SinkGD's normalisations


def sinkgd(gradient: Tensor) -> Tensor:
    """Rows and columns normalised in turn, each to a root mean square of 1 (SinkGD, arXiv 2502.06742, alg. 1)."""
    for _ in range(ROUNDS):
        for dim in (1, 0):
            gradient = gradient / _rms(gradient, dim)
    return gradient


def scale(gradient: Tensor) -> Tensor:
    """The weights of each output normalised to a root mean square of 1 (SCALE, arXiv 2506.16659, sec. 3); its head has momentum."""
    return gradient / _rms(gradient, 1)


class Stateless(torch.optim.Optimizer):
    """W <- W - lr direction(G); ``relative``: times max(0.001, RMS(W)), which is in neither paper."""

    def __init__(self, params: Any, lr: float, direction: Any, relative: bool = False):
        super().__init__(params, {"lr": lr, "direction": direction, "relative": relative})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                size = max(1e-3, float(p.square().mean().sqrt())) if group["relative"] else 1.0
                p.sub_(group["direction"](p.grad), alpha=group["lr"] * size)


def _rms(gradient: Tensor, dim: int) -> Tensor:
    return gradient.square().mean(dim, keepdim=True).sqrt().clamp_min(1e-12)
