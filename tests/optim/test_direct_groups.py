"""Groups that change under an attachment: a checkpoint's, a later one, a weight that is thawed. Oracle: mode="project", or no fusing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad

MODES = ("project", "update", "direct", "direct_update")


class Net(nn.Module):
    """A layer that is taller than wide, one that is wider than tall, and experts."""

    def __init__(self, experts: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(24, 32), nn.Linear(32, 24, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 24, 24) / 5) if experts else None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.tanh(self.a(x)))
        return h if self.experts is None else torch.bmm(h, self.experts.mT)


def optimizer_of(model: nn.Module, rank: int | None = 4, proj_type: str = "std", **settings: Any) -> Any:
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() > 1], "rank": rank}, {"params": [p for p in params if p.dim() == 1]}]
    return g.GaLoreAdamW(groups, lr=1e-2, proj_type=proj_type, update_proj_gap=3, compile=False, **settings)


def data(steps: int) -> Tensor:
    return torch.randn(steps, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model: Any, optimizer: Any, batches: Tensor) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    for (name, p), q in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert (p - q).norm() <= 1e-9 * q.norm(), name


# --- a checkpoint of other groups -------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings at the attachment, and in the checkpoint
    "a larger rank": ({"rank": 4}, {"rank": 6}),
    "a smaller rank": ({"rank": 6, "proj_type": "right"}, {"rank": 4, "proj_type": "right"}),
    "the other side": ({"proj_type": "left"}, {"proj_type": "right"}),
    "the same side by another name": ({"proj_type": "std"}, {"proj_type": "right"}),
    "both sides": ({"proj_type": "full"}, {"proj_type": "left"}),
    "no rank": ({"rank": 4}, {"rank": None}),
    "a first rank": ({"rank": None}, {"rank": 4}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_groups_goes_on_as_it_would_have(name: str, mode: str) -> None:
    here, there = OTHERS[name]
    wanted, batches = Net(), data(9)
    other = optimizer_of(wanted, **there)
    g.fused_backward(wanted, other, mode)
    train(wanted, other, batches[:5])
    model = Net()
    optimizer = optimizer_of(model, **here)
    attachment = g.fused_backward(model, optimizer, mode)
    train(model, optimizer, batches[:2])
    model.load_state_dict(copy.deepcopy(wanted.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(model, optimizer, batches[5:])
    train(wanted, other, batches[5:])
    assert_same(model, wanted)
    has_rank = there.get("rank", 4) is not None
    assert len(attachment._direct) == (3 if has_rank and "direct" in mode else 0)
    optimizer.zero_grad()
    model(batches[0]).square().mean().backward()
    made = ConsumedGrad if "update" in mode else LowRankGrad if has_rank else Tensor
    assert type(model.a.weight.grad) is type(model.b.weight.grad) is made
    attachment.remove()
    assert type(model.a) is nn.Linear


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("name", ["a larger rank", "the other side", "no rank", "a first rank"])
def test_a_compiled_model_goes_on_too(name: str) -> None:
    here, there = OTHERS[name]
    wanted, batches = Net(False), data(9)
    other = optimizer_of(wanted, **there)
    g.fused_backward(wanted, other, "project")
    train(wanted, other, batches[:5])
    model = Net(False)
    optimizer = optimizer_of(model, **here)
    attachment = g.fused_backward(model, optimizer, "direct")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer, batches[:2])
    model.load_state_dict(copy.deepcopy(wanted.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(compiled, optimizer, batches[5:])
    train(wanted, other, batches[5:])
    assert_same(model, wanted)
    assert len(attachment._direct) == (0 if name == "no rank" else 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_checkpoint_of_another_rank_between_the_passes_is_an_error(proj_type: str, compiled: bool) -> None:
    model = Net(False)
    optimizer = optimizer_of(model, proj_type=proj_type)
    g.fused_backward(model, optimizer, "direct")
    torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager") if compiled else model
    train(called, optimizer, data(2))
    twin = Net(False)
    other = optimizer_of(twin, 6, proj_type)
    loss = called(data(1)[0]).sum()
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"basis of layer b.weight has changed.*load_state_dict"):
        loss.backward()


def test_a_checkpoint_of_the_same_groups_leaves_the_layers_as_they_are() -> None:
    model = Net()
    optimizer = optimizer_of(model)
    attachment = g.fused_backward(model, optimizer, "direct")
    layers = dict(attachment._direct)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert attachment._direct == layers


# --- parameters that come later ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("thawed", [True, False])
def test_a_later_group_and_a_weight_that_is_thawed_are_attached_with_their_first_step(thawed: bool, mode: str) -> None:
    """Oracle: the same without fusing, whose basis looks at no gradient."""
    results = []
    for fused in (False, True):
        model, batches = Net(), data(6)
        assert model.experts is not None
        late = [model.b.weight, model.experts]
        if thawed:
            for p in late:
                p.requires_grad_(False)
            optimizer = optimizer_of(model, projector="random")
        else:
            first = [{"params": [model.a.weight], "rank": 4}, {"params": [model.a.bias]}]
            optimizer = g.GaLoreAdamW(first, lr=1e-2, update_proj_gap=3, compile=False, projector="random")
        attachment = g.fused_backward(model, optimizer, mode) if fused else None
        train(model, optimizer, batches[:2])
        for p in late:
            p.requires_grad_(True)
        if not thawed:
            optimizer.add_param_group({"params": late, "rank": 4})
        train(model, optimizer, batches[2:])
        if attachment is not None:
            assert len(attachment._direct) == (3 if "direct" in mode else 0)
        optimizer.zero_grad()
        results.append(copy.deepcopy(model))
        model(batches[0]).square().mean().backward()
        made = Tensor if attachment is None else ConsumedGrad if "update" in mode else LowRankGrad
        assert type(model.a.weight.grad) is type(model.b.weight.grad) is made
    assert_same(results[1], results[0])


def test_a_later_weight_that_is_not_of_a_linear_layer_alone_is_warned_of_then() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(40, 24), "layer": nn.Linear(24, 24, bias=False)})
    optimizer = g.GaLoreAdamW([{"params": [model["layer"].weight], "rank": 4}], compile=False)
    attachment = g.fused_backward(model, optimizer, "direct")
    optimizer.add_param_group({"params": [model["embedding"].weight], "rank": 4})
    tokens = torch.arange(40)
    model["layer"](model["embedding"](tokens)).square().mean().backward()
    with pytest.warns(UserWarning, match=r"1 matrices.*embedding\.weight") as seen:
        optimizer.step()
    assert seen[0].filename == __file__
    assert attachment.left == ["embedding.weight"]
    model["layer"](model["embedding"](tokens)).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_later_group_that_reads_the_full_gradient_is_refused_and_one_of_another_model_is_none_of_it() -> None:
    model, other = Net(), Net()
    optimizer = optimizer_of(model)
    attachment = g.fused_backward(model, optimizer, "direct")
    optimizer.add_param_group({"params": list(other.parameters())})
    (model(data(1)[0]) + other(data(1)[0])).square().mean().backward()
    optimizer.step()
    assert len(attachment._params) == len(list(model.parameters()))
    optimizer.zero_grad()
    model.c = nn.Linear(24, 24, bias=False).double()
    optimizer.add_param_group({"params": [model.c.weight], "rank": 4, "recovery": "fira"})
    model.c(model(data(1)[0])).square().mean().backward()
    before = model.c.weight.detach().clone()
    with pytest.raises(ValueError, match="reads the full gradient"):
        optimizer.step()
    assert torch.equal(model.c.weight, before)
