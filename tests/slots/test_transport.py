"""Moments across a change of basis: the invariants every rule of transport must keep (LDAdam, arXiv 2410.16103; GoLore, 2410.11289)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import galore_torch as g
from galore_torch.ops.linalg import orthonormalize
from galore_torch.slots.rules import Moment
from galore_torch.slots.structured import rows_overlap
from galore_torch.slots.subspace import kept_share
from galore_torch.slots.transport import TRANSPORTS
from galore_torch.train.plan.optimizer_bytes import param_bytes
from support.memory import peak_bytes


def moved(name: str, C: dict[int, torch.Tensor], value: torch.Tensor, kind: str, mean_over: int | None = None) -> torch.Tensor:
    """One moment across a change of basis; a moment that the row does not name stays."""
    moments = {"moment": Moment(kind, mean_over)}  # type: ignore[arg-type]
    return dict(TRANSPORTS[name].apply(C, {"moment": value}, moments, {}, 1)).get("moment", value)


def basis(m: int, r: int) -> torch.Tensor:
    return orthonormalize(torch.randn(m, r).double())


@pytest.mark.parametrize("kind", ["first", "second"])
def test_the_same_basis_is_the_identity(kind: str) -> None:
    moment = torch.rand(4, 7).double()
    C = {-2: torch.eye(4).double()}
    torch.testing.assert_close(moved("rotate", C, moment, kind), moment)


def test_a_full_basis_that_turns_leaves_the_momentum_unchanged() -> None:
    old, new = basis(6, 6), basis(6, 6)
    m = torch.randn(6, 9).double()
    torch.testing.assert_close(new @ moved("rotate", {-2: new.mT @ old}, m, "first"), old @ m)


@pytest.mark.parametrize(("axis", "shape"), [(-2, (4, 9)), (-1, (9, 4))])
def test_the_sign_of_an_old_basis_vector_never_matters(axis: int, shape: tuple[int, int]) -> None:
    """Flipping column j of the old basis flips row j of m and leaves v: the carried moments must not notice."""
    old, new, flip = basis(10, 4), basis(10, 4), torch.tensor([1.0, -1, -1, 1]).double()
    along = flip.unsqueeze(1 if axis == -2 else 0)
    m, v = torch.randn(shape).double(), torch.rand(shape).double()
    C, D = {axis: new.mT @ old}, {axis: new.mT @ (old * flip)}
    torch.testing.assert_close(moved("rotate", D, m * along, "first"), moved("rotate", C, m, "first"))
    torch.testing.assert_close(moved("rotate", D, v, "second"), moved("rotate", C, v, "second"))
    assert (moved("rotate", C, v, "second") >= 0).all()


def test_the_second_moment_of_uncorrelated_coordinates_is_carried_exactly() -> None:
    """Oracle: the empirical second moment of the same samples in the turned basis."""
    samples = torch.randn(400_000, 3).double() * torch.tensor([3.0, 1.0, 0.2]).double()
    C = basis(3, 3)
    carried = moved("rotate", {-2: C}, samples.square().mean(0).unsqueeze(1), "second")
    torch.testing.assert_close(carried.squeeze(1), (samples @ C.T).square().mean(0), rtol=0.02, atol=0)


def test_factored_moments_are_carried_on_the_axis_they_have() -> None:
    row, col, C = torch.rand(4).double(), torch.rand(9).double(), basis(4, 4)
    torch.testing.assert_close(moved("rotate", {-2: C}, row, "second", -1), C.square() @ row)
    torch.testing.assert_close(moved("rotate", {-2: C}, col, "second", -2), col)
    torch.testing.assert_close(moved("rotate", {-1: C}, row, "second", -2), C.square() @ row)


def test_a_new_direction_without_history_gets_the_mean_of_the_old_second_moments() -> None:
    """Axes 0, 1, 2 give way to 1, 2, 3: two keep their own value, the third never seen gets the mean, and no row is near zero."""
    eye, v = torch.eye(6).double(), torch.tensor([[1.0], [2.0], [6.0]]).double()
    C = eye[:, 1:4].mT @ eye[:, :3]
    torch.testing.assert_close(moved("rotate", {-2: C}, v, "second"), torch.tensor([[2.0], [6.0], [3.0]]).double())


def test_both_sides_are_carried_for_two_sided_projections() -> None:
    A, B, m = basis(4, 4), basis(4, 4), torch.randn(4, 4).double()
    torch.testing.assert_close(moved("rotate", {-2: A, -1: B}, m, "first"), A @ m @ B.mT)


def test_rotate_keeps_the_momentum_that_keep_loses_when_signs_flip() -> None:
    old = basis(12, 4)
    new = old * torch.tensor([1.0, -1, 1, -1]).double()
    m = torch.randn(4, 9).double()

    def cosine(after: torch.Tensor) -> float:
        return float(torch.cosine_similarity((old @ m).flatten(), (new @ after).flatten(), dim=0))

    C = {-2: new.mT @ old}
    assert cosine(moved("rotate", C, m, "first")) == pytest.approx(1.0)
    assert cosine(moved("keep", C, m, "first")) < 0.9


def test_reset_forgets_moments_and_leaves_what_is_no_moment() -> None:
    C, value = {-2: torch.eye(4).double()}, torch.rand(4, 2).double()
    assert not moved("reset", C, value, "first").any()
    assert not moved("reset", C, value, "second").any()


@pytest.mark.parametrize("transport", ["rotate", "predict"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_places_of_a_set_of_rows_are_what_their_matrix_of_ones_is(batch: tuple[int, ...], transport: str) -> None:
    """Rows that stay, change their place, or are new: moments of R's shape, and those averaged over either axis."""
    old = torch.stack([torch.randperm(9)[:4] for _ in range(2)])[: len(batch) + 1]
    new = torch.stack([torch.randperm(9)[:5] for _ in range(2)])[: len(batch) + 1]
    old, new = (index if batch else index[0] for index in (old, new))
    places = rows_overlap({-2: new}, {-2: old})
    C = (new.unsqueeze(-1) == old.unsqueeze(-2)).double()
    torch.testing.assert_close(kept_share(places).double(), kept_share({-2: C}) * 4 / 5)
    m, v = torch.randn(*batch, 4, 7).double(), torch.rand(*batch, 4, 7).double()
    moments: dict[str, Any] = {"exp_avg": Moment("first"), "exp_avg_sq": Moment("second")}
    values = {"exp_avg": m, "exp_avg_sq": v}
    if transport == "rotate":
        moments |= {"rows": Moment("second", mean_over=-1), "columns": Moment("second", mean_over=-2)}
        values |= {"rows": v.mean(-1), "columns": v.mean(-2)}
    group = {"betas": (0.9, 0.99)}
    by_place, by_matrix = (dict(TRANSPORTS[transport].apply(each, values, moments, group, 3)) for each in (places, {-2: C}))
    assert by_place.keys() == by_matrix.keys() == values.keys()
    for name in values:
        torch.testing.assert_close(by_place[name], by_matrix[name])


@pytest.mark.parametrize("shape", [(256, 2048), (4, 256, 512)])
def test_a_refresh_of_rows_holds_what_is_planned(shape: tuple[int, ...]) -> None:
    """One moment after the other; R is more than a chunk of an elementwise pass."""
    W = torch.nn.Parameter(torch.randn(shape))
    W.grad = torch.randn(shape)
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=128, projector="rows", update_proj_gap=2, compile=False)
    optimizer.step()
    peak = max(peak_bytes(optimizer.step) for _ in range(4))
    planned = param_bytes(shape, torch.float32, optimizer.param_groups[0], optimizer.rule)
    assert peak < 1.05 * planned.refresh
