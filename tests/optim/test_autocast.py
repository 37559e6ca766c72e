"""Under torch.autocast a step computes in fp32, as outside. Oracle: the same step outside, to the last bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g

CLASSES: dict[str, Any] = {
    "adamw": g.GaLoreAdamW,
    "adamw8bit": lambda params, **settings: g.GaLoreAdamW8bit(params, min_8bit_size=0, **settings),
    "adafactor": g.GaLoreAdafactor,
    "adagrad": g.GaLoreAdagrad,
    "sgd": lambda params, **settings: g.GaLoreSGD(params, momentum=0.9, **settings),
    "any": lambda params, **settings: g.GaLore(torch.optim.AdamW, params, **settings),
}
DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projector", ["power", "rsvd", "gram", "svd", "random"])
def test_every_projector(projector: str, dtype: torch.dtype) -> None:
    assert torch.equal(*(_trained(inside, dtype, g.GaLoreAdamW, projector=projector) for inside in (False, True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str, rank: int | None, dtype: torch.dtype) -> None:
    assert torch.equal(*(_trained(inside, dtype, CLASSES[name], rank=rank) for inside in (False, True)))


def _trained(inside: bool, dtype: torch.dtype, make: Any, **settings: Any) -> torch.Tensor:
    """The weights after ten steps on gradients whose squares fp16 does not hold."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 96))
    optimizer = make([{"params": [p], "update_proj_gap": 5, "rank": 8, **settings}], lr=1e-2, compile=False)
    for _ in range(10):
        p.grad = 1e-4 * torch.randn(64, 4) @ torch.randn(4, 96)
        with torch.autocast("cpu", dtype, enabled=inside):
            optimizer.step()
    return p.detach()


@pytest.mark.parametrize("mode", ["project", "update"])
def test_hooks_that_run_inside_it(mode: str) -> None:
    """Both backward passes run inside, so that gradients are alike; the step of the unfused one runs outside."""

    def trained(fused: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(96, 64, bias=False)
        optimizer = g.GaLoreAdamW([{"params": [model.weight], "rank": 8, "update_proj_gap": 2}], lr=1e-2, compile=False)
        attached = g.fused_backward(model, optimizer, mode) if fused else nullcontext()
        with attached:
            for _ in range(5):
                loss = 1e-4 * (model(torch.randn(8, 96)) * torch.randn(8, 64)).sum()
                with torch.autocast("cpu", torch.bfloat16):
                    loss.backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=fused):
                    optimizer.step()
                optimizer.zero_grad()
        return model.weight.detach()

    assert torch.equal(trained(False), trained(True))
