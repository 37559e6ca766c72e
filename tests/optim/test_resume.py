"""State that survives: save, load into a new process's worth of objects, go on, and get the same bits as without the break."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g

CLASSES: dict[str, Any] = {
    "adamw": g.GaLoreAdamW,
    "adamw8bit": g.GaLoreAdamW8bit,
    "adafactor": lambda p, **k: g.GaLoreAdafactor(p, beta1=0.9, **k),
    "adagrad": g.GaLoreAdagrad,
    "sgd": lambda p, **k: g.GaLoreSGD(p, momentum=0.9, **k),
    "rmsprop": lambda p, **k: g.GaLore(torch.optim.RMSprop, p, **k),
}
X = torch.randn(32, 24)


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 6)).to(dtype)


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        m((X + t).to(next(m.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, "project", "update"])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", CLASSES)
def test_resume_is_bit_exact_through_torch_save_with_its_default_load(name: str, codec: str, mode: str | None, dtype: torch.dtype) -> None:
    if name == "rmsprop" and codec != "fp32":
        pytest.skip("a torch.optim class keeps its own state")

    def build() -> tuple[nn.Module, Any]:
        m = model(dtype)
        optimizer = CLASSES[name](m.parameters(), lr=0.01, rank=3, update_proj_gap=4, state_codec=codec, min_8bit_size=0)
        if mode:
            g.fused_backward(m, optimizer, mode)
        return m, optimizer

    straight, a = build()
    train(straight, a, range(11))
    first, b = build()
    train(first, b, range(6))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": b.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only is its default
    second, c = build()
    train(second, c, range(2))  # a used optimizer forgets what it was
    second.load_state_dict(saved["model"])
    c.load_state_dict(saved["optimizer"])
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        for key, value in b.state[p].items():
            other = c.state[q][key]
            assert value == other if isinstance(value, int) else (value.dtype == other.dtype and torch.equal(value, other))
    train(second, c, range(6, 11))
    for p, q in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", CLASSES)
def test_state_loads_by_keyword(name: str) -> None:
    """As torch.distributed.checkpoint calls it."""
    first, second = (CLASSES[name](model(torch.float32).parameters(), lr=0.01, rank=3) for _ in range(2))
    first.param_groups[0]["lr"] = 0.5
    second.load_state_dict(state_dict=first.state_dict())
    assert second.param_groups[0]["lr"] == 0.5


def test_state_keeps_its_dtypes_under_bf16_weights() -> None:
    m = model(torch.bfloat16)
    optimizer = g.GaLoreAdamW8bit(m.parameters(), lr=0.01, rank=3, min_8bit_size=0, basis_codec="fp32")
    train(m, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = optimizer.state[m[2].weight]
    assert {key: state[key].dtype for key in ("basis", "exp_avg_codes", "exp_avg_scale", "basis_ready")} == {
        "basis": torch.float32,
        "exp_avg_codes": torch.uint8,
        "exp_avg_scale": torch.float32,
        "basis_ready": torch.bool,
    }


def test_loading_shares_nothing_with_the_checkpoint() -> None:
    m, other = model(torch.float32), model(torch.float32)
    a, b = (g.GaLoreAdamW(x.parameters(), lr=0.01, rank=3) for x in (m, other))
    train(m, a, range(2))
    saved = a.state_dict()
    b.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    train(other, b, range(2))
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            assert value == before[index][key] if isinstance(value, int) else torch.equal(value, before[index][key])


def test_state_follows_a_parameter_that_moved_after_the_optimizer_was_made() -> None:
    """The meta device stands in for a second one."""
    W = nn.Parameter(torch.empty(40, 300, device="meta"))
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=3)
    state = optimizer.state[W]
    state.update({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items() if isinstance(value, torch.Tensor)})
    W.grad = torch.empty_like(W)
    optimizer._check(W, optimizer.param_groups[0])
    moved = {key: value.device.type for key, value in state.items() if isinstance(value, torch.Tensor)}
    assert moved == {"basis_ready": "cpu", "basis": "meta", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_a_parameter_that_thaws_later_gets_its_state_then() -> None:
    m = model(torch.float32)
    m[0].weight.requires_grad_(False)
    optimizer = g.GaLoreAdamW(m.parameters(), lr=0.01, rank=3)
    assert m[0].weight not in optimizer.state
    frozen = m[0].weight.detach().clone()
    train(m, optimizer, range(2))
    assert torch.equal(m[0].weight, frozen)
    m[0].weight.requires_grad_(True)
    train(m, optimizer, range(2))
    assert optimizer.state[m[0].weight]["step"] == 2
    assert not torch.equal(m[0].weight, frozen)
