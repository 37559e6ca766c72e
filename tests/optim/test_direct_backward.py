"""mode="direct": low-rank gradients made without the gradient. Oracle throughout: mode="project", which projects the full gradient."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import galore_torch as g
from galore_torch.optim.low_rank_grad import LowRankGrad

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (g.GaLoreAdamW, {}),
    "adamw8bit": (g.GaLoreAdamW8bit, {"min_8bit_size": 0, "basis_codec": "fp32"}),
    "adafactor": (g.GaLoreAdafactor, {}),
    "adagrad": (g.GaLoreAdagrad, {}),
    "sgd": (g.GaLoreSGD, {"momentum": 0.9}),
}
SIDES = ("std", "reverse_std", "left", "right", "full")


class Net(nn.Module):
    """Wide, tall and square layers, with and without bias, a norm and a head that is not projected."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.tall, self.square = nn.Linear(24, 48), nn.Linear(48, 48, bias=False)
        self.wide, self.norm, self.head = nn.Linear(48, 24), nn.LayerNorm(24), nn.Linear(24, 5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.square(F.silu(self.tall(x))))
        return self.head(self.norm(x + self.wide(h)))  # type: ignore[no-any-return]

    @property
    def matrices(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).weight for name in ("tall", "square", "wide")}


def optimizer_of(model: nn.Module, make: Any = g.GaLoreAdamW, rank: int = 6, **settings: Any) -> Any:
    matrices = list(getattr(model, "matrices", {}).values()) or [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    settings = {"update_proj_gap": 20, "scale": 1.0, "compile": False} | settings
    return make([{"params": matrices, "rank": rank}, {"params": rest}], lr=1e-2, **settings)


def batches(steps: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 7), width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, *shape, width, generator=generator, dtype=dtype)


def train(
    mode: str, steps: int = 50, net: Callable[[], nn.Module] = Net, micro: int = 1, clip: float | None = None, **settings: Any
) -> Any:
    """Weights after some steps on a regression, and the optimizer."""
    model = net()
    dtype = next(model.parameters()).dtype
    optimizer = optimizer_of(model, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g.fused_backward(model, optimizer, mode)
    for x in batches(steps, dtype):
        optimizer.zero_grad()
        for part in x.chunk(micro):
            (model(part) - part[..., :5].sin()).square().mean().div(micro).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, optimizer


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float) -> None:
    for name, value in wanted.items():
        distance = (got[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert distance <= rtol, (name, float(distance))


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("name", CLASSES)
def test_fifty_steps_and_two_refreshes_equal_those_of_project(name: str, proj_type: str) -> None:
    """In fp32 to 1e-5. Two need fp64, for they make a large difference of a rounding: int8 codes, which fall to one side or the other, and
    Adagrad's first step, the sign of R, where singular vectors on both sides make most of R zero but for rounding."""
    make, settings = CLASSES[name]
    exact = name == "adamw8bit" or (name, proj_type) == ("adagrad", "full")
    net = (lambda: Net(torch.float64)) if exact else Net
    wanted, _ = train("project", net=net, make=make, proj_type=proj_type, **settings)
    got, _ = train("direct", net=net, make=make, proj_type=proj_type, **settings)
    assert_same(got, wanted, 1e-5)


@pytest.mark.parametrize("mode", ["direct", "direct_update"])
@pytest.mark.parametrize("projector", ["power", "rsvd", "gram", "svd", "random", "rows"])
def test_every_projector_gives_what_project_gives(projector: str, mode: str) -> None:
    """In fp64, where nothing but a wrong formula could tell them apart."""
    other = "project" if mode == "direct" else "update"
    wanted, _ = train(other, net=lambda: Net(torch.float64), projector=projector)
    got, _ = train(mode, net=lambda: Net(torch.float64), projector=projector)
    assert_same(got, wanted, 1e-9)


@pytest.mark.parametrize(
    "settings", [{"transport": "keep"}, {"transport": "reset"}, {"gap_range": (5, 40)}, {"state_codec": "bf16"}], ids=str
)
def test_every_transport_and_the_adaptive_gap_give_what_project_gives(settings: dict[str, Any]) -> None:
    wanted, _ = train("project", net=lambda: Net(torch.float64), **settings)
    got, _ = train("direct", net=lambda: Net(torch.float64), **settings)
    assert_same(got, wanted, 1e-9)


@pytest.mark.parametrize("settings", [{"micro": 3}, {"clip": 0.05}, {"micro": 2, "clip": 0.05}], ids=str)
def test_accumulation_and_clipping_give_what_project_gives(settings: dict[str, Any]) -> None:
    wanted, _ = train("project", net=lambda: Net(torch.float64), **settings)
    got, _ = train("direct", net=lambda: Net(torch.float64), **settings)
    assert_same(got, wanted, 1e-9)


def test_no_gradient_is_ever_made_and_the_input_is_kept_projected() -> None:
    """What autograd holds between the passes, by storages: no input of a layer whose basis is on its side; afterwards no full gradient."""
    model = Net()
    optimizer = optimizer_of(model, proj_type="right", update_proj_gap=10_000, rank=4)
    g.fused_backward(model, optimizer, "direct")
    x = batches(1)[0]
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    held: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(tuple(t.shape)) or t, lambda t: t):
        y = model.square(F.silu(model.tall(x)))
    assert (28, 4) in held
    assert (28, 24) not in held
    assert held.count((28, 4)) == 2
    y.sum().backward()
    for p in (model.tall.weight, model.square.weight):
        assert isinstance(p.grad, LowRankGrad)
        assert p.grad.low.shape == (p.shape[0], 4)


def gpt2_layer() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    return nn.Sequential(pytorch_utils.Conv1D(48, 24), nn.GELU(), pytorch_utils.Conv1D(5, 48)).double()


@pytest.mark.parametrize("proj_type", SIDES)
def test_conv1d_of_gpt2_gives_what_project_gives(proj_type: str) -> None:
    wanted, _ = train("project", net=gpt2_layer, rank=3, proj_type=proj_type)
    got, _ = train("direct", net=gpt2_layer, rank=3, proj_type=proj_type)
    assert_same(got, wanted, 1e-9)


def test_int8_layers_give_what_project_gives() -> None:
    """R to rounding; the weight then differs by a level of INT8 where a rounding falls the other way."""
    grads = []
    for mode in ("project", "direct"):
        model = Net()
        g.quantize_linears(model, targets=["tall", "square", "wide"])
        optimizer = optimizer_of(model, g.QGaLoreAdamW8bit, min_8bit_size=0)
        g.fused_backward(model, optimizer, mode)
        model(batches(1)[0]).square().sum().backward()
        grads.append({name: p.grad.low for name, p in model.matrices.items()})  # type: ignore[union-attr]
    assert_same(grads[1], grads[0], 1e-5)


def test_q_galore_trains() -> None:
    model = Net()
    g.quantize_linears(model, targets=["tall", "square", "wide"])
    optimizer = optimizer_of(model, g.QGaLoreAdamW8bit, min_8bit_size=0)
    g.fused_backward(model, optimizer, "direct_update")
    losses = []
    for x in batches(60):
        loss = (model(x) - x[..., :5].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_project_gives(dtype: torch.dtype) -> None:
    """Half precision rounds the gradient in one and the input's projection in the other: equal to a few roundings. The oracle is fp32."""
    grads = []
    for mode, autocast in (("direct", True), ("project", False)):
        model = Net()
        optimizer = optimizer_of(model, rank=6)
        g.fused_backward(model, optimizer, mode)
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = model(batches(1)[0])
        out.float().square().sum().backward()
        grads.append({name: model.matrices[name].grad.low.norm() for name in model.matrices})  # type: ignore[union-attr]
    for name, norm in grads[1].items():  # the bases span the same space up to rounding, so the norms agree
        assert abs(grads[0][name] / norm - 1) < 0.03


def test_bf16_weights_train_as_in_project() -> None:
    losses: dict[str, float] = {}
    for mode in ("project", "direct"):
        model = Net(torch.bfloat16)
        optimizer = optimizer_of(model)
        g.fused_backward(model, optimizer, mode)
        total = 0.0
        for x in batches(60, torch.bfloat16):
            optimizer.zero_grad()
            loss = (model(x) - x[..., :5].sin()).float().square().mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses[mode] = total
    assert abs(losses["direct"] / losses["project"] - 1) < 0.02


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro", [1, 2])
def test_checkpointed_layers_give_what_project_gives(reentrant: bool, micro: int) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()  # a reentrant checkpoint needs an input with a gradient
            return checkpoint(super().forward, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    wanted, _ = train("project", net=lambda: Net(torch.float64), micro=micro)
    got, _ = train("direct", net=lambda: Checkpointed(torch.float64), micro=micro)
    assert_same(got, wanted, 1e-9)


def test_recomputation_after_another_backward_pass_makes_the_same_choice() -> None:
    """Two forward passes, then two backward passes: the second is recomputed when the basis has been found already."""
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    x = batches(2).requires_grad_()
    losses = [checkpoint(model, part, use_reentrant=False).sum() for part in x]
    for loss in losses:
        loss.backward()
    low = {name: p.grad.low.clone() for name, p in model.matrices.items()}  # type: ignore[union-attr]
    again = Net()
    optimizer = optimizer_of(again)
    g.fused_backward(again, optimizer, "project")
    for part in x.detach():
        again(part).sum().backward()
    assert_same(low, {name: p.grad.low for name, p in again.matrices.items()}, 1e-4)  # type: ignore[union-attr]


def test_skipped_steps_and_gradients_that_are_not_finite_are_as_in_project() -> None:
    weights = []
    for mode in ("project", "direct"):
        model = Net(torch.float64)
        optimizer = optimizer_of(model)
        g.fused_backward(model, optimizer, mode)
        for step, x in enumerate(batches(30, torch.float64)):
            factor = float("nan") if step in (0, 7) else float("inf") if step == 9 else 1.0
            (model(x).square().mean() * factor).backward()
            if step not in (4, 20):  # a step that is left out
                optimizer.step()
            optimizer.zero_grad()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_same(weights[1], weights[0], 1e-9)
    assert all(p.isfinite().all() for p in weights[1].values())


@pytest.mark.parametrize("mode", ["direct", "direct_update"])
def test_a_run_that_is_saved_and_resumed_goes_on_to_the_last_bit(mode: str) -> None:
    def run(model: nn.Module, optimizer: Any, data: Tensor) -> None:
        for x in data:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, mode)
    data = batches(45)
    run(model, optimizer, data[:23])
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, data[23:])
    other = Net()
    other.load_state_dict(saved[0])
    fresh = optimizer_of(other)
    fresh.load_state_dict(saved[1])
    g.fused_backward(other, fresh, mode)
    run(other, fresh, data[23:])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_gradient_scaler_scales_and_skips() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for factor in (float("inf"), 1.0):
        scaler.scale(model(batches(1)[0]).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(before[name], p) for name, p in model.named_parameters())
        assert moved == (factor == 1.0)
    assert scaler.get_scale() == 2.0**9


# --- where it is not used ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.silu(self.body(self.embedding(tokens))))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A layer that runs twice, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(24, 24).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.silu(self.layer(x)))  # type: ignore[no-any-return]


class Outside(nn.Module):
    """A weight that is read outside of its layer too; ``first``: before it is in its layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(24, 24).double(), nn.Linear(24, 24).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x)) + F.linear(x, self.layer.weight.square())  # type: ignore[no-any-return]


def weights_after(model: nn.Module, mode: str, data: Tensor, rank: int = 4, gap: int = 5) -> dict[str, Tensor]:
    optimizer = g.GaLoreAdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() == 2], "rank": rank},
            {"params": [p for p in model.parameters() if p.dim() < 2]},
        ],
        lr=1e-2,
        update_proj_gap=gap,
        compile=False,
    )
    g.fused_backward(model, optimizer, mode)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_tied_head_is_listed_and_trains_as_in_project() -> None:
    data = torch.randint(40, (12, 3, 5), generator=torch.Generator().manual_seed(2))
    wanted = weights_after(Tied(), "project", data)
    with pytest.warns(UserWarning, match=r"1 matrices.*embedding.weight = head.weight"):
        got = weights_after(Tied(), "direct", data)
    assert_same(got, wanted, 1e-9)


@pytest.mark.parametrize("modes", [("project", "direct"), ("update", "direct_update")], ids=str)
def test_a_layer_that_runs_twice_has_the_sum_of_both_gradients(modes: tuple[str, str]) -> None:
    data = batches(12, torch.float64)
    wanted = weights_after(Twice(), modes[0], data)
    assert_same(weights_after(Twice(), modes[1], data), wanted, 1e-9)


def test_a_weight_that_is_read_outside_of_its_layer_has_its_whole_gradient_and_is_listed_once() -> None:
    """With a basis that looks at no gradient, for the first pass finds out by the part of it that came first."""
    weights = []
    for mode in ("project", "direct"):
        model = Outside()
        params = [{"params": [p for p in model.parameters() if p.dim() == 2], "rank": 4, "projector": "random"}]
        optimizer = g.GaLoreAdamW(params, lr=1e-2, update_proj_gap=5, compile=False)
        g.fused_backward(model, optimizer, mode)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for x in batches(12, torch.float64):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert [str(w.message).split()[0] for w in seen] == (["layer.weight"] if mode == "direct" else [])
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_same(weights[1], weights[0], 1e-9)


def test_other_weights_in_the_layers_get_their_ordinary_gradients() -> None:
    """functional_call: the layer computes with the caller's tensors, and theirs are the gradients."""
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x = batches(1)[0]
    torch.func.functional_call(model, other, (x,)).sum().backward()
    plain = Net()
    plain(x).sum().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(other[name].grad, p.grad)
    assert all(p.grad is None for p in model.parameters())
    grads = torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).sum())(other)
    torch.testing.assert_close(grads["tall.weight"], plain.tall.weight.grad)


def test_a_second_derivative_is_refused() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    x = batches(1)[0].requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice through \w+\.weight.*mode='project'"):
        first.sum().backward()


def test_a_lora_wrapped_layer_gives_what_project_gives() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def wrapped() -> nn.Module:
        model = Net()
        made = peft.get_peft_model(nn.Sequential(model), peft.LoraConfig(target_modules=["square"], r=2, init_lora_weights=True))
        for name, p in made.named_parameters():
            p.requires_grad_("lora_" not in name)
        return made.double()  # type: ignore[no-any-return]

    results = []
    for mode in ("project", "direct"):
        torch.manual_seed(3)
        model = wrapped()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.dim() == 2], "rank": 4}, {"params": [p for p in trained if p.dim() < 2]}]
        optimizer = g.GaLoreAdamW(groups, lr=1e-2, update_proj_gap=5, compile=False)
        g.fused_backward(model, optimizer, mode)
        for x in batches(12, torch.float64):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_same(results[1], results[0], 1e-9)


def test_hooks_that_read_the_input_later_read_it() -> None:
    model = Net()
    optimizer = optimizer_of(model, proj_type="right")
    g.fused_backward(model, optimizer, "direct")
    x = batches(2)
    model(x[0]).sum().backward()
    optimizer.step()
    seen: list[Tensor] = []
    model.square.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    out = model(x[1]).sum()
    before = seen[0].clone()
    out.backward()
    assert torch.equal(seen[0], before)


def test_removed_and_copied_and_pickled_models_are_plain() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    attachment = g.fused_backward(model, optimizer, "direct")
    for plain in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(plain.tall) is nn.Linear
        plain(batches(1)[0]).sum().backward()
        assert type(plain.tall.weight.grad) is Tensor
        assert all(p.grad is None for p in model.parameters())
    attachment.remove()
    assert type(model.tall) is nn.Linear
    assert not [key for key in vars(model.tall) if key.startswith("_direct")]
    model(batches(1)[0]).sum().backward()
    assert type(model.tall.weight.grad) is Tensor


def test_without_its_optimizer_a_model_is_plain() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    del optimizer
    model(batches(1)[0]).sum().backward()
    assert type(model.tall.weight.grad) is Tensor


def test_rows_that_read_the_gradient_are_refused() -> None:
    model = Net()
    for settings in ({"recovery": "fira"}, {"carry": "error_feedback"}):
        with pytest.raises(ValueError, match="reads the full gradient"):
            g.fused_backward(model, optimizer_of(model, **settings), "direct")


def test_what_update_refuses_is_refused_in_direct_update() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct_update")
    model(batches(1)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="consumed inside the backward pass"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="consumed inside the backward pass"):
        model(batches(1)[0]).sum().backward()


def test_a_weight_that_is_written_between_the_passes_is_an_error() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    x = batches(2)
    first = model(x[0]).sum()
    model(x[1]).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


COMPILED: dict[str, dict[str, Any]] = {
    "std": {},
    "right": {"proj_type": "right"},
    "left": {"proj_type": "left"},
    "direct_update": {"mode": "direct_update"},
    "int8": {"quantised": True},
    "autocast": {"autocast": True},
    "checkpointed": {"checkpointed": True},
    "conv1d": {"net": gpt2_layer},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools:UserWarning")
@pytest.mark.parametrize("name", [*("std", "right", "left"), *(pytest.param(n, marks=pytest.mark.slow) for n in list(COMPILED)[3:])])
def test_compiled_layers_give_what_eager_ones_give_in_one_graph(name: str) -> None:
    """Over two refreshes, without a graph break; the graph is made once for all steps."""
    from torch._dynamo.utils import counters

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        results.append(_compiled_run(compiled, **COMPILED[name]))
        if compiled:
            assert not counters["graph_break"]
            assert counters["stats"]["unique_graphs"] == 1
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def _compiled_run(
    compiled: bool,
    net: Callable[[], nn.Module] = Net,
    mode: str = "direct",
    quantised: bool = False,
    autocast: bool = False,
    checkpointed: bool = False,
    **settings: Any,
) -> list[float]:
    """The losses of ten steps."""
    model = net()
    if quantised:
        g.quantize_linears(model, targets=["tall", "square", "wide"])
    make = g.QGaLoreAdamW8bit if quantised else g.GaLoreAdamW
    optimizer = optimizer_of(model, make, update_proj_gap=4, rank=3, **settings)
    g.fused_backward(model, optimizer, mode)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)  # type: ignore[no-any-return]

    called = torch.compile(forward) if compiled else forward
    losses = []
    for x in batches(10, next(model.parameters()).dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = called(x)
        loss = (out.float() - x[..., :5].sin().float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
