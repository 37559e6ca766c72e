"""mode="direct" for weights (E x m x n) of experts. Oracle: mode="project", which projects the full gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import galore_torch as g
from galore_torch.optim.low_rank_grad import LowRankGrad
from support.failing import Fails

EXPERTS, WIDTH, INNER = 3, 20, 28


# Tokens are more than the rank: of a gradient of lower rank the rest of a basis is whatever rounding makes of it.


class Experts(nn.Module):
    """How mixtures write it. ``way``: one expert at a time, all at once, or groups of rows; each token meets the expert of its number."""

    def __init__(self, way: str):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)  # stored as input x output
        if way != "grouped":  # which torch has in fp32 at most
            self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "bmm":
            return torch.bmm(F.silu(x @ self.up.mT), self.down)
        if self.way == "grouped":
            tokens = x.shape[1]
            offsets = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * tokens
            inner = F.silu(F.grouped_mm(x.flatten(0, 1), self.up.mT, offs=offsets))
            return F.grouped_mm(inner, self.down, offs=offsets).view_as(x)
        out = []
        for expert, tokens in enumerate(x):
            weight = self.up[torch.tensor(expert)]
            inner = F.silu(F.linear(tokens, weight) if self.way == "linear" else tokens @ weight.T)
            out.append(inner @ self.down[expert])
        return torch.stack(out)


def run(way: str, mode: str, steps: int = 15, **settings: Any) -> tuple[Experts, Any]:
    model = Experts(way)
    optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=5, compile=False, **settings)
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g.fused_backward(model, optimizer, mode)
        for x in torch.randn(steps, EXPERTS, 24, WIDTH, generator=generator).to(model.up.dtype):
            optimizer.zero_grad()
            for part in x.chunk(2, 1):
                (model(part) - part.sin()).square().mean().backward()
            optimizer.step()
    return model, optimizer


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    for p, q in zip(got.parameters(), wanted.parameters(), strict=True):
        assert (p - q).norm() <= (1e-9 if p.dtype == torch.float64 else 1e-5) * q.norm()


@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
@pytest.mark.parametrize("way", ["linear", "matmul", "bmm", "grouped"])
def test_experts_train_as_in_project(way: str, proj_type: str) -> None:
    """Three refreshes, two micro-batches."""
    assert_same(run(way, "direct", proj_type=proj_type)[0], run(way, "project", proj_type=proj_type)[0])


@pytest.mark.parametrize("way", ["linear", "bmm", "grouped"])
def test_between_refreshes_no_gradient_of_the_experts_is_made(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ordinary gradients that reach the optimizer."""
    model, optimizer = run(way, "direct", steps=9)
    optimizer.zero_grad()
    seen: list[Tensor] = []
    monkeypatch.setattr(optimizer, "compress_gradient", lambda p, group: seen.append(p))
    before = {p: optimizer.state[p]["step"] for p in model.parameters()}
    due = [p for p in model.parameters() if (before[p] - int(5 * (optimizer.state[p]["index"] * 0.6180339887498949 % 1.0))) % 5 == 0]
    assert not due, "a step without a refresh was meant"
    model(torch.randn(EXPERTS, 3, WIDTH, dtype=model.up.dtype)).square().sum().backward()
    assert not seen
    assert all(isinstance(p.grad, LowRankGrad) for p in model.parameters())


def test_an_expert_that_meets_its_first_token_later_gets_its_basis_then() -> None:
    results = []
    for mode in ("project", "direct"):
        model = Experts("linear")
        optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=50, compile=False)
        g.fused_backward(model, optimizer, mode)
        generator = torch.Generator().manual_seed(1)
        for step in range(8):
            x = torch.randn(EXPERTS, 12, WIDTH, generator=generator, dtype=torch.float64)
            out = model(x)
            used = out[:2] if step < 3 else out  # the last expert adds nothing to the loss at first
            used.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(bool(optimizer.state[p]["basis_ready"].all()) for p in model.parameters())
        results.append(model)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("way", ["linear", "bmm"])
def test_a_pass_for_other_tensors_adds_nothing_and_one_that_names_the_experts_all(way: str) -> None:
    results = []
    for mode in ("project", "direct"):
        model = Experts(way)
        optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=5, compile=False)
        g.fused_backward(model, optimizer, mode)
        for i, x in enumerate(torch.randn(8, EXPERTS, 12, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)):
            torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)
            for _ in range(2):
                model(x).square().mean().backward(inputs=[model.up, model.down] if i % 2 else [model.down])
            assert (model.up.grad is None) == (i % 2 == 0)
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    assert_same(results[1], results[0])


def test_direct_update_gives_what_direct_gives() -> None:
    assert_same(_updated("direct_update"), _updated("direct"))


def _updated(mode: str) -> nn.Module:
    model = Experts("linear")
    optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=5, compile=False)
    g.fused_backward(model, optimizer, mode)
    generator = torch.Generator().manual_seed(1)
    for x in torch.randn(12, EXPERTS, 12, WIDTH, generator=generator, dtype=torch.float64):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_an_unknown_use_is_listed_once_and_trains_as_in_project() -> None:
    class Einsum(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("etn,emn->etm", x, self.up) @ self.down

    results = []
    for mode in ("project", "direct"):
        model = Einsum("")
        optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=5, compile=False)
        g.fused_backward(model, optimizer, mode)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            generator = torch.Generator().manual_seed(1)
            for x in torch.randn(8, EXPERTS, 12, WIDTH, generator=generator, dtype=torch.float64):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert [str(w.message).split()[0] for w in seen] == (["up"] if mode == "direct" else [])
        results.append(model)
    assert_same(results[1], results[0])


def shifted(w: Tensor) -> Tensor:
    """A matrix that begins in one expert and ends in the next."""
    return w.flatten(0, 1)[5 : 5 + INNER]


def unseen(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w[1]


VIEWS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {  # a product with a view of the experts, and whether R is made of it
    "one, broadcast": (lambda x, w: x @ w[1:2].mT, True),
    "one, expanded": (lambda x, w: torch.bmm(x, w[2].expand_as(w).mT), True),
    "one, for all tokens": (lambda x, w: x @ w[1].mT, True),
    "one, before fewer axes": (lambda x, w: x[0] @ w[1:2].mT, True),
    "some": (lambda x, w: torch.bmm(x[:2], w[1:].mT), True),
    "every other one": (lambda x, w: x[1:] @ w[::2].mT, True),
    "twice over": (lambda x, w: x[1:] @ w.as_strided((2, INNER, WIDTH), (0, WIDTH, 1), INNER * WIDTH).mT, True),
    "the other way round": (lambda x, w: x @ w.flip(0).mT, False),
    "those of a list": (lambda x, w: x @ w[[2, 2, 0]].mT, False),
    "four axes": (lambda x, w: x @ w.unsqueeze(0).mT, False),
    "tokens broadcast": (lambda x, w: x[:1] @ w.mT, False),
    "between two": (lambda x, w: x @ shifted(w).T, False),
    "made without gradients": (lambda x, w: x @ unseen(w).mT + x @ w[0].mT, True),
    "detached": (lambda x, w: x @ w.detach()[1].mT + x @ w[0].mT, True),
}


@pytest.mark.filterwarnings("ignore:w is used otherwise")
@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("name", VIEWS)
def test_each_view_of_the_experts_has_its_own_gradient(name: str, proj_type: str) -> None:
    """Oracle: the gradients of the input and of the weight that plain autograd makes, the latter projected."""
    product, is_direct = VIEWS[name]
    model = Views().double()
    optimizer = g.GaLoreAdamW([{"params": [model.w], "rank": 4, "proj_type": proj_type}], update_proj_gap=50, compile=False)
    attachment = g.fused_backward(model, optimizer, "direct")
    x = torch.randn(EXPERTS, 24, WIDTH, dtype=torch.float64, requires_grad=True)
    model(x, lambda x, w: x @ w.mT).square().mean().backward()  # makes the bases
    optimizer.step()
    optimizer.zero_grad()
    w = model.w.detach().clone().requires_grad_()
    wanted = torch.autograd.grad(product(x, w).square().mean(), (x, w))
    x.grad = None
    model(x, product).square().mean().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted[0])
    assert isinstance(model.w.grad, LowRankGrad)
    basis = optimizer.state[model.w]["basis"]
    torch.testing.assert_close(model.w.grad.low, basis.mT @ wanted[1] if proj_type == "left" else wanted[1] @ basis)
    assert (attachment.left == []) == is_direct


def test_a_group_of_rows_for_each_of_some_experts() -> None:
    results = []
    for mode in ("project", "direct"):
        model = Views()
        optimizer = g.GaLoreAdamW([{"params": [model.w], "rank": 4}], lr=1e-2, update_proj_gap=50, compile=False)
        g.fused_backward(model, optimizer, mode)
        for i, x in enumerate(torch.randn(6, EXPERTS, 24, WIDTH, generator=torch.Generator().manual_seed(1))):
            first = int(i > 1)
            offsets = torch.arange(1, EXPERTS - first + 1, dtype=torch.int32) * 24
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(x, lambda x, w: F.grouped_mm(x[first:].flatten(0, 1), w[first:].mT, offs=offsets)).square().mean().backward()  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("due", [False, True])
def test_a_pass_that_failed_leaves_nothing_behind(due: bool) -> None:
    """It ends when some of the experts have been differentiated, in the midst of an accumulation or before it."""

    def failing(x: Tensor, w: Tensor) -> Tensor:
        first: Tensor = Fails.apply(x[0] @ w[0].mT)  # type: ignore[no-untyped-call]
        return torch.cat([first, *(x[i] @ w[i].mT for i in (1, 2))])

    results = []
    for mode in ("project", "direct"):
        model = Views().double()
        optimizer = g.GaLoreAdamW([{"params": [model.w], "rank": 4}], lr=1e-2, update_proj_gap=1 if due else 50, compile=False)
        attachment = g.fused_backward(model, optimizer, mode)
        for i, x in enumerate(torch.randn(6, EXPERTS, 24, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)):
            for part in (x, 2 * x) if i % 2 else (x,):
                with pytest.raises(ValueError, match="out-of-memory"):
                    model(part, failing).square().mean().backward()
                model(part, lambda x, w: x @ w.mT).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not attachment.left
        results.append(model)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("late", [False, True])
def test_two_forward_passes_before_two_backward_passes(late: bool) -> None:
    """``late``: one expert has no basis yet, and gets its own between the backward passes, in which the others keep theirs."""
    results = []
    for mode in ("project", "direct"):
        model = Experts("linear")
        optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=5, compile=False)
        attachment = g.fused_backward(model, optimizer, mode)
        for i, x in enumerate(torch.randn(8, EXPERTS, 12, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)):
            used = EXPERTS - int(late and i < 2)
            losses = [model(part)[:used].square().mean() for part in (x, 2 * x + 1)]
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not attachment.left
        results.append(model)
    assert_same(results[1], results[0])


def test_a_second_derivative_is_refused() -> None:
    model, _optimizer = run("bmm", "direct", steps=4)
    x = torch.randn(EXPERTS, 24, WIDTH, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice through (up|down).*mode='project'"):
        first.sum().backward()


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_checkpoint_loaded_between_the_passes_is_an_error(proj_type: str) -> None:
    model, optimizer = run("bmm", "direct", steps=4, proj_type=proj_type)
    loss = model(torch.randn(EXPERTS, 24, WIDTH, dtype=torch.float64)).square().mean()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"basis of layer (up|down) has changed.*load_state_dict"):
        loss.backward()
    optimizer.zero_grad()
    model(torch.randn(EXPERTS, 24, WIDTH, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


class Views(nn.Module):
    """Experts that are multiplied as the caller says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return product(x, self.w)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("way", ["linear", "bmm"])
def test_compiled_experts_are_listed_once_and_train_as_in_project(way: str) -> None:
    """No graph break, and gradients that are made in full."""
    results = []
    for mode in ("project", "direct"):
        torch._dynamo.reset()
        model = Experts(way)
        optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], lr=1e-2, update_proj_gap=3, compile=False)
        attachment = g.fused_backward(model, optimizer, mode)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for x in torch.randn(7, EXPERTS, 12, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
                compiled(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ours = [str(w.message) for w in seen if "gradient is made in full" in str(w.message)]
        assert sorted(text.split()[0] for text in ours) == sorted(attachment.left) == (["down", "up"] if mode == "direct" else [])
        assert all("in a compiled module" in text for text in ours)
        results.append(model)
    assert_same(results[1], results[0])


def test_a_copy_is_plain_and_remove_ends_it() -> None:
    model = Experts("linear")
    optimizer = g.GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}], compile=False)
    attachment = g.fused_backward(model, optimizer, "direct")
    assert type(copy.deepcopy(model)) is Experts
    attachment.remove()
    assert type(model) is Experts
    assert not [key for key in vars(model) if key.startswith("_direct")]


def test_a_mixture_of_transformers_trains_as_in_project() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    results = []
    for mode in ("project", "direct"):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
        optimizer = g.GaLoreAdamW(g.galore_param_groups(model, 8, update_proj_gap=5), lr=1e-2, compile=False)
        g.fused_backward(model, optimizer, mode)
        words = torch.randint(64, (8, 4, 24), generator=torch.Generator().manual_seed(1))
        for each in words:
            model(input_ids=each, labels=each).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    assert_same(results[1], results[0])
