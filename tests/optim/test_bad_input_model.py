"""Misuse of galore_param_groups and of fused_backward: clear errors, and nothing lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from galore_torch import GaLoreAdamW, fused_backward, galore_param_groups


class Block(nn.Module):
    """Names as models have them: two layers to project, a head and a norm that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.q_proj, self.up_proj, self.norm, self.head = nn.Linear(8, 12), nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up_proj(self.q_proj(x).tanh()).tanh())).square().mean()


def setup(mode: str = "project", **keys: Any) -> tuple[Block, GaLoreAdamW, Any]:
    model = Block()
    optimizer = GaLoreAdamW(galore_param_groups(model, 2, **keys), lr=0.05)
    return model, optimizer, fused_backward(model, optimizer, mode)


def batch(seed: int) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def values(model: nn.Module, optimizer: GaLoreAdamW) -> Any:
    return copy.deepcopy([[p.detach() for p in model.parameters()], optimizer.state_dict()["state"]])


# --- galore_param_groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["k_proj", ["q_proj", "k_proj"], ["k_proj", "q_proj"], "NORM"])
def test_a_pattern_that_matches_nothing(targets: Any) -> None:
    """Also beside one that matches; a pattern that matches only layers that are not linear matches nothing."""
    pattern = "NORM" if targets == "NORM" else "k_proj"
    with pytest.raises(ValueError, match=rf"'{pattern}' matches no linear layer among 3 linear layers \(q_proj, up_proj, head\)"):
        galore_param_groups(Block(), 2, targets=targets)


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"\(q_proj.*regular expression"):
        galore_param_groups(Block(), 2, targets="(q_proj")


@pytest.mark.parametrize("targets", [[], ()])
def test_no_pattern_at_all(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"targets.*empty"):
        galore_param_groups(Block(), 2, targets=targets)


def test_a_model_without_linear_layers() -> None:
    tied = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    tied[1].weight = tied[0].weight
    for model in (nn.LayerNorm(4), nn.Sequential(nn.Conv2d(3, 4, 3)), tied):
        for targets in (None, "all-linear"):
            with pytest.raises(ValueError, match=rf"{type(model).__name__} has no linear layer beside embeddings and output head"):
                galore_param_groups(model, 2, targets=targets)


def test_nothing_left_to_project_is_an_error_that_says_how_layers_are_thawed() -> None:
    model = Block()
    model.q_proj.requires_grad_(False)
    assert len(galore_param_groups(model, 2)[-1]["params"]) == 2
    model.up_proj.requires_grad_(False)
    with pytest.raises(ValueError, match=r"all 2 layers that match are frozen.*groups first.*thawed later"):
        galore_param_groups(model, 2)


def test_keys_it_passes_on_are_checked_by_the_optimizer() -> None:
    for keys in ({"rank": 0}, {"rank": 2, "transprot": "keep"}, {"rank": 2, "proj_type": "diagonal"}):
        with pytest.raises(ValueError, match=r"rank|transport|proj_type"):
            GaLoreAdamW(galore_param_groups(Block(), **keys))


# --- fused_backward ---------------------------------------------------------------------------------------------------------


def test_fused_backward_refuses_what_it_cannot_attach() -> None:
    """No hook is left behind by a refusal: an ordinary backward pass still leaves ordinary gradients."""
    model, other = Block(), Block()
    optimizer = GaLoreAdamW(model.parameters(), rank=2, lr=0.05)
    with pytest.raises(ValueError, match=r"mode='sideways' is not known.*'project', 'update'"):
        fused_backward(model, optimizer, "sideways")
    with pytest.raises(ValueError, match=r"AdamW.*galore_torch.*GaLoreAdamW"):
        fused_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"share no trainable parameter.*built from"):
        fused_backward(other, optimizer)
    with pytest.raises(ValueError, match="share no trainable parameter"):
        fused_backward(model.requires_grad_(False), optimizer)
    model.requires_grad_(True)(batch(0)).backward()
    assert {type(p.grad) for p in model.parameters()} == {Tensor}


@pytest.mark.parametrize("mode", ["project", "update"])
def test_fused_backward_attached_twice(mode: str) -> None:
    """The first attachment goes on working, and after remove() another may follow."""
    model, optimizer, first = setup(mode)
    with pytest.raises(ValueError, match=r"already has a fused backward pass.*remove\(\)"):
        fused_backward(model, optimizer, "project")
    before = [p.detach().clone() for p in model.parameters()]
    model(batch(0)).backward()
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    first.remove()
    fused_backward(model, optimizer, mode).remove()
    optimizer.zero_grad()
    model(batch(0)).backward()
    assert {type(p.grad) for p in model.parameters()} == {Tensor}


def test_accumulation_in_mode_update() -> None:
    """The second backward pass before step() is refused before it moves any weight, and the error names the cure."""
    model, optimizer, _ = setup("update")
    model(batch(0)).backward()
    before = values(model, optimizer)
    with pytest.raises(RuntimeError, match=r"consumed.*accumulation.*mode='project'"):
        model(batch(1)).backward()
    assert_close(values(model, optimizer), before, rtol=0.0, atol=0.0)
    optimizer.step()
    model(batch(1)).backward()
    assert not torch.equal(model.head.weight, before[0][-2])


def test_clipping_in_mode_update() -> None:
    model, optimizer, _ = setup("update")
    model(batch(0)).backward()
    before = values(model, optimizer)
    for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
        with pytest.raises(RuntimeError, match=r"consumed.*clipped.*mode='project'"):
            clip(model.parameters(), 1.0)
    assert_close(values(model, optimizer), before, rtol=0.0, atol=0.0)


USES: dict[str, Callable[[nn.Parameter], Any]] = {
    "sum": lambda p: p.grad.sum(),
    "abs": lambda p: p.grad.abs(),
    "isnan": lambda p: p.grad.isnan(),
    "sign": lambda p: p.grad.sign_(),
    "exponential": lambda p: p.grad.exp(),
    "add a number": lambda p: p.grad.add_(1.0),
    "clip_grad_value_": lambda p: nn.utils.clip_grad_value_([p], 0.1),
    "norm 1": lambda p: torch.linalg.vector_norm(p.grad, ord=1),
}


@pytest.mark.parametrize("use", USES)
def test_what_a_low_rank_gradient_cannot_answer(use: str) -> None:
    """The error says what it is and what can be done with it; the gradient stays usable. Oracle: an untouched twin."""
    runs = []
    for misuse in (True, False):
        model, optimizer, _ = setup()
        model(batch(0)).backward()
        if misuse:
            with pytest.raises(NotImplementedError, match=r"low-rank gradient.*2-norm.*without fused_backward"):
                USES[use](model.q_proj.weight)
        optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("mode", ["project", "update"])
def test_fused_backward_follows_the_groups_of_a_loaded_checkpoint(mode: str) -> None:
    """load_state_dict replaces the group dicts; a schedule that goes on with the new ones must be obeyed.

    Oracle: the same run with load_state_dict before the attachment.
    """
    runs = []
    for attached_first in (True, False):
        model = Block()
        optimizer = GaLoreAdamW(galore_param_groups(model, 2, update_proj_gap=2), lr=0.05)
        saved = copy.deepcopy(optimizer.state_dict())
        if attached_first:
            fused_backward(model, optimizer, mode)
        optimizer.load_state_dict(saved)
        if not attached_first:
            fused_backward(model, optimizer, mode)
        for group in optimizer.param_groups:
            group["lr"], group["update_proj_gap"] = 0.001, 3
        for seed in range(5):
            model(batch(seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("mode", ["project", "update"])
def test_zeroed_gradients_do_not_stop_refreshes(mode: str) -> None:
    """zero_grad(set_to_none=False) leaves the stand-in in p.grad; the next backward pass begins a new gradient all the same.

    Oracle: the run with set_to_none=True.
    """
    runs = []
    for to_none in (True, False):
        model, optimizer, _ = setup(mode, update_proj_gap=2)
        for seed in range(6):
            model(batch(seed)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        runs.append(values(model, optimizer))
    assert_close(runs[0], runs[1])


def test_an_empty_first_micro_batch_loses_none_of_the_others() -> None:
    """Its gradient is zero and makes no basis; the next one does. Oracle: the run without the empty micro-batch."""
    runs = []
    for empty in (True, False):
        model, optimizer, _ = setup()
        if empty:
            (model(batch(0)) * 0).backward()
        model(batch(1)).backward()
        optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert_close(runs[0], runs[1])
