"""The three questions of every integration: does it train, does it resume exactly, how does it compare with AdamW on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from support.hf_runs import difference, llama, windows

STEPS, WINDOWS = 40, 256  # the last windows of the text are held out
HELD_OUT, SHARE = 400, 0.9  # GaLore's fall of the loss as a share of AdamW's at the same rate, at least


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    tokens = torch.tensor([each["input_ids"] for each in windows(32, first=HELD_OUT)])
    was = model.training
    model.eval()
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    model.train(was)
    return loss


def compare(record: Callable[..., None], feature: str, straight: nn.Module, resumed: nn.Module, adamw: nn.Module, **row: Any) -> None:
    """Assert all three of models trained on the same data, and write the row, with what else is to be in it."""
    apart, loss, other = difference(straight, resumed), held_out_loss(straight), held_out_loss(adamw)
    fall = [held_out_loss(like(straight)) - each for each in (loss, other)]
    assert apart == 0.0
    assert fall[1] > 0.3, "AdamW has not trained"
    assert difference(straight, adamw) > 0.0, "it is AdamW that has trained, and not the optimizer that was asked for"
    assert fall[0] >= SHARE * fall[1], f"the loss fell by {fall[0]:.3f}, AdamW's by {fall[1]:.3f}"
    record(feature, **row, resume=apart, loss=loss, adamw=other)


def like(model: nn.Module) -> Any:
    """The model as every run begins."""
    return llama().to(next(model.parameters()).dtype)
