"""Optim: a model's linear layers in INT8, and back. Everything else about the model stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.ops.int8_weight import DTYPES, Int8Weight
from galore_torch.optim.param_groups import LinearWeight, chosen_weights

_REPLACED = "_galore_replaced"  # the mark of a parameter that a model had


def quantize_linears(model: nn.Module, *, targets: str | Sequence[str] | None = None) -> nn.Module:
    """Hold the weights of linear layers as INT8 alone, in place; returns the model. Call it before the optimizer is built.

    One weight after the other: building a model layer by layer and quantising each layer never needs more than one floating layer.
    Embeddings, the output head, norms and biases keep their dtype, as published (Q-GaLore, arXiv 2407.08296, section 3). So do weights
    outside of linear layers, such as 3-D weights of experts, which is said in a warning.

    Args:
        model: any module with linear layers, in bf16 or fp32. A weight that several layers share stays shared.
        targets: which linear layers, as in `galore_param_groups`; None for those of the body.

    Raises ValueError, and changes nothing, for weights that are quantised already, not bf16 or fp32, not finite, computed by one of
    torch's parametrizations, or shared with a module that is no linear layer, and for patterns that match nothing.
    """
    chosen = chosen_weights(model, targets)
    floating = [weight for weight in chosen if weight.layer is None]
    chosen = [weight for weight in chosen if weight.layer is not None]
    places, layers = _places(model), {weight.layer for weight in chosen}
    for weight in chosen:
        _check(weight, places[id(weight.parameter)], layers)
    for key in dict.fromkeys(id(weight.parameter) for weight in chosen):
        _replace(places[key], Int8Weight.quantize)
    if floating:
        left, made = (sum(weight.parameter.numel() for weight in weights) for weights in (floating, chosen))
        warnings.warn(
            f"{len(floating)} weights outside of linear layers stay floating, {left:,} elements beside {made:,} in INT8 (such as "
            f"{floating[0].name}): only linear layers are quantised",
            stacklevel=2,
        )
    return model


def dequantize_linears(model: nn.Module) -> nn.Module:
    """Ordinary layers again, in place, for export: ``dequantize_linears(model).save_pretrained(folder)``. Returns the model.

    The weights round to their dtype, so that quantising them once more is not exact.
    """
    for same in _places(model).values():
        if isinstance(getattr(*same[0]), Int8Weight):
            _replace(same, Int8Weight.dequantize)
    return model


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter stands, by its id: (module, attribute), more than one where it is shared. Holds no parameter alive."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(id(p), []).append((module, name))
    return places


def _replace(places: list[tuple[nn.Module, str]], change: Callable[[Any], Tensor]) -> None:
    old = getattr(*places[0])
    new = nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
    for module, name in places:
        setattr(module, name, new)
    setattr(old, _REPLACED, True)


def refuse_replaced(params: Iterable[Tensor]) -> None:
    """Raise ValueError for a parameter that its model no longer has: it gets no gradient, so a step would train nothing and not say so."""
    for p in params:
        if hasattr(p, _REPLACED):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is no longer in its model: quantize_linears or dequantize_linears replaced it "
                "after the optimizer or its groups were made; call that first, then make the groups and the optimizer"
            )


def _check(weight: LinearWeight, places: list[tuple[nn.Module, str]], layers: set[nn.Module | None]) -> None:
    name, p = f"{weight.name}.weight".lstrip("."), weight.parameter
    if weight.owner is not weight.layer or weight.key != "weight":
        raise ValueError(
            f"{name} is computed anew from {weight.key} by weight_norm, pruning or another parametrization: INT8 weights are not; leave it "
            "out of targets, or remove that first, such as by torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(p, Int8Weight):
        raise ValueError(f"{name} is INT8 already: call quantize_linears once, or dequantize_linears(model) first")
    if p.dtype not in DTYPES:
        raise ValueError(f"{name} is {p.dtype}: only bfloat16 and float32 weights are quantised; call model.to(torch.bfloat16) first")
    if others := [module for module, _ in places if module not in layers]:
        raise ValueError(
            f"{name} is shared with a layer that stays as it is ({type(others[0]).__name__}): leave it out of targets, or untie them"
        )
    real = type(p) in (Tensor, nn.Parameter) and not p.is_meta  # a traced one has no values
    if real and not bool(torch.isfinite(p.detach().sum(dtype=torch.float32))):
        raise ValueError(f"{name} holds values that are not finite: INT8 cannot, so load or initialise the weights first")


# torch.load may build it with weights_only=True: it holds tensors and a dtype only.
torch.serialization.add_safe_globals([Int8Weight])
