"""PyTorch's OptimizerInfo for every public class, and the small runs that the contract tests compare."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d, Parameter
from torch.optim import Optimizer
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

import galore_torch


class GaLoreRMSprop(galore_torch.GaLore):
    """The wrapper around a base class of torch.optim, in the shape that OptimizerInfo calls."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(torch.optim.RMSprop, params, **kwargs)


PROJECTED: dict[str, Any] = {"rank": 1, "update_proj_gap": 3}
# class -> its own arguments in every input, and one more setting to try
CLASSES: dict[type[Optimizer], tuple[dict[str, Any], dict[str, Any]]] = {
    galore_torch.GaLoreAdamW: ({}, {"correct_bias": False, "betas": (0.8, 0.99)}),
    galore_torch.GaLoreAdamW8bit: ({"min_8bit_size": 1}, {"betas": (0.8, 0.99)}),
    galore_torch.QGaLoreAdamW8bit: ({"min_8bit_size": 1}, {"betas": (0.8, 0.99)}),
    galore_torch.GaLoreAdafactor: ({"lr": 0.01, "relative_step": False, "scale_parameter": False}, {"beta1": 0.9}),
    galore_torch.GaLoreAdagrad: ({}, {"eps": 1e-3}),
    galore_torch.GaLoreSGD: ({"lr": 1e-2}, {"momentum": 0.9, "nesterov": True}),
    GaLoreRMSprop: ({"lr": 1e-2}, {"momentum": 0.9}),
}
# Keys that the published classes (or torch's, for the bases they never had) do not save.
NEWER_KEYS = (
    *("maximize", "foreach", "fused", "capturable", "differentiable"),
    *("projector", "transport", "state_codec", "basis_codec", "stochastic_rounding", "decay", "rank"),
)


def info(cls: type[Optimizer], common: dict[str, Any], special: dict[str, Any]) -> OptimizerInfo:
    def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        settings = [{}, {"lr": 0.01, "weight_decay": 0.1}, special, {"weight_decay": 0.1, "maximize": True}]
        late = {} if issubclass(cls, galore_torch.GaLore) else {"decay": "after"}  # a torch.optim class decays where it does
        galore = [{"proj_type": "full"}, {"proj_type": "reverse_std", "transport": "keep", **late}]
        plain = [OptimizerInput(params=None, kwargs={**common, **s}, desc=f"full rank {s}") for s in settings]
        return plain + [OptimizerInput(params=None, kwargs={**common, **PROJECTED, **s}, desc=f"projected {s}") for s in settings + galore]

    def errors(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        bad: list[tuple[dict[str, Any], str]] = [
            ({"lr": -1.0}, "learning rate"),
            ({"weight_decay": -1.0}, "weight_decay"),
            ({"rank": 0}, "rank"),
            ({"rank": -1}, "rank"),
            ({"rank": 1, "update_proj_gap": 0}, "update_proj_gap"),
            ({"rank": 1, "proj_type": "diagonal"}, "proj_type"),
            ({"rank": 1, "scale": float("nan")}, "scale"),
            ({"rank": 1, "projector": "crystal ball"}, "projector"),
            ({"rank": 1, "transport": "teleport"}, "transport"),
            ({"rank": 1, "state_codec": "fp3"}, "state_codec"),
            ({"decay": "sometimes"}, "decay"),
            ({"differentiable": True}, "differentiable"),
            ({"capturable": True}, "capturable"),
        ]
        ours = [
            ErrorOptimizerInput(
                OptimizerInput(params=None, kwargs={**common, **kwargs}, desc=str(kwargs)),
                error_type=ValueError,
                error_regex=regex,
            )
            for kwargs, regex in bad
        ]
        return ours + list(get_error_inputs_for_all_optims(device, dtype))

    return OptimizerInfo(cls, optim_inputs_func=inputs, optim_error_inputs_func=errors, supported_impls=(), supports_sparse=False)


INFOS = [info(cls, *settings) for cls, settings in CLASSES.items()]


def inputs_of(optim_info: OptimizerInfo, device: Any) -> Iterator[dict[str, Any]]:
    """Constructor arguments of every configuration. foreach is a hint with a test of its own."""
    for given in _get_optim_inputs_including_global_cliquey_kwargs(device, None, optim_info):
        yield copy.deepcopy(given.kwargs)


def model(device: Any, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """4-D, its bias, 1-D and 2-D parameters, the same on every call."""
    torch.manual_seed(3)
    conv = Conv2d(4, 3, 2, device=device, dtype=dtype)
    extra = [Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in ((10,), (2, 3))]
    return [*conv.parameters(), *extra]


def set_grads(params: list[Parameter], step: int, sign: float = 1.0) -> None:
    """Gradients that depend on the weights and the step: those of |W - noise|^2 / 2."""
    noise = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = sign * (p.detach() - torch.randn(p.shape, generator=noise).to(p))


def train(optimizer: Optimizer, params: list[Parameter], steps: range, sign: float = 1.0) -> list[Tensor]:
    """Weights after every step."""
    seen = []
    for step in steps:
        set_grads(params, step, sign)
        optimizer.step()
        seen.extend(p.detach().clone() for p in params)
    return seen


def named(params: list[Parameter], wanted: bool) -> list[Any]:
    return [(f"layer.{i}", p) for i, p in enumerate(params)] if wanted else params


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, dtypes too."""
    assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer)  # weights_only is the default
