"""Which parameters of a model train: all but those that --freeze names, or under LoRA the head that a task has brought."""

from __future__ import annotations

import re

from torch import nn

from galore_torch.train.errors import UserError


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """No gradient for the parameters in whose names a pattern is found; UserError for one that is found in none."""
    for pattern in patterns:
        try:
            chosen = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"--freeze {pattern!r} is no regular expression: {error}") from error
        if not chosen:
            sample = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise UserError(f"--freeze {pattern!r} matches no parameter, such as {sample}")
        for p in chosen:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train; freeze less")


def new_head(model: nn.Module) -> nn.Module:
    """What a classifier has beside the model that it is made of: its head. An empty module where there is none, as in a language model."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    if body is model or getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return nn.ModuleList()
    return nn.ModuleList(child for child in model.children() if id(child) not in inside)
