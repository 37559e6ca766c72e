"""Fused backward passes against the plain step: the same numbers, ordinary code around them, clear errors where a mode ends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad

RANDOM = torch.Generator().manual_seed(0)
X, Y = (torch.randn(64, width, dtype=torch.float64, generator=RANDOM) for width in (24, 4))


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def loss(m: nn.Module, micro: int = 1, i: int = 0) -> torch.Tensor:
    return (m(X.chunk(micro)[i]) - Y.chunk(micro)[i]).square().mean()


def weights(m: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in m.parameters()])


CLASSES: dict[str, Any] = {
    "adamw": g.GaLoreAdamW,
    "adamw8bit": lambda p, **k: g.GaLoreAdamW8bit(p, min_8bit_size=0, **k),
    "adafactor": g.GaLoreAdafactor,
    "sgd": lambda p, **k: g.GaLoreSGD(p, momentum=0.9, **k),
    "rmsprop": lambda p, **k: g.GaLore(torch.optim.RMSprop, p, **k),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("mode", ["project", "update"])
def test_one_backward_pass_equals_the_plain_step_bit_for_bit_over_refreshes(name: str, mode: str) -> None:
    plain, fused = model(), model()
    a = CLASSES[name](plain.parameters(), lr=0.01, rank=3, update_proj_gap=4)
    b = CLASSES[name](fused.parameters(), lr=0.01, rank=3, update_proj_gap=4)
    g.fused_backward(fused, b, mode)
    for _ in range(10):
        for m, optimizer in ((plain, a), (fused, b)):
            loss(m).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(weights(plain), weights(fused))


def test_accumulating_four_micro_batches_equals_one_large_batch_in_the_same_basis() -> None:
    whole, parts = model(), model()
    a = g.GaLoreAdamW(whole.parameters(), lr=0.01, rank=3, update_proj_gap=100)
    b = g.GaLoreAdamW(parts.parameters(), lr=0.01, rank=3, update_proj_gap=100)
    loss(whole).backward()  # one ordinary step makes the basis of both
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        q.grad = p.grad.clone()
    for optimizer in (a, b):
        optimizer.step()
        optimizer.zero_grad()
    g.fused_backward(parts, b)
    for _ in range(5):
        loss(whole).backward()
        for i in range(4):
            (loss(parts, 4, i) / 4).backward()
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-12, atol=1e-12)


def test_a_refresh_under_accumulation_uses_the_first_micro_batch() -> None:
    m = model()
    optimizer = g.GaLoreAdamW(m.parameters(), lr=0.01, rank=3, projector="svd")
    g.fused_backward(m, optimizer)
    (first,) = torch.autograd.grad(loss(m, 4, 0) / 4, m[0].weight)
    for i in range(4):
        (loss(m, 4, i) / 4).backward()
    Vh = torch.linalg.svd(first, full_matrices=False).Vh
    basis = optimizer.state[m[0].weight]["basis"]
    torch.testing.assert_close(basis @ basis.T, Vh[:3].T @ Vh[:3])


def test_gradients_are_freed_and_clipping_measures_and_scales_what_is_used() -> None:
    """Oracle: the norm of the plain gradients, projected by hand, and a plain step on gradients scaled by hand."""
    plain, fused = model(), model()
    a = g.GaLoreSGD(plain.parameters(), lr=0.1, rank=3, projector="svd")
    b = g.GaLoreSGD(fused.parameters(), lr=0.1, rank=3, projector="svd")
    g.fused_backward(fused, b)
    loss(plain).backward()
    loss(fused).backward()
    square = torch.zeros((), dtype=torch.float64)
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        if p.dim() == 2:
            assert isinstance(q.grad, LowRankGrad)
            assert q.grad.low.numel() < p.numel()
            square += torch.linalg.svdvals(p.grad)[:3].square().sum()
        else:
            square += p.grad.square().sum()
    norm = torch.nn.utils.clip_grad_norm_(fused.parameters(), 0.05)
    torch.testing.assert_close(norm, square.sqrt())
    for p in plain.parameters():
        p.grad *= 0.05 / (square.sqrt() + 1e-6)
    a.step()
    b.step()
    torch.testing.assert_close(weights(fused), weights(plain))


def test_a_loop_may_look_at_the_norm_and_skip_the_step() -> None:
    m = model()
    optimizer = g.GaLoreAdamW(m.parameters(), lr=0.01, rank=3)
    g.fused_backward(m, optimizer)
    loss(m).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, state = weights(m), copy.deepcopy(optimizer.state_dict())
    (loss(m) * float("nan")).backward()
    norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    assert not norm.isfinite()
    optimizer.zero_grad()
    assert torch.equal(weights(m), before)
    for saved, now in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        for key in saved:
            assert saved[key] == now[key] if isinstance(saved[key], int) else torch.equal(saved[key], now[key])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", ["project", "update"])
def test_zero_grad_of_model_and_optimizer_clears(mode: str, set_to_none: bool) -> None:
    plain, fused = model(), model()
    a, b = (g.GaLoreSGD(m.parameters(), lr=0.1, rank=3) for m in (plain, fused))
    g.fused_backward(fused, b, mode)
    for turn in range(4):
        for m, optimizer in ((plain, a), (fused, b)):
            loss(m).backward()
            optimizer.step()
            (m if turn % 2 else optimizer).zero_grad(set_to_none=set_to_none)
    torch.testing.assert_close(weights(fused), weights(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ["accumulate", "clip"])
def test_update_mode_refuses_what_it_cannot_do_and_loses_nothing(act: str) -> None:
    m = model()
    optimizer = g.GaLoreAdamW(m.parameters(), lr=0.01, rank=3)
    g.fused_backward(m, optimizer, "update")
    loss(m).backward()
    before = weights(m)
    with pytest.raises(RuntimeError, match="mode='project'"):
        loss(m).backward() if act == "accumulate" else torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    assert torch.equal(weights(m), before)
    optimizer.step()
    loss(m).backward()  # after step() the next backward pass is welcome, with or without zero_grad
    assert all(isinstance(p.grad, ConsumedGrad) for p in m.parameters())


def test_one_scheduler_and_one_state_dict_serve_both_modes() -> None:
    for mode in ("project", "update"):
        m = model()
        optimizer = g.GaLoreAdamW(m.parameters(), lr=0.1, rank=3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        g.fused_backward(m, optimizer, mode)
        for _ in range(3):
            loss(m).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
        assert {entry["step"] for entry in optimizer.state_dict()["state"].values()} == {3}


def test_a_weight_used_twice_is_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(16, 16, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.tanh(self.a(x)))

    plain, fused = Tied(), Tied()
    x = torch.randn(8, 16).double()
    a, b = (g.GaLoreAdamW(m.parameters(), lr=0.1, rank=3) for m in (plain, fused))
    g.fused_backward(fused, b, "update")
    for _ in range(3):
        for m, optimizer in ((plain, a), (fused, b)):
            m(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(weights(plain), weights(fused))


@pytest.mark.parametrize("mode", ["project", "update", "direct", "direct_update"])
@pytest.mark.parametrize("micro", [1, 2])
def test_gradients_of_another_dtype_than_the_weights(mode: str, micro: int) -> None:
    """`Tensor.grad_dtype`: bf16 weights with fp32 gradients. Oracle: gradients of the weights' own dtype, but for their rounding."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    if micro > 1 and mode.endswith("update"):
        pytest.skip("refuses accumulation")

    def trained(dtype: torch.dtype | None) -> torch.Tensor:
        m = model().bfloat16()
        for p in m.parameters() if dtype else ():
            p.grad_dtype = dtype
        optimizer = g.GaLoreSGD(m.parameters(), lr=0.1, rank=3, update_proj_gap=2)
        g.fused_backward(m, optimizer, mode)
        for _ in range(3):
            for i in range(micro):
                (m(X.bfloat16().chunk(micro)[i]) - Y.bfloat16().chunk(micro)[i]).square().mean().backward()
            if dtype and mode in ("project", "direct"):
                assert {p.grad.dtype for p in m.parameters() if p.grad is not None} == {dtype}
            optimizer.step()
            optimizer.zero_grad()
        return weights(m)

    torch.testing.assert_close(trained(torch.float32), trained(None), rtol=0.02, atol=0.02)


def test_removing_brings_ordinary_gradients_back() -> None:
    m = model()
    optimizer = g.GaLoreAdamW(m.parameters(), lr=0.01, rank=3)
    with g.fused_backward(m, optimizer):
        loss(m).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss(m).backward()
    assert type(m[0].weight.grad) is torch.Tensor
    g.fused_backward(m, optimizer).remove()


def test_a_low_rank_gradient_adds_another_and_says_what_it_cannot_do() -> None:
    m = model()
    optimizer = g.GaLoreAdamW(m.parameters(), lr=0.01, rank=3)
    g.fused_backward(m, optimizer)
    loss(m).backward()
    grad = m[0].weight.grad
    before = grad.low.clone()
    torch.testing.assert_close((grad + grad).low, 2 * before)
    torch.testing.assert_close(grad.clone().div_(2).low, before / 2)
    assert "LowRankGrad" in repr(grad)
    with pytest.raises(NotImplementedError, match=r"p\.grad\.low"):
        grad.abs()


@pytest.mark.parametrize(("dtype", "says"), [(torch.float16, "not torch.float32, torch.bf"), (torch.bfloat16, "no effect in one")])
def test_a_dtype_to_average_in_is_one_of_two_and_needs_processes(dtype: torch.dtype, says: str) -> None:
    m = model()
    with pytest.raises(ValueError, match=says):
        g.fused_backward(m, g.GaLoreAdamW(m.parameters(), rank=3), reduce_dtype=dtype)
