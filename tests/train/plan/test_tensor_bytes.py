"""What the planner says of a tensor's step. Oracle: the allocator's own log, and storages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import galore_torch as g
from galore_torch.train.plan.optimizer_bytes import param_bytes
from support.memory import peak_bytes, storage_bytes


@pytest.mark.parametrize(
    ("shape", "rank"), [((64, 64, 16, 9), 0.25), ((32, 48, 24, 20), 0.6), ((256, 128, 3, 3), 0.25), ((20, 300, 100), 0.25)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("sparse", [None, 0.05])
def test_of_a_step_and_of_the_first_refresh(shape: tuple[int, ...], rank: float, sparse: float | None, dtype: torch.dtype) -> None:
    """Within a quarter; the state to the byte."""
    p = Parameter(torch.zeros(shape, dtype=dtype))
    p.grad = torch.randn(shape, dtype=dtype)
    settings: dict[str, Any] = {"rank": rank, "tensor": True, "compile": False, "sparse": sparse}
    optimizer = g.GaLoreAdamW([p], **settings)
    planned = param_bytes(shape, dtype, optimizer.param_groups[0], optimizer.rule)
    assert planned.basis + planned.moments == storage_bytes(optimizer.state[p])
    assert 0.8 < planned.transient / peak_bytes(optimizer.step) < 1.26
    assert 0.8 < planned.step / peak_bytes(optimizer.step) < 1.26


def test_published_peaks_and_ours() -> None:
    """Of the published table (Tensor-GaLore, 64 modes x 64 channels x 4 layers): AdamW 19.73, ratio .25 4.83 "GB" of optimizer state."""
    shape, group = (64, 64, 64, 64), g.GaLoreAdamW([Parameter(torch.zeros(2))], rank=0.25, tensor=True).param_groups[0]
    rule = g.GaLoreAdamW([Parameter(torch.zeros(2))]).rule
    ours = param_bytes(shape, torch.complex64, group, rule)
    full = param_bytes(shape, torch.complex64, {**group, "rank": None}, rule)
    assert (ours.basis + ours.moments) / full.moments == pytest.approx(0.25, abs=0.01)
    assert full.moments == 12 * 64**4, "three numbers of four bytes, where the published form keeps four"
