"""Muon for the matrices of attention and MLP layers, AdamW for the rest, behind one optimizer's methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from galore_torch.optim.param_groups import chosen_weights
from galore_torch.train.errors import UserError


class CombinedOptimizer:
    """Several optimizers as one: `param_groups` are theirs, so that setting a learning rate there reaches them."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer's: parameters are numbered through all parts."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part, first in self._numbered():
            saved = part.state_dict()
            state |= {first + index: value for index, value in saved["state"].items()}
            groups += [{**group, "params": [first + index for index in group["params"]]} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        for part, first in self._numbered():
            mine = [groups.pop(0) for _ in part.param_groups]
            indices = {index for group in mine for index in group["params"]}
            state = {index - first: value for index, value in state_dict["state"].items() if index in indices}
            own = [{**group, "params": [index - first for index in group["params"]]} for group in mine]
            part.load_state_dict({"state": state, "param_groups": own})

    def _numbered(self) -> Iterator[tuple[torch.optim.Optimizer, int]]:
        """Each part with the number of its first parameter."""
        first = 0
        for part in self.parts:
            yield part, first
            first += sum(len(group["params"]) for group in part.param_groups)


def muon_with_adamw(model: nn.Module, settings: Mapping[str, Any], *, lr: float, weight_decay: float) -> CombinedOptimizer:
    """torch.optim.Muon where `galore_param_groups` would project, torch.optim.AdamW elsewhere, at one learning rate.

    Muon's step is scaled to the size of AdamW's (Liu et al., arXiv 2502.16982, section 2.2), so that one rate suits both.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch.optim.Muon, which came with torch 2.9; this is torch {torch.__version__}")
    chosen = chosen_weights(model)
    matrices = {weight.parameter: None for weight in chosen}  # in order, and a shared one once
    if experts := [weight.name for weight in chosen if weight.parameter.dim() > 2]:
        raise UserError(
            f"--optimizer muon takes matrices; {len(experts)} weights of this model are stacks of them (such as {experts[0]}), which "
            "torch.optim.Muon refuses: choose galore_adamw or adamw"
        )
    rest = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        *([torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)] if rest else []),
    ]
    return CombinedOptimizer(parts)
