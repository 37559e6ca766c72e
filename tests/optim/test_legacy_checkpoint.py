"""Optimizer state saved by galore-torch 1.0 (golden/legacy/*.pt) loads, converts and continues 1.0's own trajectory.

Oracle: 1.0 itself, which went on training after it wrote these files (golden/make_golden.py).
"""

from __future__ import annotations

import copy
import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import galore_torch
from golden.problem import (
    FULL_RANK,
    KEPT,
    LARGE,
    LARGE_DECAY,
    LARGE_KWARGS,
    LAST_8BIT,
    LEGACY,
    REFRESHES,
    SAVED_AT,
    SMALL,
    STEPS,
    Case,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

AS_PUBLISHED: dict[str, Any] = {"projector": "svd", "transport": "keep", "basis_codec": "fp32"}
DECAY = {"AdamW": "after", "Adafactor": "before"}
ATOL = 1e-5
QUANTISED = ("tall", "wide")  # the parameters of LARGE whose moments bitsandbytes keeps in 8 bits
WRAPPED = "__bnb_optimizer_quant_state__"  # where recent bitsandbytes hides its tensors from FSDP


def saved(name: str) -> dict[str, Any]:
    """As a user loads it: torch.load with its defaults, so weights_only=True."""
    return torch.load(GOLDEN / "legacy" / f"{name}.pt")


@cache
def trajectories() -> dict[str, Any]:
    return torch.load(GOLDEN / "trajectories.pt")


@cache
def eight_bit_run() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "adamw8bit.pt")


def new_optimizer(case: Case, **changes: Any) -> tuple[torch.optim.Optimizer, dict[str, Parameter]]:
    """Our class over the weights that 1.0 had when it saved."""
    params = SMALL.parameters()
    SMALL.restore(params, trajectories()["weights"][case.name][KEPT.index(SAVED_AT)])
    groups = SMALL.groups(params, case.proj_type, **AS_PUBLISHED, decay=DECAY[case.optimizer])
    return getattr(galore_torch, f"GaLore{case.optimizer}")(groups, **{**case.kwargs, **changes}), params


def new_8bit(**changes: Any) -> tuple[torch.optim.Optimizer, dict[str, Parameter]]:
    params = LARGE.parameters()
    LARGE.restore(params, eight_bit_run()["saved"])
    groups = LARGE.groups(params, "std", **AS_PUBLISHED, decay="after")
    groups[1]["weight_decay"] = LARGE_DECAY
    return galore_torch.GaLoreAdamW8bit(groups, **{**LARGE_KWARGS, "weight_decay": 0.0, **changes}), params


def dequantised(entry: dict[str, Any], which: int, block: int = 256) -> Tensor:
    """bitsandbytes' code: a 256-entry map times the largest magnitude of each block, blocks row-major and flat."""
    entry = entry.get(WRAPPED, entry)
    codes = entry[f"state{which}"]
    values = entry[f"qmap{which}"][codes.reshape(-1).long()].reshape(-1, block)
    return (values * entry[f"absmax{which}"][:, None]).reshape(codes.shape)


def assert_plain(optimizer: torch.optim.Optimizer) -> None:
    """State is plain tensors and numbers, every tensor owns exactly its bytes, and it round-trips with weights_only."""
    for state in optimizer.state.values():
        for key, value in state.items():
            assert isinstance(value, Tensor | int | float), f"{key} is a {type(value).__name__}"
            if isinstance(value, Tensor):
                own = value.numel() * value.element_size()
                assert value.untyped_storage().nbytes() == own, f"{key} keeps a larger storage alive"
                assert value.is_contiguous(), f"{key} is not contiguous"
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("case", LEGACY, ids=lambda case: case.name)
def test_continues_the_published_trajectory(case: Case) -> None:
    """From step 12, through the refresh of step 21 when the LAPACK here chooses the signs it chose for 1.0."""
    published = dict(zip(KEPT, trajectories()["weights"][case.name], strict=True))
    signs = SMALL.svd_signs(published[20], REFRESHES[2])
    last = STEPS if torch.equal(signs, trajectories()["svd_signs"][case.name][2]) else REFRESHES[2] - 1
    optimizer, params = new_optimizer(case)
    optimizer.load_state_dict(saved(case.name))
    weights = SMALL.train(optimizer.step, params, range(SAVED_AT + 1, last + 1))
    for step in (step for step in KEPT if SAVED_AT < step <= last):
        torch.testing.assert_close(weights[step], published[step], rtol=0.0, atol=ATOL, msg=f"after step {step}")


@pytest.mark.parametrize("case", LEGACY, ids=lambda case: case.name)
def test_state_becomes_plain_tensors(case: Case) -> None:
    """1.0 saved a Python object and, in fp32, bases that are views of a whole singular-vector matrix."""
    optimizer, _ = new_optimizer(case)
    legacy = saved(case.name)
    optimizer.load_state_dict(legacy)
    assert_plain(optimizer)
    for state in optimizer.state.values():
        assert int(state["step"]) == SAVED_AT
    for p, entry in zip(optimizer.param_groups[1]["params"], list(legacy["state"].values())[1:], strict=True):
        state, old = optimizer.state[p], entry["projector"].ortho_matrix
        bases = [state["basis_left"], state["basis_right"].mT] if case.proj_type == "full" else [state["basis"]]
        for ours, theirs in zip(bases, old if case.proj_type == "full" else [old], strict=True):
            torch.testing.assert_close(ours if ours.shape == theirs.shape else ours.mT, theirs, rtol=0.0, atol=0.0)


def test_the_fixture_has_what_makes_old_checkpoints_hard() -> None:
    """Else the tests above prove nothing: an object in the state, and a basis that drags a larger storage along."""
    entry = saved("adamw-std")["state"][1]
    assert type(entry["projector"]).__module__ == "galore_torch.galore_projector"
    basis = entry["projector"].ortho_matrix
    assert basis.untyped_storage().nbytes() > basis.numel() * basis.element_size()


def test_group_settings_come_from_the_file_and_the_rest_from_the_constructor() -> None:
    """torch's own rule: saved groups win. Keys that 1.0 did not have keep the values they were constructed with."""
    case = LEGACY[0]
    optimizer, _ = new_optimizer(case, lr=7.0)
    optimizer.load_state_dict(saved(case.name))
    for group in optimizer.param_groups:
        assert group["lr"] == case.kwargs["lr"]
        assert (group["transport"], group["decay"], group["projector"]) == ("keep", "after", "svd")
    assert optimizer.param_groups[0]["rank"] is None
    assert optimizer.param_groups[1]["rank"] == SMALL.rank


@pytest.mark.parametrize("name", ["adamw-std", "adafactor-std", "adamw8bit"])
def test_loading_leaves_the_given_dict_alone(name: str) -> None:
    """The same dict may be loaded into a second optimizer, as Optimizer.load_state_dict promises."""
    legacy = saved(name)
    before = copy.deepcopy(legacy)
    make = new_8bit if name == "adamw8bit" else lambda: new_optimizer(next(c for c in LEGACY if c.name == name))
    first, second = make()[0], make()[0]
    first.load_state_dict(legacy)
    second.load_state_dict(legacy)
    assert legacy["state"].keys() == before["state"].keys()
    for index, entry in before["state"].items():
        assert legacy["state"][index].keys() == entry.keys()
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_8bit_moments_convert_to_their_exact_values() -> None:
    """With state_codec="fp32" the moments are bitsandbytes' decoded values, to one rounding of fp32."""
    optimizer, params = new_8bit(state_codec="fp32")
    legacy = saved("adamw8bit")
    optimizer.load_state_dict(legacy)
    assert_plain(optimizer)
    for name, entry in zip([FULL_RANK, *[n for n in params if n != FULL_RANK]], legacy["state"].values(), strict=True):
        state = optimizer.state[params[name]]
        for which, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            expected = dequantised(entry, which) if name in QUANTISED else entry[WRAPPED][f"state{which}"]
            torch.testing.assert_close(state[key], expected, rtol=2**-23, atol=0.0)


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "flat"])
@pytest.mark.parametrize("block", [256, 2048])
def test_8bit_layouts_of_older_bitsandbytes(block: int, wrapped: bool) -> None:
    """Blocks were 2048 long in bitsandbytes 0.43.3, and the tensors lay in the state itself; sizes say which."""
    legacy = saved("adamw8bit")
    entry = legacy["state"][1]
    for which in (1, 2):
        entry[WRAPPED][f"absmax{which}"] = torch.linspace(0.5, 2.0, 4096 // block)
    expected = [dequantised(entry, which, block) for which in (1, 2)]
    if not wrapped:
        for state in legacy["state"].values():
            state.update(state.pop(WRAPPED))
    optimizer, params = new_8bit(state_codec="fp32")
    optimizer.load_state_dict(legacy)
    state = optimizer.state[params["tall"]]
    torch.testing.assert_close(state["exp_avg"], expected[0], rtol=2**-23, atol=0.0)
    torch.testing.assert_close(state["exp_avg_sq"], expected[1], rtol=2**-23, atol=0.0)


def test_8bit_checkpoint_continues_exactly_with_exact_moments() -> None:
    """Oracle: 1.0's AdamW from the decoded 8-bit state; and 1.0's 8-bit class where it keeps fp32 (under 4096 elements)."""
    optimizer, params = new_8bit(state_codec="fp32")
    optimizer.load_state_dict(saved("adamw8bit"))
    weights = LARGE.train(optimizer.step, params, range(SAVED_AT + 1, LAST_8BIT + 1))[LAST_8BIT]
    for name, part in LARGE.slices():
        oracle = eight_bit_run()["exact" if name in QUANTISED else "published"]
        torch.testing.assert_close(weights[part], oracle[part], rtol=0.0, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")


def test_8bit_checkpoint_continues_within_the_quantisation_bound() -> None:
    """Our int8 run against 1.0's 8-bit run, in the norm of each parameter; both use the same 256-entry maps.

    Let X be the run from the same state with exact moments, and q = |published - X|, known from the fixture: what the
    format costs. 1.0 rounded after each of the N = 8 steps, so its roundings acted on 7, 6, ..., 0 later steps. Ours may
    add one, when the blocks are laid out anew at the load, which acts on all 8. An error of a second moment stays and moves
    the weight by the same amount every step, and roundings are independent, so |ours - X| is at most
    q sqrt((1 + 4 + ... + 64) / (1 + 4 + ... + 49)) = 1.21 q, and 5 % for chance (three deviations of a norm of 4096
    values). Then |ours - published| <= |ours - X| + q by the triangle inequality.
    """
    optimizer, params = new_8bit()
    optimizer.load_state_dict(saved("adamw8bit"))
    assert_plain(optimizer)
    run, steps = eight_bit_run(), LAST_8BIT - SAVED_AT
    weights = LARGE.train(optimizer.step, params, range(SAVED_AT + 1, LAST_8BIT + 1))[LAST_8BIT]
    one_more = (sum(n * n for n in range(steps + 1)) / sum(n * n for n in range(steps))) ** 0.5
    for name, part in LARGE.slices():
        if name not in QUANTISED:
            torch.testing.assert_close(weights[part], run["published"][part], rtol=0.0, atol=ATOL)
            continue
        moved = (run["exact"] - run["saved"])[part].norm()
        q = (run["published"] - run["exact"])[part].norm()
        assert 0.0 < q < 0.03 * moved, f"{name}: the fixture's own quantisation error bounds nothing"
        assert (weights - run["exact"])[part].norm() <= 1.05 * one_more * q, f"{name}: coarser than 1.0"
        assert (weights - run["published"])[part].norm() <= (1.0 + 1.05 * one_more) * q, name
