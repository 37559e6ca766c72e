"""A gradient that is finite but too large to square is skipped: no weight, moment or basis stops being finite, and training goes on.

Oracle: isfinite, and the run that never saw the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.engine import refresh
from galore_torch.ops import linalg

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (g.GaLoreAdamW, {}),
    "adamw, step by weights": (g.GaLoreAdamW, {"lr": 1e-2, "scale_parameter": True}),
    "adamw, bf16 moments": (g.GaLoreAdamW, {"state_codec": "bf16"}),
    "adamw8bit": (g.GaLoreAdamW8bit, {"min_8bit_size": 1}),
    "adafactor": (g.GaLoreAdafactor, {"lr": 1e-2}),
    "adafactor, step by weights": (g.GaLoreAdafactor, {"lr": 1e-2, "scale_parameter": True}),
    "adafactor, beta1": (g.GaLoreAdafactor, {"lr": 1e-2, "beta1": 0.9}),
    "adagrad": (g.GaLoreAdagrad, {}),
    "sgd": (g.GaLoreSGD, {"momentum": 0.9}),
    "any": (lambda params, **settings: g.GaLore(torch.optim.RMSprop, params, **settings), {}),
}
HUGE = [1e16, 1e18, 2e19, 1e30, 3e38]


def floats(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value) and value.is_floating_point()]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", CLASSES)
def test_all_stays_finite_and_training_goes_on(name: str, rank: int | None, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:  # the path of a device that the host cannot read
        for module in (linalg, refresh):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    make, settings = CLASSES[name]
    for huge in HUGE:
        for when in (0, 3):
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(32, 64))
            optimizer = make([{"params": [p], "rank": rank, "update_proj_gap": 3}], **{"compile": False, **settings})
            for t in range(8):
                p.grad = torch.randn(32, 64)
                if t == when:
                    p.grad[0, 0] = huge
                before = p.detach().clone()
                optimizer.step()
                assert p.isfinite().all()
                assert all(value.isfinite().all() for value in floats(optimizer))
                if t != when and (name != "sgd" or huge > 1e19):
                    assert not torch.equal(p, before), "an ordinary step moves the weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projector", ["power", "rsvd", "gram", "svd", "random"])
def test_a_first_gradient_of_1e37_moves_nothing_and_ends_nothing(projector: str, dtype: torch.dtype) -> None:
    """No error from a decomposition; what comes after trains."""
    p = nn.Parameter(torch.randn(32, 64).to(dtype))
    optimizer = g.GaLoreAdamW([{"params": [p], "rank": 8, "projector": projector, "update_proj_gap": 2}], compile=False)
    start = p.detach().clone()
    p.grad = torch.full_like(p, 1e37)
    optimizer.step()
    assert torch.equal(p, start)
    for _ in range(4):
        p.grad = torch.randn(32, 64).to(dtype)
        optimizer.step()
    assert p.isfinite().all()
    assert not torch.equal(p, start)
    assert optimizer.state[p]["basis"].isfinite().all()


@pytest.mark.parametrize("mode", ["project", "update"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "sgd"])
def test_inside_a_fused_backward_pass(name: str, mode: str) -> None:
    make, settings = CLASSES[name]
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    optimizer = make([{"params": [model.weight], "rank": 8, "update_proj_gap": 2}, {"params": [model.bias]}], **settings, compile=False)
    with g.fused_backward(model, optimizer, mode):
        for t in range(6):
            (model(torch.randn(4, 64)).square().mean() * (1e30 if t == 2 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.isfinite().all() for p in model.parameters())
            assert all(value.isfinite().all() for value in floats(optimizer))


def test_a_basis_that_is_not_finite_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a decomposition makes of a usable gradient, the basis in use stays."""
    from galore_torch.slots import projectors

    p = nn.Parameter(torch.randn(32, 64))
    optimizer = g.GaLoreAdamW([{"params": [p], "rank": 8, "update_proj_gap": 1}], compile=False)
    p.grad = torch.randn(32, 64)
    optimizer.step()
    basis = optimizer.state[p]["basis"].clone()
    good = projectors.PROJECTORS["power"]
    bad = replace(good, find=lambda *a: {axis: basis * float("nan") for axis, basis in good.find(*a).items()})
    monkeypatch.setitem(projectors.PROJECTORS, "power", bad)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["basis"], basis)
    assert p.isfinite().all()


@pytest.mark.parametrize("value", [1e20, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("name", CLASSES)
def test_one_huge_weight_does_not_take_the_others_with_it(name: str, value: float) -> None:
    """Adafactor's step size follows the weights' root mean square. Oracle: the others stay finite, and move."""
    make, settings = CLASSES[name]
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(32, 64))
    with torch.no_grad():
        p[3, 5] = value
    others = torch.ones_like(p, dtype=torch.bool).index_fill_(0, torch.tensor(3), False).index_fill_(1, torch.tensor(5), False)
    optimizer = make([{"params": [p], "rank": None}], **{"compile": False, **settings})
    for _ in range(3):
        p.grad = torch.randn(32, 64)
        before = p.detach().clone()
        optimizer.step()
        assert p[others].isfinite().all()
        assert not torch.equal(p[others], before[others])


def test_projected_weights_near_the_end_of_their_range_stay_finite_under_any_class() -> None:
    """Their coordinates are Inf, and a difference of those NaN. Oracle: the weight as it was, and others go on as without it."""
    torch.manual_seed(0)
    p, other = nn.Parameter(torch.full((32, 64), 3e38)), nn.Parameter(torch.randn(32, 64))
    optimizer = g.GaLore(torch.optim.Adam, [{"params": [p, other], "rank": 4}], lr=1e-2)
    before = other.detach().clone()
    for _ in range(3):
        p.grad, other.grad = torch.randn(32, 64), torch.randn(32, 64)
        optimizer.step()
    assert torch.equal(p, torch.full((32, 64), 3e38))
    assert other.isfinite().all()
    assert not torch.equal(other, before)
