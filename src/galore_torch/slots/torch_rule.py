"""Slots: any ``torch.optim`` class as an inner optimizer.

GaLore is independent of the optimizer (arXiv 2403.03507, section 4.1), so the class is not imitated but run, on the
coordinates x = basis^T W of the weight inside the subspace, whose gradient is exactly R = basis^T G.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from galore_torch.ops.codecs import TensorSpec
from galore_torch.slots.rules import Group, Moment, Moments

PREFIX = "base_"  # state keys of the inner optimizer: base_exp_avg, base_step, ...
GROUP = "group_"  # before those of what a class counts in its parameter group, and not for each parameter: base_group_step
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}  # of numbers that a class keeps, as 0-d tensors

# How the moments of torch's own classes cross a change of basis; names not listed stay as they are.
FIRST = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"}
DECOUPLED = {"AdamW", "Adafactor", "Muon"}  # classes whose weight_decay shrinks the weight and not the gradient


class BaseRule:
    """Runs ``base`` (a torch.optim.Optimizer subclass) one parameter at a time, with its state held outside."""

    def __init__(self, base: type[torch.optim.Optimizer], kwargs: dict[str, Any], reserved: Collection[str] = ()):
        """``reserved``: group keys that mean something else here."""
        self.base, self.kwargs = base, kwargs
        self._specs: dict[Any, dict[str, TensorSpec]] = {}
        self._kinds: dict[str, type] = {}  # of what the class keeps as a number, by its own name
        try:
            self.defaults = dict(base([torch.nn.Parameter(torch.zeros(2, 2, device="cpu"))], **kwargs).defaults)
        except Exception as error:
            raise ValueError(f"base={base.__name__} cannot be made with {kwargs}: {error}") from error
        try:
            if taken := sorted(self.defaults.keys() & set(reserved)):
                raise ValueError(f"its own arguments {taken} have the names of the subspace's, and a group can hold only one of each")
            self.counted = self._counted()
            self.spec((2, 2), torch.float32, self.defaults)
        except Exception as error:
            raise ValueError(
                f"base={base.__name__} with {kwargs} cannot run inside a subspace: {error}. It must be a torch.optim.Optimizer "
                f"class that steps without a closure and keeps its state in tensors, such as torch.optim.RMSprop."
            ) from error

    def decouples(self, group: Group) -> bool:
        """Whether weight decay acts on the whole weight, outside the subspace."""
        return self.base.__name__ in DECOUPLED or bool(group.get("decoupled_weight_decay"))

    @cached_property
    def elementwise(self) -> bool:
        """Whether each element moves by itself, so that a shard of a parameter may step without the others: tried on a small one."""
        generator = torch.Generator("cpu").manual_seed(0)
        whole, grads = torch.randn(4, 4, generator=generator, device="cpu"), torch.randn(3, 4, 4, generator=generator, device="cpu")

        def trained(rows: slice) -> Tensor:
            x = torch.nn.Parameter(whole[rows].clone())
            optimizer = self._new(x, self.defaults)
            for grad in grads:
                x.grad = grad[rows].clone()
                _bare_step(optimizer)
            return x.detach()

        return torch.allclose(trained(slice(4)), torch.cat([trained(slice(3)), trained(slice(3, 4))]), rtol=1e-5, atol=1e-6)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, TensorSpec]:
        """The state tensors of a parameter of ``shape``. Which there are depends on which settings are on, not on their size."""
        settings = {key: group[key] for key in self.defaults}
        key = (shape, dtype, *((value is None, isinstance(value, Tensor) or bool(value)) for value in settings.values()))
        if key not in self._specs:
            self._specs[key] = self._observe(shape, dtype, settings)
        return self._specs[key]

    def _counted(self) -> set[str]:
        """What the class changes in its parameter group. Some change a key late, as RAdam after five steps, so a dozen are looked at."""
        ends, keys = [], set[str]()
        for grad in (0.0, 1.0):  # without a gradient to speak of, and with one
            optimizer = self._new(torch.nn.Parameter(torch.zeros(2, 2, device="cpu")), self.defaults)
            (x,) = optimizer.param_groups[0]["params"]
            x.grad = torch.full_like(x, grad)
            attributes, group = _values(vars(optimizer)), _values(optimizer.param_groups[0])
            for _ in range(12):
                _bare_step(optimizer)
            if counted := _changed(attributes, _values(vars(optimizer))) | {str(key) for key in optimizer.state if key is not x}:
                raise ValueError(f"it counts on itself, in {sorted(counted)}, and not for each parameter")
            ends.append(_values(optimizer.param_groups[0]))
            keys |= _changed(group, ends[-1])
        if computed := _changed(*ends) & keys:
            raise ValueError(f"it computes {sorted(computed)} of its parameter group from all gradients, and here sees one parameter")
        return keys

    def _observe(self, shape: tuple[int, ...], dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, TensorSpec]:
        """Step a scratch parameter and see what the class keeps of it, and in its group."""
        x = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu"))
        x.grad = torch.zeros_like(x)
        optimizer = self._new(x, settings)
        for _ in range(2):
            _bare_step(optimizer)
        state = {key: value for key, value in optimizer.state[x].items() if value is not None}
        state |= {GROUP + key: optimizer.param_groups[0][key] for key in sorted(self.counted)}
        if wrong := {key: type(value).__name__ for key, value in state.items() if not isinstance(value, Tensor | int | float)}:
            raise ValueError(f"its state holds {wrong}, and checkpoints hold tensors and numbers only")
        self._kinds |= {key: type(value) for key, value in state.items() if isinstance(value, int | float)}
        tensors = {key: torch.as_tensor(value, dtype=_DTYPES.get(type(value)), device="cpu") for key, value in state.items()}
        return {PREFIX + key: TensorSpec(tuple(value.shape), value.dtype, host=value.dim() == 0) for key, value in tensors.items()}

    def _new(self, x: Tensor, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
        optimizer = self.base([x], **self.kwargs)
        optimizer.param_groups[0].update(settings)
        return optimizer

    def _held(self, moments: Moments) -> dict[str, Any]:
        """What the class kept, by its own names: numbers as the numbers that they were."""
        held = {key.removeprefix(PREFIX): value for key, value in moments.items()}
        return {key: self._kinds[key](value) if key in self._kinds else value for key, value in held.items()}

    def moments(self, shape: tuple[int, ...], group: Group) -> dict[str, Moment]:
        """How each state tensor crosses a change of basis. Tensors of another shape than the parameter's stay as they are."""

        def kind(name: str) -> Literal["first", "second", "other"]:
            return "first" if name in FIRST else "second" if name in SECOND else "other"

        spec = self.spec(shape, torch.float32, group)
        return {key: Moment(kind(key.removeprefix(PREFIX)) if tensor.shape == shape else "other") for key, tensor in spec.items()}

    def step_(self, x: Tensor, grad: Tensor, moments: Moments | None, group: Group) -> Moments:
        """One step of the base class on ``x`` in place. ``moments``: its state tensors, or None at the first step."""
        optimizer = self._new(x, {key: group[key] for key in self.defaults})
        if moments is not None:
            held = self._held(moments)
            optimizer.state[x] = {key: value for key, value in held.items() if not key.startswith(GROUP)}
            optimizer.param_groups[0].update({key.removeprefix(GROUP): value for key, value in held.items() if key.startswith(GROUP)})
        ordinary, x.grad = x.grad, grad
        try:
            _bare_step(optimizer)
        finally:
            x.grad = ordinary
        after = {key: value for key, value in optimizer.state[x].items() if value is not None}
        after |= {GROUP + key: optimizer.param_groups[0][key] for key in self.counted}
        return {PREFIX + key: _stored(value) for key, value in after.items()}


def _stored(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=_DTYPES[type(value)], device="cpu")


def _values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and small tensors among them, as they are now."""
    kinds = (int, float, Tensor, tuple, list)
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in settings.items()
        if key != "params" and isinstance(value, kinds) and not _holds_more(value)
    }


def _holds_more(value: Any) -> bool:
    return isinstance(value, tuple | list) and not all(isinstance(item, int | float) for item in value)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Keys that are new, or whose value is another one."""

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)

    return {key for key, value in after.items() if key not in before or not same(before[key], value)}


def _bare_step(optimizer: torch.optim.Optimizer) -> None:
    """The class's step without the hooks that torch wraps around it: those belong to the optimizer the user sees.

    A class that makes a tensor without naming a device, as torch's make their counters, means the host, whatever the default device.
    """
    step: Any = type(optimizer).step
    bare = step.__wrapped__ if getattr(step, "hooked", False) else step
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        bare(optimizer)
