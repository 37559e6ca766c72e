"""An optimizer whose model has exchanged its parameters trains nothing: the first step says so, and what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g

CURE = r"fully_shard, parallelize_module and load_state_dict\(assign=True\) exchange a model's parameters\. Call them first, then build"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process, which shards as many do."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def model_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8))


def shard(*modules: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in modules:
        fully_shard(module, mesh=mesh)


def optimizer_of(model: nn.Module) -> Any:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return g.GaLoreAdamW([{"params": matrices, "rank": 2}, {"params": [p for p in model.parameters() if p.dim() == 1]}], lr=0.1)


def train(model: nn.Module, optimizer: Any) -> None:
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", p.clone)().detach().clone() for p in model.parameters()]


def test_built_before_fully_shard_it_trains_nothing_and_says_so_once(group: None) -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    shard(model)
    before = whole(model)
    with pytest.warns(UserWarning, match=r"none of the 6 parameters has a gradient at the first step, so nothing is trained.*" + CURE):
        train(model, optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, whole(model), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)


def test_built_between_two_calls_it_names_what_it_leaves_behind(group: None) -> None:
    """The layers are sharded, the rest is not: a part of the model trains."""
    model = model_of()
    shard(model[0], model[2])
    optimizer = optimizer_of(model)
    shard(model)
    with pytest.warns(
        UserWarning, match=r"2 whole parameters beside DTensors have no gradient .*\(such as one of shape \(8,\)\)\. If.*" + CURE
    ):
        train(model, optimizer)


def test_assigned_weights_are_found_too() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.warns(UserWarning, match=r"none of the 6 parameters has a gradient.*" + CURE):
        train(model, optimizer)


def sharded_first(model: nn.Sequential) -> Any:
    shard(model[0], model)
    return optimizer_of(model)


def in_part(model: nn.Sequential) -> Any:
    """Whole parameters beside DTensors that do train."""
    shard(model[0])
    return optimizer_of(model)


def frozen(model: nn.Sequential) -> Any:
    model.requires_grad_(False)
    optimizer = optimizer_of(model)
    model[3].weight.requires_grad_()
    return optimizer


def unused(model: nn.Sequential) -> Any:
    """A layer that no forward pass reaches, in one process."""
    model.append(nn.Identity())
    model[4].spare = nn.Linear(8, 8)
    return optimizer_of(model)


@pytest.mark.parametrize("build", [sharded_first, in_part, frozen, unused])
def test_nothing_is_said_of_an_optimizer_that_trains_what_it_can(build: Callable[[nn.Sequential], Any], group: None) -> None:
    model = model_of()
    optimizer, before = build(model), whole(model)
    train(model, optimizer)  # a warning is an error
    assert any(not torch.equal(*pair) for pair in zip(before, whole(model), strict=True))


def test_a_layerwise_optimizer_of_an_unused_layer_says_nothing() -> None:
    optimizer = g.GaLoreAdamW([nn.Parameter(torch.zeros(4, 4))])
    optimizer.step()


def test_a_copy_looks_at_its_own_first_step() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    twin = copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match="none of the 6 parameters has a gradient"):
        twin.step()


def test_nothing_is_said_where_the_backward_pass_has_used_the_gradients_up() -> None:
    """As loops do that free what stands in a gradient's place before the step; `fused_backward` itself refuses a model it does not know."""
    model = model_of()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "update")
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    other = model_of()
    with pytest.raises(ValueError, match="share no trainable parameter"):
        g.fused_backward(other, optimizer_of(model_of()), "update")
