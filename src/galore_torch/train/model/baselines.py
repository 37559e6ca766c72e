"""The baselines of the GaLore paper's table 2: low_rank, lora and relora. Each changes a model's layers, then takes torch's AdamW.

Attention and MLP matrices change; embeddings, head and norms train in full, as in the paper. In fine-tuning LoRA trains its adapters
and the new head alone, as its own paper does (arXiv 2106.09685, section 5). LoRA is the package peft's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.optim.param_groups import chosen_weights
from galore_torch.train.errors import UserError
from galore_torch.train.model.freeze import new_head

LORA_ALPHA, LORA_DROPOUT = 32, 0.05  # arXiv 2403.03507, section 5.1
_INIT_STD = 0.02  # of a LLaMA's weights


class LowRankLinear(nn.Module):
    """A linear layer whose weight is the product up (m, r) @ down (r, n), both learnt."""

    def __init__(self, dense: nn.Linear, rank: int):
        super().__init__()
        m, n = dense.weight.shape
        # Both of deviation s: an element of the product is a sum of r products, of deviation sqrt(r) s^2.
        std = (_INIT_STD / rank**0.5) ** 0.5
        self.up = nn.Parameter(std * torch.randn(m, rank).to(dense.weight))
        self.down = nn.Parameter(std * torch.randn(rank, n).to(dense.weight))
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x @ self.down.T, self.up, self.bias)

    def dense(self) -> nn.Linear:
        """An ordinary layer with the same weight."""
        layer = nn.Linear(self.down.shape[1], self.up.shape[0], bias=self.bias is not None, device=self.up.device, dtype=self.up.dtype)
        layer.weight = nn.Parameter((self.up @ self.down).detach())
        layer.bias = self.bias
        return layer


def low_rank(model: nn.Module, settings: Mapping[str, Any], **adamw: Any) -> torch.optim.Optimizer:
    """Every attention and MLP matrix is a product of two thin ones."""
    for weight in chosen_weights(model):
        assert isinstance(weight.layer, nn.Linear), "a LLaMA from scratch has no other"
        _replace(model, weight.name, LowRankLinear(weight.layer, settings["rank"]))
    return torch.optim.AdamW(_trainable(model), **adamw)


def lora(model: nn.Module, settings: Mapping[str, Any], **adamw: Any) -> torch.optim.Optimizer:
    """Frozen matrices plus learnt adapters (Hu et al., arXiv 2106.09685); with `lora_alone` in the settings, all but a new head freezes."""
    _inject(model, settings["rank"], settings.get("lora_alpha", LORA_ALPHA), settings.get("lora_alone", False))
    return torch.optim.AdamW(_trainable(model), **adamw)


def relora(model: nn.Module, settings: Mapping[str, Any], **adamw: Any) -> torch.optim.Optimizer:
    """LoRA whose adapters are merged into the matrices and begun anew every `cycle_length` steps (arXiv 2307.05695)."""
    _inject(model, settings["rank"])
    return ReLoRA(model, settings["cycle_length"], **adamw)


class ReLoRA(torch.optim.AdamW):
    """AdamW that merges after every `cycle_length`-th step, and then forgets the adapters' moments."""

    def __init__(self, model: nn.Module, cycle_length: int, **adamw: Any):
        super().__init__(_trainable(model), **adamw)
        self.adapted = list(_adapters(model))
        self.cycle_length = cycle_length
        self.param_groups[0]["updates"] = 0  # in the group, so that a checkpoint keeps the count

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        group = self.param_groups[0]
        group["updates"] += 1
        if group["updates"] % self.cycle_length == 0:
            for layer in self.adapted:
                _merge(layer)
                layer.merged_adapters.clear()  # peft would bypass merged adapters from here on
                layer.reset_lora_parameters("default", True)
                for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                    self.state.pop(p, None)
        return loss


def to_dense(model: nn.Module) -> nn.Module:
    """The model with ordinary layers again, which transformers can load, in place: products multiplied out, adapters merged."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRankLinear):
            _replace(model, name, layer.dense())
        elif hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            _merge(layer)
            _replace(model, name, layer.base_layer)
    return model


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _inject(model: nn.Module, rank: int, alpha: float = LORA_ALPHA, alone: bool = False) -> None:
    """Put peft's adapters beside the attention and MLP matrices, which freeze; `alone`: with everything that is not a new head.

    A matrix that is frozen already gets none: it stays as it is.
    """
    if find_spec("peft") is None:
        raise UserError('lora and relora need peft; install it with: pip install "galore-torch[peft]"')
    from peft import LoraConfig, inject_adapter_in_model

    chosen = [weight for weight in chosen_weights(model) if weight.parameter.requires_grad]
    if not chosen:
        raise UserError("lora and relora put adapters beside attention and MLP matrices, and --freeze names all of them; freeze less")
    matrices = {weight.parameter for weight in chosen}
    kept = new_head(model) if alone else model
    full = [p for p in kept.parameters() if p.requires_grad and p not in matrices]
    if experts := [weight.name for weight in chosen if weight.layer is None]:
        raise UserError(
            f"lora and relora put adapters beside linear layers; {len(experts)} weights of this model are outside of them (such as "
            f"{experts[0]}) and would freeze: choose galore_adamw or adamw"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=LORA_DROPOUT, target_modules=[weight.name for weight in chosen])
    planned = next(model.parameters()).is_meta  # only looked at, never trained: the adapters need no memory either
    inject_adapter_in_model(config, model, low_cpu_mem_usage=planned)
    for p in full:  # peft froze them too
        p.requires_grad_(True)
    for layer in _adapters(model):  # peft makes 16-bit adapters fp32
        layer.lora_A.to(layer.base_layer.weight.dtype)
        layer.lora_B.to(layer.base_layer.weight.dtype)


def _adapters(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"))


def _merge(layer: Any) -> None:
    """W += (alpha / r) B A, in place, outside autograd."""
    with torch.no_grad():
        layer.merge()
