"""By default the basis has the weight's precision. Oracles: sizes by hand, storages, and `state_spec`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.layout import layout_of
from galore_torch.engine.stored import state_spec
from support.memory import storage_bytes

CLASSES: dict[str, Any] = {
    "adamw": g.GaLoreAdamW,
    "adafactor": g.GaLoreAdafactor,
    "adagrad": g.GaLoreAdagrad,
    "sgd": g.GaLoreSGD,
    "any": lambda params, **settings: g.GaLore(torch.optim.Adam, params, **settings),
}


@pytest.mark.parametrize(("dtype", "held"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
@pytest.mark.parametrize("name", CLASSES)
def test_the_default_follows_the_weight(name: str, dtype: torch.dtype, held: int) -> None:
    W = Parameter(torch.randn(96, 64).to(dtype))
    optimizer = CLASSES[name]([W], lr=1e-3, rank=8)
    for _ in range(2):
        assert optimizer.state[W]["basis"].nbytes == held * 64 * 8
        W.grad = torch.randn_like(W)
        optimizer.step()


def test_galore_adamw_on_bf16_weights_costs_what_state_spec_says() -> None:
    """m r in bf16, 2 n r in fp32 and one flag (arXiv 2403.03507, table 1)."""
    W = Parameter(torch.zeros(512, 1376, dtype=torch.bfloat16))
    optimizer = g.GaLoreAdamW([W], rank=128)
    group = optimizer.param_groups[0]
    assert sum(spec.nbytes for spec in state_spec(layout_of(W, group), group, optimizer.rule).values()) == storage_bytes(optimizer.state[W])
    assert storage_bytes(optimizer.state[W]) == 2 * 512 * 128 + 4 * 2 * 1376 * 128 + 1


@pytest.mark.parametrize(
    ("cls", "key", "dtype"), [(g.GaLoreAdamW8bit, "basis", torch.bfloat16), (g.QGaLoreAdamW8bit, "basis_codes", torch.uint8)]
)
def test_the_8_bit_classes_keep_their_own(cls: Any, key: str, dtype: torch.dtype) -> None:
    W = Parameter(torch.zeros(96, 64))
    assert cls([W], rank=8).state[W][key].dtype == dtype


def test_an_older_checkpoint_with_an_fp32_basis_under_bf16_weights_goes_on_with_it() -> None:
    """Its groups say basis_codec="fp32", and keys of slots it did not know take this optimizer's. Oracle: the run that never stopped."""

    def train(W: Parameter, optimizer: Any, steps: range) -> None:
        for t in steps:
            W.grad = torch.randn(96, 64, generator=torch.Generator().manual_seed(t)).to(W.dtype)
            optimizer.step()

    W = Parameter(torch.ones(96, 64, dtype=torch.bfloat16))
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=8, update_proj_gap=3, basis_codec="fp32")
    train(W, optimizer, range(5))
    saved, start = copy.deepcopy(optimizer.state_dict()), W.detach().clone()
    for group in saved["param_groups"]:
        for key in ("recovery", "carry", "batch_dims"):
            del group[key]
    V = Parameter(start)
    fresh = g.GaLoreAdamW([V], lr=0.01, rank=8, update_proj_gap=3)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["basis_codec"] == "fp32"
    assert fresh.state[V]["basis"].dtype == torch.float32
    train(W, optimizer, range(5, 10))
    train(V, fresh, range(5, 10))
    assert torch.equal(W, V)


def test_a_checkpoint_of_1_0_without_a_codec_is_converted_to_the_default() -> None:
    """Its groups name none: the fp32 basis is stored as this optimizer stores it, rounded to nearest."""
    W = Parameter(torch.ones(96, 64, dtype=torch.bfloat16))
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=8, basis_codec="fp32")
    W.grad = torch.randn(96, 64).bfloat16()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    basis = saved["state"][0]["basis"]
    del saved["param_groups"][0]["basis_codec"]
    fresh = g.GaLoreAdamW([W], lr=0.01, rank=8)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state[W]["basis"], basis.bfloat16())
