"""Gradients that leave the old subspace: the loss falls as with a projector that starts anew each time. Oracle: `rsvd`."""

from __future__ import annotations

import pytest
import torch

from galore_torch import GaLoreAdamW


def second_task(projector: str, rank: int) -> tuple[float, float]:
    """Loss of the last 20 outputs of a head before and after it learns them, having learnt the first 20."""
    torch.manual_seed(0)
    head = torch.nn.Linear(96, 40, bias=False)
    X = torch.randn(256, 96)
    Y = X @ torch.randn(96, 40) / 10
    group = {"params": [head.weight], "rank": rank, "update_proj_gap": 5, "scale": 1.0, "projector": projector}
    optimizer = GaLoreAdamW([group], lr=2e-2, compile=False)
    losses = []
    for task, steps in ((slice(0, 20), 60), (slice(20, 40), 200)):
        losses.append((head(X) - Y)[:, 20:].square().mean().item())
        for _ in range(steps):
            optimizer.zero_grad()
            (head(X) - Y)[:, task].square().mean().backward()
            optimizer.step()
    return losses[1], (head(X) - Y)[:, 20:].square().mean().item()


@pytest.mark.parametrize("rank", [1, 4, 7, 8, 16])
def test_power_learns_the_second_task_as_rsvd_does(rank: int) -> None:
    (start, power), (_, rsvd) = (second_task(projector, rank) for projector in ("power", "rsvd"))
    assert rsvd < 0.5 * start
    assert power < 1.25 * rsvd + 0.02 * start
