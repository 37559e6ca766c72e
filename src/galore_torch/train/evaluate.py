"""Held-out loss: the sum over tokens divided by the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from galore_torch.train.loss import TokenLoss, counted

if TYPE_CHECKING:
    from torch import Tensor


def held_out_loss(
    loss: TokenLoss, windows: Iterable[tuple[Tensor, Tensor]], device: str, should_stop: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """(mean cross-entropy in nats, tokens it is over) of (inputs, targets) batches; None where `should_stop` asked to give up."""
    total, tokens = 0.0, 0
    training = loss.training
    loss.eval()
    try:
        with torch.no_grad():
            for inputs, targets in windows:
                if should_stop():
                    return None
                total += loss(inputs.to(device), targets.to(device)).item()
                tokens += counted(targets)
    finally:
        loss.train(training)
    return None if should_stop() else (total / tokens, tokens)
