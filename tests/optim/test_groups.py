"""What a parameter group and a checkpoint may hold, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import galore_torch
from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, galore_param_groups


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))


def named(net: nn.Module, names: list[str]) -> list[dict[str, Any]]:
    held = dict(net.named_parameters())
    return [{"params": [(name, held[name]) for name in names], "rank": 2}]


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.arange(32.0).view(4, 8) / 32).square().mean().backward()
    optimizer.step()


def test_groups_serve_a_second_class_with_its_own_settings() -> None:
    groups = galore_param_groups(model(), 2, targets="all-linear")
    before = [dict(group) for group in groups]
    GaLoreAdamW(groups, lr=1e-2)
    second = GaLoreAdamW8bit(groups, lr=1e-3)
    assert [group["lr"] for group in second.param_groups] == [1e-3] * len(groups)
    assert all(group["state_codec"] == "int8" for group in second.param_groups)
    GaLoreAdafactor(groups, lr=1e-2)
    assert [group.keys() for group in groups] == [group.keys() for group in before]


@pytest.mark.parametrize("make", [lambda np: np.float32(1e-3), lambda np: np.array(1e-3), lambda np: np.float64(1e-3)])
def test_a_rate_of_numpy_is_the_same_python_number(make: Any) -> None:
    np = pytest.importorskip("numpy")
    lr = make(np)
    nets = [model(), model()]
    for net, rate in zip(nets, (lr, float(lr)), strict=True):
        optimizer = GaLoreAdamW(net.parameters(), lr=rate)
        step(net, optimizer)
        optimizer.param_groups[0]["lr"] = rate  # as a scheduler does
        step(net, optimizer)
        assert type(optimizer.param_groups[0]["lr"]) is float
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_onecycle_without_momentum_is_refused_by_its_cause() -> None:
    net = model()
    optimizer = GaLoreSGD(net.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9)
    with pytest.raises(ValueError, match=r"momentum.*cycle_momentum=False"):
        step(net, optimizer)


@pytest.mark.parametrize("bad", ["complex", "compiler"])
def test_a_refused_group_changes_nothing(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = GaLoreAdamW([{"params": model().parameters(), "rank": 2}])
    monkeypatch.setattr("galore_torch.optim.parameter_checks.has_compiler", lambda kind: False)
    before, held = [dict(group) for group in optimizer.param_groups], list(optimizer.state)
    group: dict[str, Any] = {"params": [Parameter(torch.zeros(8, 8)), Parameter(torch.zeros(8, 8))], "rank": 2}
    if bad == "complex":
        group["params"][1] = Parameter(torch.zeros(8, 8, dtype=torch.complex64))  # in a group with a rank
    given = {**group, **({"compile": True} if bad == "compiler" else {})}
    keys = dict(given)
    with pytest.raises(ValueError, match=r"complex|compiler"):
        optimizer.add_param_group(given)
    assert given == keys
    assert optimizer.param_groups == before
    assert list(optimizer.state) == held


def test_a_partial_checkpoint_changes_nothing() -> None:
    net = model()
    optimizer = GaLoreAdamW([{"params": net.parameters(), "rank": 2}])
    step(net, optimizer)
    partial = copy.deepcopy(optimizer.state_dict())
    step(net, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    del partial["state"][1]
    with pytest.raises(ValueError, match="no state of parameter 1"):
        optimizer.load_state_dict(partial)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


def test_a_layer_frozen_when_saved_and_thawed_since_loads_and_trains() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = GaLoreAdamW([{"params": net.parameters(), "rank": 2}])
    step(net, optimizer)
    saved = optimizer.state_dict()
    net[0].weight.requires_grad_(True)
    other = GaLoreAdamW([{"params": net.parameters(), "rank": 2}])
    other.load_state_dict(saved)
    before = net[0].weight.detach().clone()
    step(net, other)
    assert not torch.equal(before, net[0].weight)


def test_state_follows_names_and_not_places() -> None:
    net = model()
    first = GaLoreAdamW(named(net, ["0.weight", "1.weight"]))
    step(net, first)
    second = GaLoreAdamW(named(net, ["1.weight", "0.weight"]))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p in net.parameters():
        torch.testing.assert_close(second.state[p], first.state[p], rtol=0, atol=0)


def test_other_names_are_refused_but_for_what_wrappers_add() -> None:
    net = model()
    saved = GaLoreAdamW(named(net, ["0.weight", "1.weight"])).state_dict()
    held = list(net.parameters())
    for names, known in (["module.0.weight", "_orig_mod.1.weight"], True), (["0.weight", "2.weight"], False):
        optimizer = GaLoreAdamW([{"params": list(zip(names, held, strict=True)), "rank": 2}])
        if known:
            optimizer.load_state_dict(saved)
        else:
            with pytest.raises(ValueError, match=r"2 names.*1\.weight.*2\.weight"):
                optimizer.load_state_dict(saved)


def test_keys_that_nothing_reads_are_named_and_those_of_schedulers_are_not() -> None:
    with pytest.warns(UserWarning, match=r"does not read the group keys \['gap', 'proj'\]"):
        GaLoreAdamW([{"params": model().parameters(), "rank": 2, "gap": 50, "proj": "svd"}])
    GaLoreAdamW([{"params": model().parameters(), "rank": 2, "initial_lr": 1e-3, "max_lr": 1e-2, "name": "body", "lr_mult": 1.0}])


def test_a_rank_on_vectors_alone_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="projects none.*FSDP1"):
        GaLoreAdamW([{"params": [Parameter(torch.zeros(64)), Parameter(torch.zeros(64))], "rank": 2}])


def test_matrices_that_were_exchanged_for_one_flat_vector_are_refused_at_every_step() -> None:
    """As DeepSpeed ZeRO-1 and 2 do it, in the groups of an optimizer that is there."""
    net = model()
    optimizer = GaLoreAdamW([{"params": net.parameters(), "rank": 2}])
    flat = Parameter(torch.zeros(1 << 15))
    flat.grad = torch.ones(1 << 15)
    optimizer.param_groups[0]["params"] = [flat]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rank=2 projects matrices.*1 parameters are vectors.*fully_shard"):
            optimizer.step()
    assert not flat.any()


def test_a_vector_that_zero_3_has_flattened_is_refused() -> None:
    flat = Parameter(torch.zeros(64))
    flat.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed marks them
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO .*made.*leave rank out"):
        GaLoreAdamW([flat], rank=2)
    GaLoreAdamW([flat])


def test_adafactor_schedule_reads_the_rate_in_use() -> None:
    """Oracle: arXiv 1804.04235, section 9.2, in closed form: min(1e-6 t, 1 / sqrt t) with warmup_init."""
    net = model()
    optimizer = GaLoreAdafactor(net.parameters(), relative_step=True, scale_parameter=False, warmup_init=True)
    for t in (1, 2, 3):
        step(net, optimizer)
        group = optimizer.param_groups[0]
        assert optimizer._get_lr(group, optimizer.state[group["params"][0]]) == 1e-6 * t


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "QGaLoreAdamW8bit", "GaLoreAdafactor", "GaLoreSGD", "GaLore"])
def test_the_signature_shows_types(name: str) -> None:
    signature = inspect.signature(getattr(galore_torch, name))
    assert "ForwardRef" not in str(signature)
    assert not any(isinstance(p.annotation, str) for p in signature.parameters.values())
