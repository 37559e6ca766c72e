"""State by three ways of counting: storages, `state_spec` and the planner."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from galore_torch.engine.layout import layout_of
from galore_torch.engine.stored import state_spec
from galore_torch.train.plan.optimizer_bytes import param_bytes
from support.memory import storage_bytes


def assert_state_is_as_planned(optimizer: Any, params: list[Parameter]) -> None:
    """Before and after three steps, to the byte; of optimizers with one group."""
    group = optimizer.param_groups[0]
    expected = [sum(spec.nbytes for spec in state_spec(layout_of(p, group), group, optimizer.rule).values()) for p in params]
    for _ in range(3):
        assert [storage_bytes(optimizer.state[p]) for p in params] == expected
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    planned = [param_bytes(tuple(p.shape), p.dtype, group, optimizer.rule) for p in params]
    assert [found.basis + found.moments for found in planned] == expected
