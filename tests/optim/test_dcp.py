"""Distributed checkpoint (DCP) resumes every class bit for bit, in one process and without a process group.

Oracle: the run that was never interrupted. The optimizer that loads was made for other weights and has been through what
checkpoint tools do to a fresh one: state created by a step with zero gradients and lr = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.testing import assert_close

import galore_torch


def rmsprop(params: Any, **kwargs: Any) -> Optimizer:
    return galore_torch.GaLore(torch.optim.RMSprop, params, momentum=0.9, **kwargs)


def adafactor(params: Any, **kwargs: Any) -> Optimizer:
    return galore_torch.GaLoreAdafactor(params, beta1=0.9, **kwargs)


def sgd(params: Any, **kwargs: Any) -> Optimizer:
    return galore_torch.GaLoreSGD(params, momentum=0.9, **kwargs)


MAKERS: dict[str, Callable[..., Optimizer]] = {
    "GaLoreAdamW": galore_torch.GaLoreAdamW,
    "GaLoreAdamW8bit": galore_torch.GaLoreAdamW8bit,
    "GaLoreAdafactor": adafactor,
    "GaLoreAdagrad": galore_torch.GaLoreAdagrad,
    "GaLoreSGD": sgd,
    "GaLore": rmsprop,
}
CASES = [
    (name, codec, dtype)
    for name in MAKERS
    for codec in ("fp32", "bf16", "int8")
    for dtype in (torch.float32, torch.bfloat16)
    if codec == "fp32" or name != "GaLore"  # a torch.optim class keeps its own state
]
every_case = pytest.mark.parametrize(
    ("name", "codec", "dtype"), CASES, ids=[f"{n}-{c}-{str(d).removeprefix('torch.')}" for n, c, d in CASES]
)


def build(name: str, codec: str, dtype: torch.dtype, seed: int, proj_type: str = "std") -> tuple[nn.Module, Optimizer]:
    """Two linear layers, biases at full rank and weights at rank 3; a basis is born in steps 1 and 5."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 20)).to(dtype)
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    galore = {"rank": 3, "update_proj_gap": 4, "proj_type": proj_type, "basis_codec": "bf16" if codec == "bf16" else "fp32"}
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1, **galore}]
    return model, MAKERS[name](groups, lr=0.01, state_codec=codec, min_8bit_size=1)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[Tensor]:
    """Weights after every step, on data that depend on the step alone."""
    weights = []
    for step in steps:
        data = torch.randn(6, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(data).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.extend(p.detach().clone() for p in model.parameters())
    return weights


def assert_same(a: Any, b: Any) -> None:
    assert_close(a, b, rtol=0.0, atol=0.0)


def zero_gradient_step(optimizer: Optimizer) -> None:
    """What tools do that never ask whether state exists: a step with zero gradients at lr = 0."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@every_case
@pytest.mark.parametrize("mode", [None, "project", "update"])
def test_save_and_load_resumes_bit_for_bit(name: str, codec: str, dtype: torch.dtype, mode: str | None, tmp_path: Path) -> None:
    """Through dcp.save and dcp.load: nested dicts for fp32 weights, flattened ones (pipeline, torchtitan) for bf16.

    Also when gradients are projected, or weights updated, inside the backward pass of both runs.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=dtype == torch.bfloat16)

    def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }

    model, optimizer = build(name, codec, dtype, seed=1)
    twin, resumed = build(name, codec, dtype, seed=2)
    if mode:
        galore_torch.fused_backward(model, optimizer, mode)  # type: ignore[arg-type]
        galore_torch.fused_backward(twin, resumed, mode)  # type: ignore[arg-type]
    train(model, optimizer, range(3))
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path, no_dist=True)

    _init_optim_state(resumed)
    loaded = state_of(twin, resumed)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(twin, loaded["model"], options=options)
    set_optimizer_state_dict(twin, resumed, loaded["optimizer"], options=options)
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    assert_same(train(twin, resumed, range(3, 7)), train(model, optimizer, range(3, 7)))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@every_case
def test_zero_gradient_initialisation_leaves_no_mark(name: str, codec: str, dtype: torch.dtype) -> None:
    """get_optimizer_state_dict on a fresh optimizer, and even a real zero-gradient step, do not spoil what is loaded next."""
    model, optimizer = build(name, codec, dtype, seed=1, proj_type="full")
    train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer)

    twin, resumed = build(name, codec, dtype, seed=2, proj_type="full")
    assert get_optimizer_state_dict(twin, resumed)["state"].keys() == saved["state"].keys()
    zero_gradient_step(resumed)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, resumed, saved)
    assert_same(train(twin, resumed, range(3, 7)), train(model, optimizer, range(3, 7)))


@every_case
def test_no_basis_is_born_of_a_zero_gradient(name: str, codec: str, dtype: torch.dtype) -> None:
    """Without a checkpoint to load: after a zero-gradient step the first real gradient makes the basis, as in a fresh run."""
    model, optimizer = build(name, codec, dtype, seed=1)
    zero_gradient_step(optimizer)
    matrices = optimizer.param_groups[1]["params"]
    assert not any(optimizer.state[p]["basis_ready"] for p in matrices)
    train(model, optimizer, range(1))

    twin, fresh = build(name, codec, dtype, seed=1)
    train(twin, fresh, range(1))
    for ours, theirs in zip(matrices, fresh.param_groups[1]["params"], strict=True):
        assert optimizer.state[ours]["basis_ready"]
        assert_same(optimizer.state[ours]["basis"], fresh.state[theirs]["basis"])


@every_case
def test_keys_survive_the_flat_form(name: str, codec: str, dtype: torch.dtype) -> None:
    """DCP joins keys with dots: the flat dict has one entry for each state tensor of each parameter, and no dot inside a key."""
    model, optimizer = build(name, codec, dtype, seed=1)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    fqns = {p: fqn for fqn, p in model.named_parameters()}
    expected = {f"state.{fqns[p]}.{key}" for p, state in optimizer.state.items() for key in state}
    assert {key for key in flat if key.startswith("state.")} == expected
    assert not any("." in key for state in optimizer.state.values() for key in state)
