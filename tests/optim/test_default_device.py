"""The default device and dtype are the user's: the optimizer names those of its tensors. Oracle: the run that changed neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g

CLASSES: dict[str, Any] = {
    "adamw": g.GaLoreAdamW,
    "adamw8bit": lambda params, **settings: g.GaLoreAdamW8bit(params, min_8bit_size=0, **settings),
    "adamw, int4 basis and gaps": lambda params, **settings: g.GaLoreAdamW(params, basis_codec="int4", gap_range=(1, 4), **settings),
    "adafactor": g.GaLoreAdafactor,
    "adagrad": g.GaLoreAdagrad,
    "sgd": lambda params, **settings: g.GaLoreSGD(params, momentum=0.9, **settings),
    "any": lambda params, **settings: g.GaLore(torch.optim.AdamW, params, **settings),
}


def trained(make: Any, rank: int | None, inside: Any) -> dict[str, torch.Tensor]:
    """The weight and the state after three steps, the second of them with a gradient that is not finite."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(32, 48, generator=generator).bfloat16())
    grads = [torch.randn(32, 48, generator=generator).bfloat16() for _ in range(3)]
    grads[1][0, 0] = torch.inf
    with inside():
        optimizer = make([{"params": [p], "rank": rank, "update_proj_gap": 2}], lr=1e-2, compile=False)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
    return {"weight": p.detach(), **{key: value for key, value in optimizer.state[p].items() if torch.is_tensor(value)}}


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", CLASSES)
def test_a_default_device_changes_nothing(name: str, rank: int | None) -> None:
    """ "meta" stands in for "cuda": a tensor that lands there holds nothing, and no step can use it."""
    expected = trained(CLASSES[name], rank, nullcontext)
    got = trained(CLASSES[name], rank, lambda: torch.device("meta"))
    assert {key: value.device.type for key, value in got.items()} == dict.fromkeys(expected, "cpu")
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", CLASSES)
def test_a_default_dtype_changes_nothing(name: str, rank: int | None) -> None:
    @contextmanager
    def double() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    expected, got = (trained(CLASSES[name], rank, inside) for inside in (nullcontext, double))
    for key, value in expected.items():
        assert torch.equal(got[key].to(value.dtype), value)
        # torch's own classes count their steps in the default dtype
        assert got[key].dtype == value.dtype or key == "base_step"
