"""Held-out loss: the sum over tokens divided by the number of tokens; and the published script's figure, which is another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from galore_torch.train.model.heads import LabelLoss
from galore_torch.train.model.loss import TokenLoss, counted

if TYPE_CHECKING:
    from torch import Tensor

    Batches = Iterable[tuple[Any, Tensor]]  # (inputs, targets)


def held_out_loss(
    loss: TokenLoss, windows: Batches, device: str, should_stop: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """(mean cross-entropy in nats, tokens it is over) of (inputs, targets) batches; None where `should_stop` asked to give up."""
    found = _each_batch(loss, windows, device, should_stop, training=False)
    if found is None:
        return None
    tokens = sum(count for _, count in found)
    return sum(total for total, _ in found) / tokens, tokens


def held_out_answers(
    loss: LabelLoss, batches: Batches, device: str, should_stop: Callable[[], bool] = lambda: False
) -> tuple[float, Tensor, Tensor] | None:
    """(mean loss, what the model answers (N,), the right answers (N,)), on the CPU; None where `should_stop` asked to give up."""
    total, predicted, answers = 0.0, [], []
    was_training = loss.training
    loss.eval()
    try:
        with torch.no_grad():
            for inputs, targets in batches:
                if should_stop():
                    return None
                logits = loss(inputs.to(device)).cpu()
                total += loss.of_logits(logits, targets).item()
                predicted.append(logits[:, 0] if loss.regression else logits.argmax(1))
                answers.append(targets)
    finally:
        loss.train(was_training)
    return None if should_stop() else (total / sum(map(len, answers)), torch.cat(predicted), torch.cat(answers))


def published_loss(
    loss: TokenLoss, windows: Batches, device: str, should_stop: Callable[[], bool] = lambda: False, *, last: bool
) -> float | None:
    """The figure that the published pre-training script calls eval loss, for comparisons with it alone; None as above.

    The mean over batches of each one's mean, whatever it holds, divided by one batch more than there were: too low by a share of
    1 / (batches + 1). All but the run's `last` evaluation leave the model in training mode: dropout acts, where there is any (a
    LLaMA has none, LoRA's adapters have). Its random numbers are not the run's: what is trained stays the same to the bit.
    """
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        found = _each_batch(loss, windows, device, should_stop, training=not last)
    return None if found is None else sum(total / count for total, count in found) / (len(found) + 1)


def _each_batch(
    loss: TokenLoss, windows: Batches, device: str, should_stop: Callable[[], bool], *, training: bool
) -> list[tuple[float, int]] | None:
    """(sum of losses, tokens) of each batch."""
    found = []
    was_training = loss.training
    loss.train(training)
    try:
        with torch.no_grad():
            for inputs, targets in windows:
                if should_stop():
                    return None
                total, count = loss(inputs.to(device), targets.to(device)).item(), counted(targets)
                if count:  # else a forward pass for the others' sake
                    found.append((total, count))
    finally:
        loss.train(was_training)
    return None if should_stop() else found
