"""The engine against naive transcriptions of the papers (tests/references/galore.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import galore_torch as g
from galore_torch.choices import PROJ_TYPES
from references.galore import GaLoreReference, best_subspace

SHAPES = [(12, 8), (8, 12), (10, 10)]
RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "adam": (g.GaLoreAdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adagrad": (g.GaLoreAdagrad, {"lr": 0.05, "eps": 1e-10, "weight_decay": 0.1}),
    "momentum": (g.GaLoreSGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adafactor": (g.GaLoreAdafactor, {"lr": 0.02, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "weight_decay": 0.1}),
}


def gradients(shape: tuple[int, int], steps: int) -> list[torch.Tensor]:
    """A fixed part that dominates and drifts, and noise: singular values are apart, subspaces turn slowly."""
    rank = min(shape)
    left, right = torch.randn(shape[0], rank).double(), torch.randn(rank, shape[1]).double()
    spectrum = torch.diag(torch.arange(rank, 0, -1).double() ** 1.5)
    return [(left + 0.1 * t * torch.randn_like(left)) @ spectrum @ right / 50 for t in range(steps)]


@pytest.mark.parametrize("decay", ["before", "after"])
@pytest.mark.parametrize("transport", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_trajectory_equals_the_naive_reference(rule: str, proj_type: str, transport: str, decay: str) -> None:
    cls, hyper = RULES[rule]
    projection = {"rank": 3, "update_proj_gap": 4, "scale": 0.5, "proj_type": proj_type}
    for shape in SHAPES:
        W = torch.nn.Parameter(torch.randn(shape).double())
        reference = GaLoreReference(W.detach(), rule, 3, 4, 0.5, proj_type, transport, decay=decay, **hyper)
        optimizer = cls([W], projector="svd", transport=transport, decay=decay, **hyper, **projection)
        for G in gradients(shape, 10):
            W.grad = G.clone()
            optimizer.step()
            torch.testing.assert_close(W.detach(), reference.step(G), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_first_update_of_plain_sgd_is_the_best_rank_r_approximation(shape: tuple[int, int], proj_type: str) -> None:
    G = torch.randn(shape).double()
    W = torch.nn.Parameter(torch.zeros(shape).double())
    optimizer = g.GaLoreSGD([W], lr=1.0, rank=4, scale=1.0, proj_type=proj_type)
    W.grad = G.clone()
    optimizer.step()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(-W.detach(), U[:, :4] @ torch.diag(S[:4]) @ Vh[:4])


def test_unprojected_parameters_equal_torch_adamw() -> None:
    """torch divides by sqrt(v_hat) + eps; with eps = 0 both forms are one."""
    a = [torch.nn.Parameter(torch.randn(s).double()) for s in [(5, 3), (7,), (2, 3, 2, 2), ()]]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    ours = g.GaLoreAdamW(a, lr=0.01, eps=0.0, weight_decay=0.1)
    theirs = torch.optim.AdamW(b, lr=0.01, eps=0.0, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),  # decoupled decay acts on the whole weight: tested below
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.RAdam, {"lr": 0.01}),
        (torch.optim.Adamax, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1}),
        (torch.optim.Adadelta, {}),
        (torch.optim.ASGD, {"lr": 0.01}),
        (torch.optim.Rprop, {"lr": 0.01}),
        (torch.optim.Adafactor, {"lr": 0.01}),
    ],
)
def test_any_torch_optimizer_runs_on_the_coordinates_of_the_weight(base: type, kwargs: dict[str, Any]) -> None:
    """Oracle: the same class on a parameter that IS the coordinates x = basis^T W, in a basis that stays."""
    W0 = torch.randn(12, 8).double()
    grads = gradients((12, 8), 7)
    P = best_subspace(grads[0], 3, "right")
    x = torch.nn.Parameter(W0 @ P)
    plain = torch.nn.Parameter(torch.randn(5).double())
    W, bias = torch.nn.Parameter(W0.clone()), torch.nn.Parameter(plain.detach().clone())
    ours = g.GaLore(base, [{"params": [bias]}, {"params": [W], "rank": 3}], scale=1.0, update_proj_gap=100, **kwargs)
    theirs = base([plain, x], **kwargs)
    for G in grads:
        W.grad, bias.grad = G.clone(), torch.randn(5).double()
        x.grad, plain.grad = G @ P, bias.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(W.detach() @ P, x.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(bias, plain)
    outside = torch.eye(8).double() - P @ P.T
    torch.testing.assert_close(W.detach() @ outside, W0 @ outside, rtol=1e-9, atol=1e-9)


def test_base_class_equals_the_native_rule_across_refreshes() -> None:
    """Two implementations of one mathematics: torch.optim.AdamW inside the subspace, and our Adam rule with eps = 0."""
    kwargs: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.0, "weight_decay": 0.1}
    W, V = (torch.nn.Parameter(torch.ones(12, 8).double()) for _ in range(2))
    ours = g.GaLoreAdamW([W], rank=3, update_proj_gap=4, **kwargs)
    base = g.GaLore(torch.optim.AdamW, [V], rank=3, update_proj_gap=4, **kwargs)
    for G in gradients((12, 8), 11):
        W.grad, V.grad = G.clone(), G.clone()
        ours.step()
        base.step()
    torch.testing.assert_close(W, V, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_base_class_keeps_the_scale_of_a_matrix_at_full_rank(weight_decay: float) -> None:
    """A rank that is not smaller: the native rule and torch.optim.AdamW (eps = 0) must move the matrix alike, scale and decay included."""
    kwargs: dict[str, Any] = {"lr": 0.01, "eps": 0.0, "weight_decay": weight_decay, "rank": 8, "scale": 0.25}
    W, V = (torch.nn.Parameter(torch.ones(12, 8).double()) for _ in range(2))
    with pytest.warns(UserWarning, match="full rank"):
        ours, base = g.GaLoreAdamW([W], **kwargs), g.GaLore(torch.optim.AdamW, [V], **kwargs)
    for G in gradients((12, 8), 5):
        W.grad, V.grad = G.clone(), G.clone()
        ours.step()
        base.step()
    torch.testing.assert_close(W, V, rtol=1e-9, atol=1e-9)


def test_base_class_refuses_an_order_of_decay_it_cannot_choose() -> None:
    with pytest.raises(ValueError, match=r"decay='after'.*'before'"):
        g.GaLore(torch.optim.AdamW, [torch.nn.Parameter(torch.ones(12, 8))], rank=2, decay="after")


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (16, 64, 3), (8, 4, 2, 3, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensors_are_projected_as_matrices(shape: tuple[int, ...], channels_last: bool) -> None:
    """Oracle: the same optimizer on the (first, rest) matrix."""
    if channels_last and len(shape) != 4:
        pytest.skip("channels_last is a layout of four dimensions")
    W = torch.nn.Parameter(torch.randn(shape).double())
    M = torch.nn.Parameter(W.detach().flatten(1).clone())
    if channels_last:
        W.data = W.data.contiguous(memory_format=torch.channels_last)
    a, b = (g.GaLoreAdamW([p], lr=0.1, rank=2, update_proj_gap=2, weight_decay=0.1) for p in (W, M))
    for _ in range(5):
        G = torch.randn(shape).double()
        W.grad, M.grad = G.contiguous(memory_format=torch.channels_last) if channels_last else G, G.flatten(1)
        a.step()
        b.step()
    torch.testing.assert_close(W.detach().flatten(1), M.detach(), rtol=1e-12, atol=1e-12)


def test_transposed_parameters_are_updated_in_place() -> None:
    store = torch.randn(8, 12).double()
    W = torch.nn.Parameter(store.T)
    M = torch.nn.Parameter(store.T.contiguous())
    a, b = (g.GaLoreAdamW([p], lr=0.1, rank=2) for p in (W, M))
    G = torch.randn(12, 8).double()
    W.grad, M.grad = G.clone(), G.clone()
    a.step()
    b.step()
    torch.testing.assert_close(W, M)
    assert torch.equal(store.T, W.detach())


def test_large_parameters_are_processed_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at a time or all at once: the same bits, for every codec, projected or not, when blocks run along either axis."""
    from galore_torch.ops import chunks

    def train(codec: str, rank: int | None, shape: tuple[int, int]) -> torch.Tensor:
        torch.manual_seed(0)
        W = torch.nn.Parameter(torch.randn(shape))
        optimizer = g.GaLoreAdamW([W], lr=0.1, rank=rank, state_codec=codec, min_8bit_size=0, update_proj_gap=2)
        for _ in range(3):
            W.grad = torch.randn(shape)
            optimizer.step()
        return W.detach().clone()

    for codec in ("fp32", "int8"):
        for rank, shape in ((None, (300, 70)), (8, (600, 40)), (8, (40, 600))):
            whole = train(codec, rank, shape)
            with monkeypatch.context() as patch:
                patch.setattr(chunks, "CACHED", 512)
                assert torch.equal(train(codec, rank, shape), whole)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["adam", "adafactor", "momentum"])
def test_the_path_of_devices_the_host_cannot_read_gives_the_same_bits(name: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, decisions are masks on the device. The masked path run here must equal the branching one, bad gradients
    included: at the first step, at a refresh and between refreshes."""
    from galore_torch.engine import refresh
    from galore_torch.ops import linalg

    cls, hyper = RULES[name]

    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        W, b = torch.nn.Parameter(torch.randn(70, 300)), torch.nn.Parameter(torch.randn(70))
        optimizer = cls([W, b], rank=4, update_proj_gap=3, state_codec=codec, min_8bit_size=0, **hyper)
        trace = []
        for t in range(12):
            W.grad, b.grad = torch.randn(70, 300), torch.randn(70)
            if t in (0, 4):
                W.grad[1, 2] = b.grad[3] = float("nan")
            if t == 6:
                W.grad.zero_()
            if t == 7:
                W.grad[0, 0] = float("inf")
            optimizer.step()
            trace += [W.detach().clone(), b.detach().clone()]
        return trace

    branching = train()
    for module in (linalg, refresh):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    masked = train()
    for x, y in zip(branching, masked, strict=True):
        assert torch.equal(x, y)
        assert x.isfinite().all()
