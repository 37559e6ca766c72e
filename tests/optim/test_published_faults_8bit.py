"""The proven faults of galore-torch 1.0's 8-bit class (B22 to B26 of docs/differences.md) are absent here.

Oracle, but where a test names another: our own GaLoreAdamW with fp32 moments, on the same gradients.
"""

from __future__ import annotations

import inspect
import sys
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import galore_torch
from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer: Optimizer, params: list[Parameter], steps: int, first: int = 0) -> None:
    """Noisy gradients of full rank around a fixed one of rank 3; they depend on nothing but the step."""
    for step in range(first, first + steps):
        for p in params:
            m, n = p.shape[0], p.numel() // p.shape[0]
            fixed = weight(m, 3, seed=1).detach() @ weight(3, n, seed=2).detach()
            p.grad = (fixed + weight(m, n, seed=step + 3).detach()).view(p.shape).to(p.dtype)
        optimizer.step()


def moved(cls: type[Optimizer], shape: tuple[int, ...], steps: int = 5, **kwargs: Any) -> Tensor:
    p = weight(*shape)
    train(cls([p], lr=0.01, **kwargs), [p], steps)
    return p.detach() - weight(*shape).detach()


def test_b22_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with 8-bit state while importing bitsandbytes would fail. That the package imports without it: test_package.py."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    p = weight(96, 64)
    optimizer = GaLoreAdamW8bit([{"params": [p], "rank": 60}])
    train(optimizer, [p], 1)
    assert optimizer.state[p]["exp_avg_codes"].dtype == torch.uint8
    assert not torch.equal(p, weight(96, 64))


@pytest.mark.parametrize("shape", [(256, 128), (500, 40), (64, 300)], ids=str)
def test_b22_small_matrices_move_as_far_as_large_ones(shape: tuple[int, ...]) -> None:
    """Below 4096 low-rank elements, where 1.0 froze the weight: the state is fp32 and the move GaLoreAdamW's."""
    small = moved(GaLoreAdamW8bit, shape, rank=8)
    exact = moved(GaLoreAdamW, shape, rank=8, basis_codec="bf16")
    assert torch.equal(small, exact)
    assert small.norm() > 0.01 * prod(shape) ** 0.5 * 0.01


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(1009, 513), (300, 64), (64, 300), (257, 131)], ids=str)
def test_b22_eight_bit_moments_steer_as_fp32_ones_do(shape: tuple[int, ...], proj_type: str) -> None:
    """Odd and prime lengths, two refreshes: the moves agree to 15 % and their directions to 0.99."""
    eight = moved(GaLoreAdamW8bit, shape, rank=7, proj_type=proj_type, min_8bit_size=1, update_proj_gap=2).flatten()
    exact = moved(GaLoreAdamW, shape, rank=7, proj_type=proj_type, update_proj_gap=2).flatten()
    assert torch.cosine_similarity(eight, exact, dim=0) > 0.99
    assert eight.norm().item() == pytest.approx(exact.norm().item(), rel=0.15)
    assert not torch.equal(eight, exact)


@pytest.mark.parametrize("shape", [(64, 100), (8192,), (5000, 3), (1009, 13), (64, 64, 3, 3), (128, 64, 1, 1)], ids=str)
def test_b22_eight_bit_state_is_about_a_byte_an_element(shape: tuple[int, ...]) -> None:
    """Whatever the shape, scales add at most a tenth. fp32 moments take 8 bytes an element; bitsandbytes' take 2.03."""
    p = weight(*shape)
    state = GaLoreAdamW8bit([p], min_8bit_size=1).state[p]
    held = sum(value.nbytes for key, value in state.items() if not isinstance(value, int))
    assert 2.0 <= held / p.numel() <= 2.2


@pytest.mark.parametrize("rank", [None, 8])
def test_b23_the_weight_and_its_gradient_stay_where_they_are(rank: int | None) -> None:
    """Same storage, same gradient with its shape and values, views still see the weight, and backward can follow."""
    p = weight(256, 128)
    view = p.detach()[3:9, ::2]
    optimizer = GaLoreAdamW8bit([p], rank=rank)
    x = torch.randn(128)
    (p @ x).square().sum().backward()
    gradient, values, place = p.grad, p.grad.clone(), p.data_ptr()
    optimizer.step()
    assert p.data_ptr() == place
    assert p.grad is gradient
    assert torch.equal(p.grad, values)
    assert torch.equal(view, p.detach()[3:9, ::2])
    optimizer.zero_grad(set_to_none=False)
    (p @ x).square().sum().backward()
    assert p.grad.shape == p.shape
    assert set(vars(p)) == set(vars(weight(1)))  # no saved_data left on the parameter


def test_b24_an_exception_leaves_the_groups_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in mid-step, at the second of three matrices: every key of the group, decay included, is what it was."""
    params = [weight(12, 8), weight(12, 8), weight(12, 8)]
    optimizer = GaLoreAdamW8bit([{"params": params, "rank": 2, "update_proj_gap": 2, "projector": "svd"}], weight_decay=0.1)
    train(optimizer, params, 2)
    keys = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    svd, calls = torch.linalg.svd, iter(range(9))

    def fail_at_the_second(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(optimizer, params, 1, first=2)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == keys
    place = params[1].data_ptr()
    train(optimizer, params, 1, first=3)  # and the step can be made again
    assert params[1].data_ptr() == place
    assert all(p.isfinite().all() for p in params)


def test_b25_no_step_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device's synchronize is called, and no CUDA is needed."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("synchronize was called")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.accelerator, "synchronize", refuse)
    for cls in (GaLoreAdamW, GaLoreAdamW8bit):
        p = weight(256, 128)
        train(cls([{"params": [p], "rank": 8, "update_proj_gap": 2}]), [p], 3)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_b25_no_step_between_refreshes_waits_for_the_gpu(cls: type[Optimizer]) -> None:
    """Oracle: torch.cuda.set_sync_debug_mode, which makes every hidden wait an error."""
    p = Parameter(torch.randn(256, 128, device="cuda"))
    optimizer = cls([{"params": [p], "rank": 8, "update_proj_gap": 100}], lr=0.01)
    p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("key", "value"),
    [("amsgrad", True), ("percentile_clipping", 5), ("block_wise", False), ("optim_bits", 4), ("args", object())],
)
def test_b26_what_would_be_ignored_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        GaLoreAdamW8bit([weight(12, 8)], **{key: value})


@pytest.mark.parametrize(("key", "value"), [("amsgrad", True), ("optim_bits", 32), ("percentile_clipping", 5), ("block_wise", False)])
def test_b26_what_would_be_ignored_in_a_group_is_refused(key: str, value: Any) -> None:
    """torch's classes and bitsandbytes read these from groups as well."""
    with pytest.raises(ValueError, match=key):
        GaLoreAdamW8bit([{"params": [weight(12, 8)], key: value}])


def test_b26_optim_bits_chooses_the_moments() -> None:
    """8: one byte an element; 32: fp32 moments, and the run of GaLoreAdamW."""
    codes = {}
    for bits in (8, 32):
        p = weight(256, 128)
        codes[bits] = {v.dtype for k, v in GaLoreAdamW8bit([p], optim_bits=bits).state[p].items() if k.startswith("exp_avg")}
    assert codes == {8: {torch.uint8, torch.float32}, 32: {torch.float32}}
    assert torch.equal(moved(GaLoreAdamW8bit, (256, 128), optim_bits=32), moved(GaLoreAdamW, (256, 128)))


def test_b26_paging_says_that_it_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="is_paged=True has no effect"):
        GaLoreAdamW8bit([weight(12, 8)], is_paged=True)


def test_b26_defaults_are_those_of_galore_adamw() -> None:
    """eps and weight_decay above all: 1.0 had 1e-8 and 1e-2 here, 1e-6 and 0 there."""
    eight, exact = (inspect.signature(cls).parameters for cls in (GaLoreAdamW8bit, GaLoreAdamW))
    shared = (eight.keys() & exact.keys()) - {"state_codec", "basis_codec"}
    assert {"lr", "betas", "eps", "weight_decay", "rank", "scale"} <= shared
    assert {name: eight[name].default for name in shared} == {name: exact[name].default for name in shared}
    assert galore_torch.GaLoreAdamW8bit([weight(2)]).param_groups[0]["eps"] == 1e-6
