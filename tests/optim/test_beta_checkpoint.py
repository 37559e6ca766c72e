"""Checkpoints of 2.0.0 before its release go on as they would have then. Oracle: the weights that tree reached, in golden/beta.pt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch.ops.linalg import product_dtype
from golden.beta import CASES, LATER, SAVED, make, params, train

BETA = Path(__file__).resolve().parents[1] / "golden" / "beta.pt"


@pytest.fixture(scope="module")
def beta() -> dict[str, Any]:
    recorded: dict[str, Any] = torch.load(BETA, weights_only=True)
    return recorded


@pytest.mark.parametrize("name", CASES)
def test_goes_on_to_the_recorded_weights(name: str, beta: dict[str, Any]) -> None:
    recorded, weights = beta[name], params(name)
    if weights[0].dtype == torch.bfloat16 and product_dtype(torch.bfloat16, "cpu") != torch.bfloat16:
        pytest.skip("recorded by a processor that multiplies in bf16; this one takes fp32, which rounds otherwise")
    assert all("turn" in state for state in recorded["optimizer"]["state"].values())
    optimizer = make(name, weights)
    with torch.no_grad():
        for p, value in zip(weights, recorded["weights"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(recorded["optimizer"])
    assert all("turn" not in state and "index" in state for state in optimizer.state.values())
    train(optimizer, weights, range(SAVED, LATER))
    for p, value in zip(weights, recorded["later"], strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)
