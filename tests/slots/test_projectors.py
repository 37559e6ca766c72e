"""Every projector against the best rank-r energy, which only a full SVD knows."""

from __future__ import annotations

import pytest
import torch

from galore_torch.ops import linalg
from galore_torch.ops.linalg import orthonormalize, power_step
from galore_torch.slots.projectors import PROJECTORS


def drifting(m: int, n: int, turn: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gradients with a spectrum that falls as i^-0.7 and singular vectors that turn a little between them."""
    k = min(m, n)
    U, V = torch.randn(m, k).double(), torch.randn(n, k).double()
    spectrum = torch.arange(1, k + 1).double() ** -0.7
    later = U + turn * torch.randn(m, k).double(), V + turn * torch.randn(n, k).double()
    return tuple((orthonormalize(a) * spectrum) @ orthonormalize(b).mT for a, b in ((U, V), later))  # type: ignore[return-value]


def energy(G: torch.Tensor, basis: torch.Tensor, axis: int) -> float:
    captured = basis.mT @ G if axis == -2 else G @ basis
    return float(captured.square().sum() / torch.linalg.svdvals(G)[: basis.shape[1]].square().sum())


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])
@pytest.mark.parametrize("axes", [(-2,), (-1,), (-2, -1)])
@pytest.mark.parametrize(("name", "share"), [("svd", 1 - 1e-9), ("gram", 1 - 1e-9), ("rsvd", 0.99), ("power", 0.99)])
def test_share_of_the_best_energy_from_a_cold_and_a_warm_start(
    name: str, share: float, axes: tuple[int, ...], shape: tuple[int, int]
) -> None:
    first, second = drifting(*shape, turn=0.05)
    cold = PROJECTORS[name].find(first, dict.fromkeys(axes, 16), None, 0)
    warm = PROJECTORS[name].find(second, dict.fromkeys(axes, 16), cold, 1)
    for G, bases in ((first, cold), (second, warm)):
        assert bases.keys() == set(axes)
        for axis, basis in bases.items():
            assert basis.shape == (shape[axis], 16)
            assert share <= energy(G, basis, axis) <= 1 + 1e-9
            torch.testing.assert_close(basis.mT @ basis, torch.eye(16).double())
            assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


def test_a_power_step_spans_the_gradients_square_times_the_old_basis_with_its_weakest_direction_exchanged() -> None:
    G, _ = drifting(96, 64, 0.0)
    start = orthonormalize(torch.randn(96, 16).double())
    basis = power_step(G, start, seed=3)
    assert torch.equal(power_step(G, start, seed=3), basis)
    assert not torch.equal(power_step(G, start, seed=4), basis)
    old = G @ (G.mT @ start[:, :15])
    torch.testing.assert_close(basis @ (basis.mT @ old), old)
    torch.testing.assert_close(orthonormalize(old), basis[:, :15])  # each beside its old one


def test_power_converges_to_the_exact_subspace_of_a_gradient_that_stays_strongest_first() -> None:
    G, _ = drifting(60, 40, 0.0)
    bases = None
    for step in range(60):
        bases = PROJECTORS["power"].find(G, {-2: 8}, bases, step)
    exact = torch.linalg.svd(G).U[:, :7]  # the eighth direction is a new one at every step
    torch.testing.assert_close((bases[-2].mT @ exact).abs(), torch.eye(8, 7).double(), rtol=0, atol=1e-2)  # type: ignore[index]


def test_power_finds_directions_orthogonal_to_everything_it_has() -> None:
    """The rows that trained first stop; other rows, which no old vector and no power of the gradient reaches, begin."""
    first, second = torch.zeros(60, 40), torch.zeros(60, 40)
    first[:30], second[30:] = torch.randn(30, 40), torch.randn(30, 40)
    bases = PROJECTORS["rsvd"].find(first, {-2: 8}, None, 0)
    shares = []
    for step in range(12):
        bases = PROJECTORS["power"].find(second + 1e-3 * first, {-2: 8}, bases, step)
        shares.append(energy(second, bases[-2], -2))
    assert shares[-1] > 0.9


def test_power_survives_a_gradient_of_lower_rank_than_its_basis() -> None:
    G = torch.outer(torch.randn(60), torch.randn(40))
    basis = PROJECTORS["power"].find(G, {-2: 8}, {-2: orthonormalize(torch.randn(60, 8))}, 0)[-2]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8), rtol=0, atol=1e-5)
    assert energy(G, basis, -2) > 0.999


def test_random_bases_come_from_their_seed_alone() -> None:
    a, b, c = (PROJECTORS["random"].find(torch.randn(30, 20), {-2: 4, -1: 4}, None, seed) for seed in (3, 3, 4))
    for axis in (-2, -1):
        assert torch.equal(a[axis], b[axis])
        assert not torch.equal(a[axis], c[axis])
        torch.testing.assert_close(a[axis].mT @ a[axis], torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7, 8, 16])
def test_power_sees_a_gradient_that_left_its_subspace(rank: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that learns other classes: no row of the new gradient has been seen, and A A^T basis is exactly zero. Oracle: a full SVD."""
    if masked:  # the path of a device that the host cannot read
        monkeypatch.setattr(linalg, "readable", lambda tensor: False)
    first, second = torch.zeros(40, 256), torch.zeros(40, 256)
    first[:20], second[20:] = drifting(20, 256, 0.0)[0].float(), drifting(20, 256, 0.0)[1].float()
    for G in (first, second, first + 1e-8 * second):
        bases = PROJECTORS["power"].find(G, {-2: rank}, None, 0)
        for other in (first, second, second * 1e-20, second * 1e15):
            found = PROJECTORS["power"].find(other, {-2: rank}, bases, 1)[-2]
            torch.testing.assert_close(found.mT @ found, torch.eye(rank), rtol=0, atol=1e-5)
            assert energy(other.double(), found.double(), -2) > 0.5
            again = PROJECTORS["power"].find(other, {-2: rank}, {-2: found}, 2)[-2]
            assert energy(other.double(), again.double(), -2) > (0.9 if rank < 8 else 0.8)


def test_power_keeps_the_directions_that_still_see_the_gradient() -> None:
    """Half of the subspace dies, and is drawn anew from the gradient's range; the other half takes its ordinary step."""
    G = torch.zeros(64, 96)
    G[:24] = torch.randn(24, 96)  # rows 24 to 63 are dead units
    start = torch.eye(64)[:, [*range(8), *range(40, 48)]]
    basis = power_step(G, start, seed=5)
    assert basis[24:].abs().max() < 1e-5, "no direction is spent on what is dead"
    old = orthonormalize(G @ (G.mT @ start[:, :8]))
    torch.testing.assert_close(basis[:, :8], old, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 16])
def test_power_draws_anew_only_in_the_matrix_of_a_batch_that_is_blind(rank: int) -> None:
    seeing, other = torch.randn(64, 96), torch.randn(64, 96)
    other[32:] = 0
    start = torch.stack([orthonormalize(torch.randn(64, rank)), torch.eye(64)[:, 32 : 32 + rank]])
    together = power_step(torch.stack([seeing, other]), start, seed=1)
    random = linalg.gaussian((2, 64, max(1, rank // 32)), 1, seeing)[0]
    kept = start[0] if rank < 8 else start[0, :, :-1]
    block = torch.cat([kept, random / 8], dim=1)
    Q = orthonormalize(seeing @ (seeing.mT @ block))
    alone = Q if rank >= 8 else linalg.strongest(seeing, Q, rank)
    torch.testing.assert_close(together[0] @ together[0].mT, alone @ alone.mT, rtol=0, atol=1e-4)
    assert energy(other.double(), together[1].double(), -2) > 0.6


def test_power_on_zeros_and_on_a_rank_below_its_own_stays_orthonormal() -> None:
    thin = torch.randn(48, 2) @ torch.randn(2, 64)
    for G in (torch.zeros(48, 64), thin):
        for rank in (1, 4, 12):
            basis = power_step(G, orthonormalize(torch.randn(48, rank)), seed=0)
            torch.testing.assert_close(basis.mT @ basis, torch.eye(rank), rtol=0, atol=1e-5)
