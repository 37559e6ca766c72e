"""GaLore(base) is the base class at full rank, wherever the class keeps its count. Oracle: the class itself, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from galore_torch import GaLore


class _Counting(Optimizer):
    """Momentum with a correction of its start that depends on the count."""

    def __init__(self, params: Any, lr: float = 1e-2, **defaults: Any):
        super().__init__(params, {"lr": lr, **defaults})

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        raise NotImplementedError

    def before(self, group: dict[str, Any]) -> None: ...

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.before(group)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    t = self.count(group, state)
                    m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    p.sub_(m / (1 - 0.9**t), alpha=group["lr"])


class InGroup(_Counting):
    def before(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(group["step"])


class InGroupFromDefaults(InGroup):
    def __init__(self, params: Any, lr: float = 1e-2):
        super().__init__(params, lr, step=0)


class TensorInGroup(_Counting):
    def before(self, group: dict[str, Any]) -> None:
        group.setdefault("k", torch.zeros((), device="cpu")).add_(1)

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(group["k"])


class FloatInGroup(_Counting):
    """As schedule-free classes keep the sum of their weights."""

    def before(self, group: dict[str, Any]) -> None:
        group["weight_sum"] = group.get("weight_sum", 0.0) + 1.5

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(group["weight_sum"])


class NumberInState(_Counting):
    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        state["step"] = state.get("step", 0) + 1
        state["decayed"] = state.get("decayed", 1.0) * 0.9
        return float(state["step"]) + state["decayed"]


class OnItself(_Counting):
    steps = 0

    def before(self, group: dict[str, Any]) -> None:
        self.steps += 1

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(self.steps)


class ListInGroup(_Counting):
    def before(self, group: dict[str, Any]) -> None:
        group["seen"] = [*group.get("seen", []), len(group.get("seen", []))]

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(len(group["seen"]))


class FromAllGradients(InGroup):
    def before(self, group: dict[str, Any]) -> None:
        super().before(group)
        group["norm"] = float(sum(p.grad.norm() for p in group["params"]))


class LateInGroup(_Counting):
    """As RAdam without a schedule: a number of the group that changes at the sixth step first."""

    def before(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1
        group["peak"] = max(group.get("peak", 1.0), group["step"] / 5)

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(group["peak"])


class InStateOfAll(_Counting):
    """As MADGRAD counts: in the state, but of no parameter."""

    def before(self, group: dict[str, Any]) -> None:
        state: Any = self.state
        state["k"] = state["k"] + 1 if "k" in state else 1

    def count(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(self.state["k"])  # type: ignore[arg-type,index]


class WithARankOfItsOwn(InGroup):
    def __init__(self, params: Any, lr: float = 1e-2, rank: int = 2):
        _Counting.__init__(self, params, lr, rank=rank)


KEPT = [InGroup, InGroupFromDefaults, TensorInGroup, FloatInGroup, NumberInState, LateInGroup]
TORCH: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (torch.optim.Adadelta, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.ASGD, {"lambd": 0.1, "t0": 3}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"momentum": 0.9}),
    (torch.optim.Rprop, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
]


def train(make: Callable[[list[nn.Parameter]], Any], steps: int = 20, resume_at: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5, 7))]
    optimizer = make(params)
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make(params)
            optimizer.load_state_dict(saved)
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("base", "settings"), [*((base, {}) for base in KEPT), *TORCH], ids=lambda value: getattr(value, "__name__", ""))
def test_full_rank_is_the_class_and_resumes_bit_for_bit(base: type[Optimizer], settings: dict[str, Any]) -> None:
    alone = train(lambda params: base(params, **settings))
    for resume_at in (None, 7):
        ours = train(lambda params: GaLore(base, params, **settings), resume_at=resume_at)
        assert all(torch.equal(p, q) for p, q in zip(ours, alone, strict=True))


@pytest.mark.parametrize("base", KEPT)
def test_inside_a_subspace_it_counts_as_alone(base: type[Optimizer]) -> None:
    """A basis that never changes, of both sides at almost full rank: the class trains the coordinates. Oracle: the class on them."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(6, 4))
    optimizer = GaLore(base, [W], rank=2, scale=1.0, update_proj_gap=1000, lr=1e-2)
    W.grad = torch.randn(6, 4)
    start = W.detach().clone()
    optimizer.step()
    basis = optimizer.state[W]["basis"].clone()  # (4, 2): on the right
    x = nn.Parameter(start @ basis)
    alone: Any = base([x], lr=1e-2)  # type: ignore[call-arg]
    x.grad = W.grad @ basis
    alone.step()
    optimizer.state[W]["index"] = 0
    for _ in range(6):
        W.grad = torch.randn(6, 4)
        x.grad = W.grad @ basis
        optimizer.step()
        alone.step()
    torch.testing.assert_close(W.detach() @ basis, x.detach())


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (OnItself, r"counts on itself.*steps"),
        (ListInGroup, r"group_seen.*list"),
        (FromAllGradients, r"norm.*from all gradients"),
        (InStateOfAll, r"counts on itself.*'k'"),
        (WithARankOfItsOwn, r"'rank'.*names of the subspace's"),
    ],
)
def test_what_cannot_be_kept_is_refused_when_it_is_made(base: type[Optimizer], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        GaLore(base, [nn.Parameter(torch.randn(4, 4))])


def test_a_wrong_argument_is_called_that() -> None:
    with pytest.raises(ValueError, match=r"AdamW cannot be made with .*unexpected keyword argument 'wd'$"):
        GaLore(torch.optim.AdamW, [nn.Parameter(torch.randn(4, 4))], wd=0.1)
