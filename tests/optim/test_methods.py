"""The family by name: each method is its settings and nothing else, and works, or is refused by what its rows declare, in every mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.engine.layout import layout_of
from galore_torch.engine.recipe import needs_gradient
from galore_torch.engine.stored import state_spec
from galore_torch.optim.methods import METHODS
from galore_torch.train.optimizers.registry import OPTIMIZERS, build_optimizer
from galore_torch.train.plan.optimizer_bytes import param_bytes
from support.memory import storage_bytes

LAYERS = "layers"
each_method = pytest.mark.parametrize("name", METHODS)
# Settings of every optimizer where no flag is given; four steps are a run here.
SETTINGS: dict[str, Any] = {
    "rank": 8,
    "rank_is_given": True,
    "update_proj_gap": None,
    "galore_scale": None,
    "gap_range": None,
    "proj_type": "std",
    "weight_decay": 0.0,
    "targets": ("layers",),
    "beta1": None,
    "cycle_length": None,
    "random_after": 2,
}


class Body(nn.Module):
    """Two linear layers, between them a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((32, 48), (48, 32)))
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.gain


def made(name: str, model: nn.Module, **settings: Any) -> Any:
    own = {"random_after": 2} if name == "golore" else {}
    return g.low_rank_optimizer(g.galore_param_groups(model, METHODS[name].rank or 8, targets=LAYERS), name, **{**own, **settings})


def train(model: nn.Module, optimizer: Any, steps: int = 4, seed: int = 0) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        loss = (model(torch.randn(64, 32, generator=generator)) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def body() -> Body:
    torch.manual_seed(3)
    return Body()


def trained(name: str, mode: str | None = None, **settings: Any) -> list[Tensor]:
    model = body()
    optimizer = made(name, model, **settings)
    attached = g.fused_backward(model, optimizer, mode) if mode else None
    train(model, optimizer)
    if attached:
        attached.remove()
    return [p.detach() for p in model.parameters()]


@each_method
def test_each_method_learns_with_its_own_settings(name: str) -> None:
    model = body()
    losses = train(model, made(name, model), 40)
    assert losses[-1] < 0.9 * losses[0]


@each_method
def test_groups_with_a_rank_have_the_papers_settings_and_all_others_those_of_the_class(name: str) -> None:
    model = body()
    optimizer = made(name, model)
    rest, projected = optimizer.param_groups
    assert {key: projected[key] for key in METHODS[name].settings} == dict(METHODS[name].settings)
    plain = g.GaLoreAdamW([nn.Parameter(torch.zeros(2))], lr=METHODS[name].lr).param_groups[0]
    assert {key: value for key, value in rest.items() if key not in ("params", "param_names")} == {
        key: value for key, value in plain.items() if key != "params"
    }


@each_method
def test_a_method_without_a_rank_is_refused(name: str) -> None:
    """It would be AdamW under another name, at a rate that is too high for it."""
    with pytest.raises(ValueError, match=rf"recipe='{name}' .* none has one: give galore_param_groups\(model, rank=128\), or rank=128"):
        g.low_rank_optimizer(body().parameters(), name, random_after=2)


@pytest.mark.parametrize("name", ["muon", "galore_muon"])
def test_muon_is_a_class(name: str) -> None:
    with pytest.raises(ValueError, match=r"GaLoreMuon\(groups\), for Muon itself with rank='full'"):
        g.low_rank_optimizer(body().parameters(), name, rank=8)


@each_method
def test_the_command_builds_the_same_optimizer_under_the_same_name(name: str) -> None:
    """Rank and random_after are what the command would give; the rest is the method's."""
    model = body()
    built = build_optimizer(name, model, lr=OPTIMIZERS[name].default_lr, settings={**SETTINGS, "rank": METHODS[name].rank or 8})
    for mine, theirs in zip(made(name, model).param_groups, built.param_groups, strict=True):
        assert {key: value for key, value in mine.items() if key != "params"} == {
            key: value for key, value in theirs.items() if key != "params"
        }
    assert OPTIMIZERS[name].default_lr == METHODS[name].lr


@each_method
def test_what_the_caller_says_comes_before_the_paper(name: str) -> None:
    model = body()
    own = {"random_after": 2} if name == "golore" else {}
    groups = g.galore_param_groups(model, 4, targets=LAYERS, scale=0.125)
    rest, projected = g.low_rank_optimizer(groups, name, lr=0.5, betas=(0.5, 0.6), state_codec="int8", **own).param_groups
    assert (projected["scale"], projected["rank"]) == (0.125, 4)
    for group in (rest, projected):
        assert (group["lr"], group["betas"], group["state_codec"]) == (0.5, (0.5, 0.6), "int8")
    assert all("recovery" not in group for group in groups), "the caller's groups stay as they are"


def test_parameters_without_groups_take_a_rank_as_an_argument() -> None:
    optimizer = g.low_rank_optimizer(body().parameters(), "apollo", rank=8)
    assert [group["recovery"] for group in optimizer.param_groups] == ["apollo"]


def test_a_name_that_is_not_known_and_a_step_that_is_missing_are_refused() -> None:
    with pytest.raises(ValueError, match="recipe='apolo' is not known; choose one of 'fira', 'apollo'"):
        g.low_rank_optimizer(body().parameters(), "apolo")
    with pytest.raises(ValueError, match="recipe='golore' needs random_after: the step from which on bases are random"):
        g.low_rank_optimizer(body().parameters(), "golore", rank=8)


@pytest.mark.parametrize("mode", ["update", "project", "direct", "direct_update"])
@each_method
def test_inside_the_backward_pass_it_is_the_same_training_or_refused_by_what_it_reads(name: str, mode: str) -> None:
    """Oracle: the run without fused_backward. A direct mode's basis comes from the factors of the gradient, so not all bits are equal."""
    reads = needs_gradient(made(name, body()).param_groups[1])
    if reads and mode != "update":
        with pytest.raises(ValueError, match=rf"{reads} reads the full gradient"):
            trained(name, mode)
        return
    for found, expected in zip(trained(name, mode), trained(name), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_method
def test_int8_weights_train_as_floating_ones_do(name: str) -> None:
    """A step is a few of their grid: the loss falls as far."""
    losses = []
    for quantized in (True, False):
        model = body()
        if quantized:
            g.quantize_linears(model, targets=LAYERS)
        losses.append(train(model, made(name, model), 40))
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.15, abs=5e-3)


@each_method
def test_eight_bit_moments_train_as_exact_ones_do(name: str) -> None:
    losses = []
    for codec in ("int8", "fp32"):
        model = body()
        losses.append(train(model, made(name, model, state_codec=codec, min_8bit_size=0), 40))
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.15, abs=5e-3)


@each_method
def test_tensors_are_projected_or_refused_by_the_method_that_is_for_matrices(name: str) -> None:
    kernel = nn.Parameter(torch.randn(16, 12, 3, 3))
    own = {"random_after": 2} if name == "golore" else {}
    if name in ("golore", "ldadam"):  # their rows have no tensor form either, and say so
        with pytest.raises(ValueError, match="tensor=True"):
            g.low_rank_optimizer([kernel], name, rank=0.25, tensor=True, **own)
        return
    with pytest.raises(ValueError, match=r"tensor=True|projected sides"):
        g.low_rank_optimizer([kernel], name, rank=0.25, tensor=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_method
def test_the_state_is_what_the_planner_says(name: str, dtype: torch.dtype) -> None:
    model = body().to(dtype)
    optimizer = made(name, model, state_codec="int8", min_8bit_size=0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            held = storage_bytes(optimizer.state[p])
            assert held == sum(spec.nbytes for spec in state_spec(layout_of(p, group), group, optimizer.rule).values())
            planned = param_bytes(tuple(p.shape), dtype, group, optimizer.rule)
            assert planned.basis + planned.moments == held


def test_beta2_halves_a_gradients_weight_after_the_half_life() -> None:
    beta2 = g.beta2_of_half_life(16384, 1e7)
    assert beta2 ** (1e7 / 16384) == pytest.approx(0.5)
    assert g.beta2_of_half_life(16384, math.log(0.5) / math.log(0.999) * 16384) == pytest.approx(0.999)
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"tokens_per_step=.* is no number of tokens"):
            g.beta2_of_half_life(bad)
        with pytest.raises(ValueError, match=r"half_life=.* is no number of tokens"):
            g.beta2_of_half_life(1024, bad)


# --- edges ------------------------------------------------------------------------------------------------------------------


@each_method
def test_a_group_that_is_added_later_is_of_the_method_too(name: str) -> None:
    first = [{"params": [nn.Parameter(torch.zeros(32, 48))], "rank": 8}]
    optimizer = g.low_rank_optimizer(first, name, **({"random_after": 2} if name == "golore" else {}))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(32, 48))], "rank": 8})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(32))]})
    given, added, rest = ({k: v for k, v in group.items() if k not in ("params", "param_names")} for group in optimizer.param_groups)
    assert added == given
    plain = g.GaLoreAdamW([nn.Parameter(torch.zeros(2))], lr=optimizer.defaults["lr"]).param_groups[0]
    assert (rest["recovery"], rest["projector"]) == (plain["recovery"], plain["projector"])


def test_a_method_needs_its_setting_in_every_group_with_a_rank() -> None:
    p, v = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))
    for groups, settings in (
        ([{"params": [p], "rank": 4}], {"random_after": None}),
        ([{"params": [v], "random_after": 5}, {"params": [p], "rank": 4}], {}),
    ):
        with pytest.raises(ValueError, match="recipe='golore' needs random_after"):
            g.low_rank_optimizer(groups, "golore", **settings)


def test_no_parameters_are_refused() -> None:
    parameters = Body().parameters()
    list(parameters)
    with pytest.raises(ValueError, match="empty parameter list"):
        g.low_rank_optimizer(parameters, "apollo", rank=4)
    with pytest.raises(TypeError, match="params is one tensor"):
        g.low_rank_optimizer(nn.Parameter(torch.zeros(8, 8)), "apollo", rank=4)


@each_method
def test_a_learning_rate_of_one_element_is_that_number(name: str) -> None:
    moved = []
    for lr in (0.01, torch.tensor(0.01), torch.tensor([0.01])):
        torch.manual_seed(0)
        model = Body()
        train(model, made(name, model, lr=lr))
        moved.append([p.detach() for p in model.parameters()])
    for found, zero_d, one_d in zip(*moved, strict=True):
        torch.testing.assert_close(one_d, found, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one_d, zero_d, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("factors", "text"),
    [({"(": 2.0}, "no regular expression"), ({"0": float("inf")}, "makes no rank"), ({"0": True}, "makes no rank"), (["0"], "must map")],
)
def test_rank_factors_that_are_none(factors: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        g.galore_param_groups(Body(), 8, targets=LAYERS, rank_factors=factors)
