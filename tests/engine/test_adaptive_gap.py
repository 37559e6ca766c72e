"""gap_range: each matrix finds its own interval between refreshes from the overlap of its old and new subspace."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from galore_torch import GaLoreAdamW
from galore_torch.engine import refresh as refresh_module
from galore_torch.engine import step as engine
from galore_torch.engine.refresh import adapted_gap
from galore_torch.ops import linalg
from galore_torch.ops.linalg import orthonormalize
from galore_torch.slots.subspace import kept_share

ADAPTIVE: dict[str, Any] = {"rank": 8, "update_proj_gap": 8, "gap_range": (2, 32)}
C_OF = {"same": torch.eye(8), "half": torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4)), "none": torch.zeros(8, 8)}


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which some parameter refreshed its basis, as they happen."""
    steps: list[int] = []
    refresh = engine.refresh

    def noted(view: Any, *rest: Any) -> None:
        steps.append(view.state["step"])
        refresh(view, *rest)

    monkeypatch.setattr(engine, "refresh", noted)
    return steps


def train(gradient: Callable[[int], Tensor], steps: int, weights: int = 1, **settings: Any) -> None:
    """Some 48 x 32 matrices, all with the same gradient."""
    params = [Parameter(torch.zeros(48, 32)) for _ in range(weights)]
    optimizer = GaLoreAdamW(params, **{**ADAPTIVE, **settings})
    for step in range(steps):
        for W in params:
            W.grad = gradient(step)
        optimizer.step()


def gaps(steps: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(steps)]


def steady(step: int) -> Tensor:
    """A subspace that stays: rank 7, so that the one fresh direction of a power step has nothing to find."""
    torch.manual_seed(0)
    U, V = orthonormalize(torch.randn(48, 7)), orthonormalize(torch.randn(32, 7))
    return (U * torch.arange(7, 0, -1)) @ V.mT


def restless(step: int) -> Tensor:
    """A new subspace at every step, of 8 in 32 dimensions: two of them overlap by a quarter, on average."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(48, 8, generator=generator) @ torch.randn(8, 32, generator=generator)


@pytest.mark.parametrize("projector", ["power", "gram"])
def test_the_gap_of_a_subspace_that_stays_doubles_up_to_its_bound(projector: str, refreshed: list[int]) -> None:
    train(steady, 120, projector=projector, overlap_range=(0.4, 0.8))
    found = gaps(refreshed)
    assert found[:3] == [8, 16, 32]
    assert set(found[3:]) == {32}


def test_the_gap_of_a_subspace_that_turns_away_halves_down_to_its_bound(refreshed: list[int]) -> None:
    train(restless, 40, projector="gram")
    found = gaps(refreshed)
    assert found[:3] == [8, 4, 2]
    assert set(found[3:]) == {2}


def test_the_gap_shrinks_again_when_a_steady_subspace_becomes_restless(refreshed: list[int]) -> None:
    train(lambda step: steady(step) if step < 60 else restless(step), 130, projector="gram")
    found = gaps(refreshed)
    assert max(found) == 32
    assert found[-1] == 2


@pytest.mark.parametrize(("C", "expected"), [("same", 16), ("half", 8), ("none", 4)])
def test_the_overlap_decides_whatever_signs_and_rotations_the_bases_have(C: str, expected: int) -> None:
    left, right = orthonormalize(torch.randn(8, 8)), orthonormalize(torch.randn(8, 8))
    for turned in (C_OF[C], -C_OF[C], left @ C_OF[C] @ right):
        assert int(adapted_gap(kept_share({-2: turned}), 8, (2, 32), (0.4, 0.6))) == expected


def test_two_sided_projection_takes_the_mean_overlap_of_its_sides() -> None:
    assert int(adapted_gap(kept_share({-2: C_OF["same"], -1: C_OF["none"]}), 8, (2, 32), (0.4, 0.6))) == 8
    assert int(adapted_gap(kept_share({-2: C_OF["same"], -1: C_OF["half"]}), 8, (2, 32), (0.4, 0.6))) == 16


def test_the_first_gap_staggers_the_parameters_as_a_fixed_one_does(refreshed: list[int]) -> None:
    train(steady, 17, weights=12, update_proj_gap=16)
    assert refreshed.count(0) == 12  # none had a basis
    assert len(refreshed) == 24
    assert max(refreshed.count(step) for step in range(1, 17)) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_that_makes_no_basis_changes_no_gap(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:  # the path of a device that the host cannot read
        for module in (linalg, refresh_module):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    W = Parameter(torch.zeros(48, 32))
    optimizer = GaLoreAdamW([W], **ADAPTIVE)
    for step in range(9):
        W.grad = steady(step) if step != 8 else torch.full((48, 32), float("nan"))
        optimizer.step()
    state = optimizer.state[W]
    assert (int(state["gap"]), bool(state["basis_ready"])) == (8, False)
    assert state["basis"].isfinite().all()


def test_resume_is_bit_exact_between_two_adapted_refreshes() -> None:
    def run(optimizer: GaLoreAdamW, W: Parameter, steps: range) -> None:
        for step in steps:
            W.grad = steady(step) + 0.01 * restless(step)
            optimizer.step()

    W = Parameter(torch.zeros(48, 32))
    straight = GaLoreAdamW([W], **ADAPTIVE)
    run(straight, W, range(30))
    saved, weights = copy.deepcopy(straight.state_dict()), W.detach().clone()
    run(straight, W, range(30, 80))
    again = Parameter(weights)
    resumed = GaLoreAdamW([again], **ADAPTIVE)
    resumed.load_state_dict(saved)
    run(resumed, again, range(30, 80))
    assert torch.equal(W, again)
    assert int(resumed.state[again]["gap"]) == int(straight.state[W]["gap"]) > 8


def test_an_fp32_matrix_keeps_two_numbers_more() -> None:
    W = Parameter(torch.zeros(48, 32))
    fixed, adaptive = GaLoreAdamW([W], rank=8).state[W], GaLoreAdamW([W], **ADAPTIVE).state[W]
    assert adaptive.keys() - fixed.keys() == {"gap", "gap_start"}
    assert all(adaptive[key].is_cpu for key in ("gap", "gap_start"))


def bad_settings() -> Iterator[tuple[dict[str, Any], str]]:
    for value in ((0, 8), (4, 2), (9, 32), (1, 7), (2,), 32, (2.0, 32), "2-32"):
        yield {"gap_range": value}, r"gap_range=.*update_proj_gap=8 between them.*\(2, 64\).*None"
    for value in ((0.6, 0.4), (-0.1, 0.5), (0.4, 1.1), (0.5,), 0.5, None, ("a", "b")):
        yield {"overlap_range": value}, r"overlap_range=.*between 0 and 1.*\(0.4, 0.6\)"
    yield {"gap_range": None, "overlap_range": (0.2, 0.3)}, "overlap_range=.*no effect without gap_range"
    yield {"projector": "random"}, "needs a projector that looks at the gradient: bases of .random."


@pytest.mark.parametrize(("setting", "words"), list(bad_settings()), ids=str)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GaLoreAdamW([Parameter(torch.zeros(48, 32))], **{**ADAPTIVE, **setting})
