"""Q-GaLore against a naive transcription, and in every mode of training."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import galore_torch as g
from galore_torch.engine import fused as elementwise
from galore_torch.engine import inductor
from galore_torch.engine.inductor import has_compiler
from galore_torch.engine.step import _first_seed
from galore_torch.ops import write
from galore_torch.ops.codecs import noise
from galore_torch.ops.int8_weight import Int8Weight, row_parts
from galore_torch.ops.levels import levels
from galore_torch.optim.low_rank_grad import LowRankGrad
from references.galore import QGaLoreReference, best_subspace
from support.q_galore_models import X, loss, model, optimizer_of, same, train


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (21, 37)], ids=str)
def test_every_step_is_the_naive_transcriptions_to_the_last_code(shape: tuple[int, int], rounded: bool) -> None:
    """The engine's codes are floor(oracle's number + the noise), within a thousandth of a step; grids are equal."""
    hyper: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "scale": 0.25, "weight_decay": 0.1}
    oracle = QGaLoreReference(**hyper)
    W = nn.Parameter(Int8Weight.quantize(torch.randn(shape)))
    optimizer = g.QGaLoreAdamW8bit(
        [W],
        **hyper,
        rank=4,
        min_8bit_size=0,
        update_proj_gap=3,
        gap_range=None,
        projector="svd",
        transport="keep",
        stochastic_rounding=rounded,
    )
    state, left = optimizer.state[W], shape[0] < shape[1]
    G0 = torch.randn(shape)
    for t in range(1, 8):
        W.grad = G0 + 0.3 * torch.randn(shape)
        before, stored = copy.deepcopy(state), [tensor.clone() for tensor in W.stored]
        G = W.grad.clone()
        optimizer.step()
        if t % 3 == 1:  # a refresh: no element of the new basis is further than half a step from the singular vectors, up to sign
            exact = best_subspace(G, 4, "left" if left else "right")
            P = oracle.basis(state["basis_codes"], state["basis_scale"], state["basis_offset"], min(shape))
            turned = exact * (exact * P.to(exact)).sum(0).sign()
            assert ((P - turned).abs() <= 0.51 * state["basis_scale"].double()).all()
        P = oracle.basis(state["basis_codes"], state["basis_scale"], state["basis_offset"], min(shape))
        m, v = (
            oracle.moment(before[f"{key}_codes"], before[f"{key}_scale"], levels(signed, torch.device("cpu")), 1 if left else 0)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
        )
        exact_W, m, v = oracle.moved(oracle.weight(*stored), P, m, v, G, t)
        for key, value, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            table, axis = levels(signed, torch.device("cpu")), 1 if left else 0
            found = oracle.moment(state[f"{key}_codes"], state[f"{key}_scale"], table, axis)
            scale = state[f"{key}_scale"].double().repeat_interleave(max(shape), axis)
            nearest = (table * scale.unsqueeze(-1) - value.unsqueeze(-1)).abs().amin(-1)
            assert ((found - value).abs() <= nearest + 2.0**-7 * value.abs() + 6e-7 * scale).all()
        assert len(list(row_parts(W))) == 1  # one stream of noise, after those of the two moments
        a, b = noise(*shape, _first_seed(W, before, t) + 2, W.device) if rounded else (torch.tensor(0), torch.tensor(0x8000))
        uniform = (((a + b).expand(shape) % 0x10000 // 4 + (0.5 if rounded else 0)) / 2**14).double()
        for i, (values, random, codes) in enumerate(
            zip(exact_W.flatten().split(256), uniform.flatten().split(256), W.codes.flatten().split(256), strict=True)
        ):
            step, start = oracle.grid(values, float(stored[1][i]), float(stored[2][i]))
            assert (float(W.scale[i]), float(W.offset[i])) == (step, start)
            high = (values - start) / step + random - codes.double()
            assert high.min() > -1e-3
            assert high.max() < 1 + 1e-3


# --- modes of training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["project", "update"])
def test_one_fused_backward_pass_equals_the_plain_step_bit_for_bit_over_refreshes(mode: str, dtype: torch.dtype) -> None:
    plain, fused = model(dtype), model(dtype)
    a, b = optimizer_of(plain), optimizer_of(fused)
    start = copy.deepcopy(plain)
    with g.fused_backward(fused, b, mode):
        train(plain, a, range(10))
        train(fused, b, range(10))
    assert same(plain, fused)
    assert not same(plain, start)


def test_accumulated_micro_batches_are_projected_and_equal_one_large_batch() -> None:
    whole, parts = model(), model()
    a, b = optimizer_of(whole, update_proj_gap=100), optimizer_of(parts, update_proj_gap=100)
    train(whole, a, range(1))
    train(parts, b, range(1))  # a basis for both
    with g.fused_backward(parts, b):
        loss(whole).backward()
        for x in X.chunk(4):
            ((parts(x) - 0.3).square().mean() / 4).backward()
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            if isinstance(p, Int8Weight):
                assert isinstance(q.grad, LowRankGrad)
                low = b.state[q]["exp_avg_codes"].shape
                assert q.grad.low.shape == low
            else:
                torch.testing.assert_close(q.grad, p.grad)
        for optimizer in (a, b):
            optimizer.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        if isinstance(p, Int8Weight):  # sums in another order differ by an ulp, which rounds one code in thousands the other way
            assert ((p - q).abs() <= 1.01 * p.scale.max()).all()
            assert (p.codes != q.codes).float().mean() < 1e-2


@pytest.mark.parametrize("mode", [None, "project"])
def test_clip_grad_norm_measures_and_scales_what_the_step_uses(mode: str | None) -> None:
    clipped, scaled = model(), model()
    a, b = optimizer_of(clipped), optimizer_of(scaled)
    for m, optimizer in ((clipped, a), (scaled, b)):
        if mode:
            g.fused_backward(m, optimizer, mode)
        loss(m).backward()
    parts = [p.grad.low if isinstance(p.grad, LowRankGrad) else p.grad for p in scaled.parameters()]
    norm = torch.cat([part.flatten() for part in parts]).norm()
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(clipped.parameters(), 0.1), norm)
    for part in parts:
        part.mul_(0.1 / (norm + 1e-6))
    a.step()
    b.step()
    for p, q in zip(clipped.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p + 0, q + 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    plain, saving = model(), model()
    a, b = optimizer_of(plain), optimizer_of(saving)
    for t in range(5):
        x = (X + t).requires_grad_()
        (plain(x) - 0.3).square().mean().backward()
        (checkpoint(saving, x, use_reentrant=reentrant) - 0.3).square().mean().backward()
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    assert same(plain, saving)


def test_a_layers_product_and_gradients_are_those_of_its_decoded_weight() -> None:
    layer = g.quantize_linears(nn.Linear(24, 40), targets="all-linear")
    plain = g.dequantize_linears(copy.deepcopy(layer))
    for x in (torch.randn(24), torch.randn(5, 24), torch.randn(2, 3, 24)):
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for module, it in zip((layer, plain), inputs, strict=True):
            module.zero_grad()
            module(it).square().sum().backward()
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_autocast_computes_in_its_dtype_and_gradients_have_the_weights() -> None:
    m = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(X)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())


def test_a_weight_that_two_layers_share_stays_shared_and_learns_from_both() -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(2)
        m = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        m[2].weight = m[0].weight
        return m

    m, plain = g.quantize_linears(tied(), targets="all-linear"), tied()
    assert m[0].weight is m[2].weight
    plain.load_state_dict(g.dequantize_linears(copy.deepcopy(m)).state_dict())
    for each in (m, plain):
        each(X[:, :16]).square().mean().backward()
    torch.testing.assert_close(m[0].weight.grad, plain[0].weight.grad)
    optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(m, 4, targets="all-linear"), lr=0.01)
    assert sum(isinstance(p, Int8Weight) for group in optimizer.param_groups for p in group["params"]) == 1
    optimizer.step()
    back = g.dequantize_linears(m)
    assert back[0].weight is back[2].weight


def test_full_rank_and_other_classes_train_int8_weights_too() -> None:
    for make in (
        lambda p: g.QGaLoreAdamW8bit(p, lr=0.01),
        lambda p: g.GaLoreAdamW(p, lr=0.01, rank=3),
        lambda p: g.GaLoreAdafactor(p, lr=0.01, rank=3),
        lambda p: g.GaLoreSGD(p, lr=0.3, momentum=0.9, rank=3),
        lambda p: g.GaLore(torch.optim.RMSprop, p, lr=1e-3, rank=3),
    ):
        m = model()
        before = loss(m).item()
        train(m, make(m.parameters()), range(20))
        assert loss(m).item() < 0.7 * before


def test_each_matrix_finds_its_own_gap_unless_the_group_says_otherwise() -> None:
    W = nn.Parameter(torch.zeros(48, 32))
    assert g.QGaLoreAdamW8bit([W], rank=4, update_proj_gap=50).param_groups[0]["gap_range"] == (50, 400)
    assert g.QGaLoreAdamW8bit([{"params": [W], "rank": 4, "update_proj_gap": 10}]).param_groups[0]["gap_range"] == (10, 80)
    assert g.QGaLoreAdamW8bit([W], rank=4, gap_range=None).param_groups[0]["gap_range"] is None
    assert g.QGaLoreAdamW8bit([W], rank=4, gap_range=(100, 300)).param_groups[0]["gap_range"] == (100, 300)
    parameters = inspect.signature(g.QGaLoreAdamW8bit).parameters
    assert {"lr", "betas", "eps", "weight_decay", "rank", "min_8bit_size"} <= parameters.keys()
    assert parameters["gap_range"].default == "lazy"
    lazy = g.QGaLoreAdamW8bit([W], rank=4, update_proj_gap=4, lr=0.0)
    G = torch.randn(48, 4) @ torch.randn(4, 32)
    for _ in range(40):  # a gradient that never turns
        W.grad = G.clone()
        lazy.step()
    assert int(lazy.state[W]["gap"]) == 32


@pytest.mark.skipif(not has_compiler("cpu"), reason="needs a C++ compiler")
def test_the_compiled_move_of_a_weight_is_the_move() -> None:
    """An ulp of difference may round one code in thousands the other way."""
    start, update = Int8Weight.quantize(torch.randn(40, 200)), 0.1 * torch.randn(40, 200)
    plain, compiled = copy.deepcopy(start), copy.deepcopy(start)
    for seed in range(3):
        write.subtract(plain, update.clone(), 0.5, 0.99, seed)
        elementwise.subtract(compiled, update.clone(), 0.5, 0.99, seed)
    assert any(key[0] is elementwise._subtract_stored and program for key, program in inductor.programs.items()), "it was compiled"
    assert ((plain - compiled).abs() <= 1.01 * plain.scale.max()).all()
    assert (plain.codes != compiled.codes).float().mean() < 1e-2
    assert not torch.equal(plain.codes, start.codes)


def test_a_projector_that_looks_at_no_gradient_keeps_its_gap() -> None:
    """The default gap_range adapts a gap to overlaps, which such a projector has by chance: nobody asked for it, so nothing is refused."""
    for projector, gaps in (("power", (50, 400)), ("random", None), ("rows", None)):
        m = model()
        optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(m, 3, targets="all-linear", projector=projector, update_proj_gap=50), lr=0.01)
        assert [group["gap_range"] for group in optimizer.param_groups if group["rank"]] == [gaps]
        before = loss(m).item()
        train(m, optimizer, range(20))
        assert loss(m).item() < before
