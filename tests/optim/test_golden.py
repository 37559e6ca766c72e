"""Oracle: galore-torch 1.0 as published. Its weights over 25 steps and two refreshes are in golden/trajectories.pt.

With projector="svd", transport="keep" and fp32 codecs our classes must retrace them to 1e-5. The largest trained weight
is about 2 and a run moves a typical one by 0.2. Rounding the gradients at random by 3e-7 moved no weight by more than 3e-6.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import galore_torch
from golden.problem import CASES, KEPT, REFRESHES, SMALL, STEPS, Case

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# What 1.0 does: the moments stay as they are when the basis changes; AdamW decays after the update, Adafactor before.
AS_PUBLISHED: dict[str, Any] = {"projector": "svd", "transport": "keep", "state_codec": "fp32", "basis_codec": "fp32"}
DECAY = {"AdamW": "after", "Adafactor": "before"}
ATOL = 1e-5


@cache
def fixture() -> dict[str, Any]:
    return torch.load(GOLDEN / "trajectories.pt")


def same_svd_signs(case: Case) -> bool:
    """Whether this machine's LAPACK gives the singular vectors the signs they had when the fixture was made.

    The signs are arbitrary and 1.0's trajectory depends on them. This asks torch.linalg.svd alone, never our code.
    """
    before = {0: fixture()["initial"], **dict(zip(KEPT, fixture()["weights"][case.name], strict=True))}
    signs = torch.stack([SMALL.svd_signs(before[step - 1], step) for step in REFRESHES])
    return torch.equal(signs, fixture()["svd_signs"][case.name])


def retrace(case: Case, **changes: Any) -> Tensor:
    """Our weights after the steps KEPT, (len(KEPT), elements)."""
    params = SMALL.parameters()
    keys = {**AS_PUBLISHED, "decay": DECAY[case.optimizer], **changes}
    optimizer = getattr(galore_torch, f"GaLore{case.optimizer}")(SMALL.groups(params, case.proj_type, **keys), **case.kwargs)
    weights = SMALL.train(optimizer.step, params, range(1, STEPS + 1))
    return torch.stack([weights[step] for step in KEPT])


def distance(case: Case, weights: Tensor) -> float:
    return (weights - fixture()["weights"][case.name]).abs().max().item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_retraces_the_published_trajectory(case: Case) -> None:
    if not same_svd_signs(case):
        pytest.skip("this LAPACK chooses other signs of singular vectors than the one that made the fixture")
    ours, published = retrace(case), fixture()["weights"][case.name]
    for name, part in SMALL.slices():
        for step, got, expected in zip(KEPT, ours[:, part], published[:, part], strict=True):
            torch.testing.assert_close(
                got, expected, rtol=0.0, atol=ATOL, msg=lambda m, at=(name, step): f"{at[0]} after step {at[1]}: {m}"
            )


def test_the_fixture_tells_apart_what_it_should() -> None:
    """The oracle is sharp: every convention of 1.0, when replaced, moves some weight by at least 30 tolerances."""
    by_name = {case.name: case for case in CASES}
    adamw, adafactor = by_name["adamw-std"], by_name["adafactor-std"]
    assert distance(adamw, retrace(adamw, decay="before")) > 30 * ATOL
    assert distance(adafactor, retrace(adafactor, decay="after")) > 30 * ATOL
    assert distance(adamw, retrace(adamw, transport="rotate")) > 30 * ATOL
    for changed in ("adamw-std-eps", "adamw-std-uncorrected", "adamw-left", "adamw-right", "adamw-reverse_std"):
        assert distance(adamw, fixture()["weights"][changed]) > 30 * ATOL


def test_defaults_leave_the_published_trajectory_at_the_first_refresh() -> None:
    """With default settings (but for the projector and the order of decay) a run is 1.0's until moments first cross to a new basis."""
    case = next(case for case in CASES if case.name == "adamw-std")
    if not same_svd_signs(case):
        pytest.skip("this LAPACK chooses other signs of singular vectors than the one that made the fixture")
    params = SMALL.parameters()
    optimizer = galore_torch.GaLoreAdamW(SMALL.groups(params, case.proj_type, projector="svd", decay="after"), **case.kwargs)
    weights = SMALL.train(optimizer.step, params, range(1, STEPS + 1))
    gaps = {
        step: (weights[step] - published).abs().max().item() for step, published in zip(KEPT, fixture()["weights"][case.name], strict=True)
    }
    assert max(gap for step, gap in gaps.items() if step < REFRESHES[1]) <= ATOL
    assert min(gap for step, gap in gaps.items() if step >= REFRESHES[1]) > 30 * ATOL
