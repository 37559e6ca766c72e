"""What a step does, for every public class: directions, learning rates, groups, no-ops, closures, maximize, foreach.

PyTorch's own OptimizerInfo machinery with bodies of our own. Oracle: the conventions that torch.optim's classes keep;
where two runs are compared, both are ours and must agree bit for bit unless a tolerance stands in the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.testing import assert_close
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerInfo, TensorTracker, optims
from torch.testing._internal.common_utils import TestCase, parametrize

import galore_torch
from support.optimizer_infos import CLASSES, INFOS, assert_same, inputs_of, model, set_grads, train

# torch's contract steps without a gradient on purpose, which this package warns of.
pytestmark = pytest.mark.filterwarnings("ignore:none of the .* has a gradient at the first step")


class TestTorchContractSteps(TestCase):
    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(INFOS)
    def test_forloop_goes_right_direction(
        self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo, contiguous: bool, with_lrsched: bool
    ) -> None:
        """A loss whose gradient is one outer product falls (or rises, with maximize); weights may be strided."""
        makers: list[Callable[[Optimizer], Any]] = []
        if with_lrsched:
            makers = [lambda o: StepLR(o, 10, 0.9), lambda o: ExponentialLR(o, 0.99), ReduceLROnPlateau]
        for kwargs in inputs_of(optim_info, device):
            torch.manual_seed(0)
            weight = torch.randn((10, 5) if contiguous else (10, 5, 2))
            weight = Parameter(weight if contiguous else weight[..., 0])
            bias, x = Parameter(torch.randn(10)), torch.randn(5)
            assert weight.is_contiguous() is contiguous
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            schedules = [make(optimizer) for make in makers]

            def closure(optimizer: Any = optimizer, w: Tensor = weight, b: Tensor = bias, x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = (w @ x + b).square().sum()
                loss.backward()
                return loss

            first = closure().item()
            for _ in range(12):
                loss = optimizer.step(closure)
                for schedule in schedules:
                    schedule.step(*[loss.detach()] if isinstance(schedule, ReduceLROnPlateau) else [])
            last = closure().item()
            assert (last > first) if kwargs.get("maximize") else (last < first), kwargs

    @optims(INFOS)
    def test_param_group_with_lrscheduler(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Groups keep their own lr under one scheduler, and the optimizer uses the scheduled values."""
        for kwargs in inputs_of(optim_info, device):
            params = model(device)
            lr = kwargs.pop("lr", 0.01)
            groups = [{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": 0.0}]
            optimizer = optim_info.optim_cls(groups, lr=lr, **kwargs)
            schedule = StepLR(optimizer, step_size=1, gamma=0.5)
            start = [p.detach().clone() for p in params]
            for step in range(4):
                train(optimizer, params, range(step, step + 1))
                schedule.step()
            assert [g["lr"] for g in optimizer.param_groups] == [lr / 16, 0.0]
            moved = [not torch.equal(a, b) for a, b in zip(start, params, strict=True)]
            assert moved == [True, True, False, False], kwargs

    @optims(INFOS)
    def test_tensor_lr(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A 0-d or 1-element tensor lr means what the float means, stays the caller's tensor, and may be scheduled."""
        for shape in ((), (1,)):
            for kwargs in inputs_of(optim_info, device):
                lr = float(kwargs.pop("lr", 0.01))
                a, b = model(device), model(device)
                tensor_lr = torch.full(shape, lr)
                with_float = optim_info.optim_cls(a, lr=lr, **kwargs)
                with_tensor = optim_info.optim_cls(b, lr=tensor_lr, **kwargs)
                schedules = [ExponentialLR(o, 0.9) for o in (with_float, with_tensor)]
                tracker = TensorTracker({"rtol": 1e-5, "atol": 1e-6})
                for step in range(4):
                    for w in train(with_float, a, range(step, step + 1)):
                        tracker.add(w)
                    train(with_tensor, b, range(step, step + 1))
                    for p in b:
                        tracker.pop_check_set(p, self)
                    for schedule in schedules:
                        schedule.step()
                assert tracker.all_popped()
                kept = with_tensor.param_groups[0]["lr"]
                assert isinstance(kept, Tensor)
                assert_close(kept, torch.full(shape, lr * 0.9**4))

    @optims(INFOS)
    def test_step_is_noop_for_zero_grads(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Zero gradients before any other move nothing (without decay) and make no basis, across a due refresh."""
        for kwargs in inputs_of(optim_info, device):
            kwargs["weight_decay"] = 0.0
            params = model(device)
            start = [p.detach().clone() for p in params]
            optimizer = optim_info.optim_cls(params, **kwargs)
            for p in params:
                p.grad = torch.zeros_like(p)
            for _ in range(4):
                optimizer.step()
            assert_same([p.detach() for p in params], start)
            assert not any(state.get("basis_ready", False) for state in optimizer.state.values())
            train(optimizer, params, range(1))
            assert all(state.get("basis_ready", True) for state in optimizer.state.values())

    @optims(INFOS)
    def test_step_is_noop_when_params_have_no_grad(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Without gradients nothing moves, decay included, and no clock runs; frozen parameters are never touched."""
        for kwargs in inputs_of(optim_info, device):
            params = [*model(device), Parameter(torch.ones(3, 4), requires_grad=False)]
            start = [p.detach().clone() for p in params]
            optimizer = optim_info.optim_cls(params, **kwargs)
            optimizer.step()
            assert_same([p.detach() for p in params], start)
            assert all(int(state["step"]) == 0 for state in optimizer.state.values())
            train(optimizer, params[:-1], range(2))
            assert_same(params[-1].detach(), start[-1])

    @optims(INFOS)
    def test_param_groups_lr(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """lr may be given by group or by constructor, a group without one takes the default, and lr = 0 moves nothing."""
        for kwargs in inputs_of(optim_info, device):
            kwargs.pop("lr", None)
            runs = []
            for groups_of, lr in (
                (lambda p: [{"params": p[:2]}, {"params": p[2:]}], 0.01),
                (lambda p: [{"params": p[:2]}, {"params": p[2:], "lr": 0.01}], 0.01),
                (lambda p: [{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.01}], 0.5),
            ):
                params = model(device)
                runs.append(train(optim_info.optim_cls(groups_of(params), lr=lr, **kwargs), params, range(4)))
            assert_same(runs[1], runs[0])
            assert_same(runs[2], runs[0])
            params = model(device)
            start = [p.detach().clone() for p in params]
            train(optim_info.optim_cls(params, lr=0.0, **kwargs), params, range(4))
            assert_same([p.detach() for p in params], start)

    @optims(INFOS)
    def test_param_groups_weight_decay(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Decay acts on the groups that have it and on no other; with a zero gradient it shrinks every weight."""
        for kwargs in inputs_of(optim_info, device):
            kwargs.pop("weight_decay", None)
            kwargs["lr"] = 0.05
            a, b = model(device), model(device)
            groups = [{"params": b[:2], "weight_decay": 0.5}, {"params": b[2:], "weight_decay": 0.0}]
            plain = train(optim_info.optim_cls(a, **kwargs, weight_decay=0.0), a, range(3))
            decayed = train(optim_info.optim_cls(groups, **kwargs), b, range(3))
            same = [torch.equal(x, y) for x, y in zip(plain[-4:], decayed[-4:], strict=True)]
            assert same == [False, False, True, True], kwargs

    @optims(INFOS)
    def test_foreach_and_fused_change_nothing(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """foreach and fused are accepted as hints: every value gives the same weights. RMSprop itself has no fused."""
        hints_of = [{}, {"foreach": True}, {"foreach": False}, {"foreach": None}]
        if not issubclass(optim_info.optim_cls, galore_torch.GaLore):
            hints_of += [{"fused": True}, {"fused": False}, {"fused": None}]
        for kwargs in inputs_of(optim_info, device):
            runs = []
            for hints in hints_of:
                params = model(device)
                runs.append(train(optim_info.optim_cls(params, **kwargs, **hints), params, range(2)))
            for other in runs[1:]:
                assert_same(other, runs[0])

    @optims(INFOS)
    def test_maximize_minimises_the_negated_loss(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """maximize=True on g is maximize=False on -g, to rounding: the basis of -g may differ by signs."""
        for kwargs in inputs_of(optim_info, device):
            kwargs.pop("maximize", None)
            # Rounding to 8 or 4 bits is not odd: it maps -x to another code than minus that of x.
            kwargs["state_codec"] = kwargs["basis_codec"] = "fp32"
            a, b = model(device), model(device)
            up = train(optim_info.optim_cls(a, **kwargs, maximize=True), a, range(5))
            down = train(optim_info.optim_cls(b, **kwargs), b, range(5), sign=-1.0)
            assert_close(up, down, rtol=1e-5, atol=1e-6)
            assert not torch.equal(up[0], train(optim_info.optim_cls(c := model(device), **kwargs), c, range(1))[0])

    @optims(INFOS)
    def test_closure(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """step(closure) runs it once with gradients enabled, returns its loss, and equals backward then step()."""
        for kwargs in inputs_of(optim_info, device):
            a, b = model(device), model(device)
            with_closure, by_hand = optim_info.optim_cls(a, **kwargs), optim_info.optim_cls(b, **kwargs)
            for step in range(2):
                seen: list[bool] = []

                def closure(params: Any = a, step: int = step, seen: Any = seen) -> Tensor:
                    seen.append(torch.is_grad_enabled())
                    for p in params:
                        p.grad = None
                    loss = sum((p - step).square().sum() for p in params)
                    loss.backward()
                    return loss

                with torch.no_grad():
                    loss = with_closure.step(closure)
                expected = closure(b, step, [])
                assert by_hand.step() is None
                assert seen == [True]
                assert_same(loss, expected)
                assert_same([p.detach() for p in a], [p.detach() for p in b])

    @optims(INFOS)
    def test_zero_grad_and_grads_are_left_alone(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """step() leaves p.grad, its values and its shape, and every weight's storage where they were."""
        for kwargs in inputs_of(optim_info, device):
            params = model(device)
            optimizer = optim_info.optim_cls(params, **kwargs)
            set_grads(params, 0)
            grads, places = [(p.grad, p.grad.clone()) for p in params], [p.data_ptr() for p in params]
            optimizer.step()
            for p, (grad, values) in zip(params, grads, strict=True):
                assert p.grad is grad
                assert_same(grad, values)
            assert [p.data_ptr() for p in params] == places
            optimizer.zero_grad(set_to_none=False)
            assert not any(p.grad.any() for p in params)
            optimizer.zero_grad()
            assert all(p.grad is None for p in params)


@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_unsupported_flags_say_what_to_do(cls: type[Optimizer], flag: str) -> None:
    """A flag that would be ignored is an error, at construction and as a group's own key, and False is fine."""
    common = CLASSES[cls][0]
    with pytest.raises(ValueError, match=rf"{flag}.*{cls.__name__}|{cls.__name__}.*{flag}"):
        cls(model("cpu"), **common, **{flag: True})
    with pytest.raises(ValueError, match=flag):
        cls([{"params": model("cpu"), flag: True}], **common)
    cls(model("cpu"), **common, **{flag: False})


def test_adafactor_sets_its_own_pace() -> None:
    """lr=None is relative_step: lr = min(0.01, 1/sqrt(t)) times RMS(W), so the first update of a vector is 0.01 RMS(W)."""
    weight = Parameter(torch.tensor([3.0, -4.0]))
    weight.grad = torch.tensor([1.0, 1.0])
    galore_torch.GaLoreAdafactor([weight]).step()
    rms = (25 / 2) ** 0.5
    assert_close(weight.detach(), torch.tensor([3.0, -4.0]) - 0.01 * rms)


instantiate_device_type_tests(TestTorchContractSteps, globals(), only_for="cpu")
