"""scale_parameter: lr times the root mean square of each weight (arXiv 1804.04235, section 8), in every class, method and codec.

Oracle: the same optimizer without it, whose lr is set by hand before each step.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.testing import assert_close

import galore_torch as g
from galore_torch.ops import int8_weight, write
from galore_torch.optim.methods import METHODS
from galore_torch.slots.rules import by_weight

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (g.GaLoreAdamW, {}),
    "adamw, decay after": (g.GaLoreAdamW, {"decay": "after"}),
    "adamw, tensor lr": (g.GaLoreAdamW, {"lr": torch.tensor([0.1])}),
    "adamw8bit": (g.GaLoreAdamW8bit, {"min_8bit_size": 1}),
    "adagrad": (g.GaLoreAdagrad, {}),
    "sgd": (g.GaLoreSGD, {"momentum": 0.9}),
    "muon": (g.GaLoreMuon, {"state_codec": "fp32"}),
    "means": (g.GaLoreAdamW, {"projector": "block_mean"}),
    "rows": (g.GaLoreAdamW, {"projector": "rows"}),
    **{name: (g.GaLoreAdamW, dict(method.settings)) for name, method in METHODS.items() if name != "golore"},
}


def by_hand(weight: Tensor, lr: Any) -> float:
    return float(lr) * max(1e-3, float(weight.detach().double().square().mean().sqrt()))


def trained(
    make: Any, settings: dict[str, Any], relative: bool, weight: Tensor, rank: int | None, steps: int = 5, compile: bool = False
) -> tuple[Tensor, torch.optim.Optimizer]:
    p = Parameter(weight.clone())
    lr = settings.get("lr", 0.1)
    gap = {} if settings.get("projector") == "block_mean" or "update_proj_gap" in settings else {"update_proj_gap": 2}
    own = {"compile": compile, **gap, **settings, "lr": lr, "weight_decay": 0.3, "rank": rank}
    optimizer = make([p], scale_parameter=relative, **own)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        p.grad = torch.randn(weight.shape, generator=generator).to(p.dtype)
        if not relative:
            optimizer.param_groups[0]["lr"] = by_hand(p, lr)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", CLASSES)
def test_the_step_is_that_of_lr_times_the_rms_of_the_weight(name: str, rank: int | None, size: float) -> None:
    make, settings = CLASSES[name]
    if rank is None:
        settings = {key: value for key, value in settings.items() if key in ("min_8bit_size", "momentum", "lr", "decay")}
    weight = size * torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    (found, optimizer), (expected, _) = (trained(make, settings, relative, weight, rank) for relative in (True, False))
    assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)
    plain, _ = trained(make, settings, False, weight, rank, steps=0)
    assert not torch.allclose(found, plain, rtol=1e-3)
    assert optimizer.param_groups[0]["lr"] == settings.get("lr", 0.1), "the group's own lr is the scheduler's"


@pytest.mark.parametrize("name", ["means", "fold", "foam", "frugal", "rows"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_one_compiled_pass_takes_the_same_steps(name: str, codec: str) -> None:
    make, settings = CLASSES[name]
    settings = {**settings, "state_codec": codec, "min_8bit_size": 1}
    weight = 0.02 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    (found, _), (expected, _) = (trained(make, settings, True, weight, 16, compile=compiled) for compiled in (True, False))
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_weight_of_zeros_leaves_zero() -> None:
    """By steps of 0.001 lr, Adafactor's bound."""
    p = Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    g.GaLoreAdamW([p], lr=0.5, eps=0.0, scale_parameter=True).step()
    assert_close(p.detach(), torch.full((4,), -0.5e-3))


@pytest.mark.filterwarnings("ignore:rank=64 ")
@pytest.mark.parametrize("rank", [None, 8, 64])
@pytest.mark.parametrize("settings", [{}, {"projector": "block_mean", "recovery": "fold", "compile": True}, {"recovery": "fira"}], ids=str)
def test_experts_count_as_one_weight(settings: dict[str, Any], rank: int | None) -> None:
    """Whether their rank projects them or not; compiled or not."""
    if rank is None:
        settings = {}
    experts = torch.tensor([0.01, 1.0, 3.0])[:, None, None] * torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0))
    (found, _), (expected, _) = (trained(g.GaLoreAdamW, settings, relative, experts, rank) for relative in (True, False))
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_rule_that_sees_one_matrix_at_a_time_sees_its_size() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, grads = torch.randn(3, 32, 48, generator=generator), torch.randn(4, 3, 32, 48, generator=generator)
    experts *= torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    whole, parts = Parameter(experts.clone()), [Parameter(each.clone()) for each in experts]
    optimizers = [g.GaLoreAdafactor(each, lr=0.1, rank=8, scale_parameter=True) for each in ([whole], parts)]
    for grad in grads:
        whole.grad = grad.clone()
        for part, own in zip(parts, grad, strict=True):
            part.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    for found, part in zip(whole.detach(), parts, strict=True):
        assert_close(found, part.detach(), rtol=1e-3, atol=1e-5)


def test_a_tensor_lr_may_lie_on_another_device_than_the_weight() -> None:
    """As without it: 0-d numbers of the host go with any device."""
    rms = torch.empty((), device="meta")
    assert by_weight(torch.tensor([0.1]), lambda: rms, 1e-3).device.type == "meta"


def test_adafactor_keeps_what_it_was_asked_for() -> None:
    """Also in a group with an lr of its own; where nothing was asked, an lr turns it off."""
    p = Parameter(torch.randn(32, 48))
    for asked, own, expected in ((True, {"lr": 1e-2}, True), (None, {"lr": 1e-2}, False), (None, {}, True), (False, {}, False)):
        group = g.GaLoreAdafactor([{"params": [p], **own}], scale_parameter=asked).param_groups[0]
        assert (group["scale_parameter"], group["relative_step"]) == (expected, not own)


def test_an_int8_weight_is_read_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its root mean square is that of the decoded weight, and no full-size copy of it is made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False))
    g.quantize_linears(model)
    weight: Any = model[0].weight
    decoded = weight.dequantize()
    seen: list[int] = []
    original = int8_weight.Int8Weight.dequantize
    monkeypatch.setattr(int8_weight.Int8Weight, "dequantize", lambda self, *a: (seen.append(self.numel()), original(self, *a))[1])
    monkeypatch.setattr(int8_weight, "chunk_elements", lambda device: 1 << 14)
    assert_close(write.norm(weight), decoded.norm())
    assert max(seen) <= 1 << 14
    optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(model, rank=16, targets="all-linear", scale_parameter=True), lr=0.5)
    before = weight.dequantize()
    model(torch.randn(32, 256)).square().mean().backward()
    optimizer.step()
    moved = float((weight.dequantize() - before).norm() / before.norm())
    assert 0 < moved < 0.5


def test_it_is_the_groups_own() -> None:
    """Each group has its own; a checkpoint brings it back, and one of earlier versions, without it, leaves it as it is here."""
    weight, gain = Parameter(0.02 * torch.randn(32, 48)), Parameter(torch.ones(48))
    optimizer = g.low_rank_optimizer(
        [{"params": [gain]}, {"params": [weight], "rank": 8, "lr": 0.1, "scale_parameter": True}], "fira", lr=1e-3
    )
    assert [group["scale_parameter"] for group in optimizer.param_groups] == [False, True]
    for p in (weight, gain):
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = g.low_rank_optimizer([{"params": [gain]}, {"params": [weight], "rank": 8}], "fira", lr=1e-3)
    other.load_state_dict(saved)
    assert [group["scale_parameter"] for group in other.param_groups] == [False, True]
    for group in saved["param_groups"]:
        del group["scale_parameter"]
    optimizer.load_state_dict(saved)
    assert [group["scale_parameter"] for group in optimizer.param_groups] == [False, True]


class Own(torch.optim.SGD):
    """With another sense of the name."""

    def __init__(self, params: Any, lr: float = 1e-3, scale_parameter: float = 0.5):
        super().__init__(params, lr=lr)
        self.defaults["scale_parameter"] = scale_parameter
        for group in self.param_groups:
            group["scale_parameter"] = scale_parameter


def test_any_class_without_it_refuses() -> None:
    """It would be ignored; one that has it (transformers' Adafactor) keeps it as its own."""
    p = Parameter(torch.randn(32, 48))
    with pytest.raises(ValueError, match=r"scale_parameter=True is no argument of base=RMSprop: leave it out"):
        g.GaLore(torch.optim.RMSprop, [{"params": [p], "rank": 8, "scale_parameter": True}], lr=1e-3)
    with pytest.raises(ValueError, match="scale_parameter"):
        g.GaLore(torch.optim.RMSprop, [p], lr=1e-3, scale_parameter=True)
    with pytest.raises(ValueError, match="scale_parameter='yes' is not known"):
        g.GaLoreAdamW([p], scale_parameter="yes")
    optimizer = g.GaLore(Own, [p], lr=1e-3)
    assert optimizer.param_groups[0]["scale_parameter"] == 0.5, "a number in the class's own sense"
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    optimizer = g.GaLore(adafactor, [{"params": [p], "rank": 8}], lr=1e-3, scale_parameter=True, relative_step=False)
    assert optimizer.param_groups[0]["scale_parameter"] is True
