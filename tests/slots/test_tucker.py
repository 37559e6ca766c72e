"""The Tucker projector. Oracles: tensorly's HOOI for the error of an approximation, einsum for the products, ranks by hand."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from galore_torch.ops.write import WeightUpdate
from galore_torch.slots import tucker
from galore_torch.slots.subspace import kept_share

each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


def tensor(shape: tuple[int, ...], decay: float, dtype: torch.dtype, turn: float = 0.0, seed: int = 0) -> Tensor:
    """Random in every mode's own basis, whose directions lose strength as i^-decay; ``turn`` moves the bases a little."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, dtype=dtype, generator=generator)
    for axis, size in enumerate(shape):
        basis = torch.randn(size, size, dtype=dtype, generator=generator)
        if turn:
            basis = basis + turn * torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
        factor = torch.linalg.qr(basis).Q * torch.arange(1, size + 1) ** -decay
        X = torch.tensordot(X, factor, dims=([axis], [1])).movedim(-1, axis)
    return X


def error(G: Tensor, factors: dict[int, Tensor]) -> float:
    """Of what the projection keeps, relative to G."""
    rest = G.clone()
    tucker.back(WeightUpdate(rest), tucker.project(G, factors), factors)
    return float(rest.norm() / G.norm())


# --- ranks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "ranks"),
    [
        ((64, 64, 3, 3), 16, {-4: 16, -3: 16}),  # a kernel's sides stay whole
        ((64, 64, 3, 3), 0.25, {-4: 32, -3: 32}),
        ((64, 32, 1), 0.25, {-3: 22, -2: 22}),  # of a matrix both sides have one rank
        ((8, 8, 8), 0.125, {-3: 4, -2: 4, -1: 4}),
        ((64, 3, 7, 7), 10, {-4: 10}),  # 7 is not above 10
        ((64, 3, 7, 7), (10, None, 4, 7), {-4: 10, -2: 4}),
        ((64, 3), (None, 2), {-1: 2}),  # a list is taken at its word, short modes too
        ((4, 3, 2, 1), 0.5, {}),
        ((64, 3, 1), 0.25, {-3: 3}),  # its unfolding has three columns
        ((64, 8, 2), (40, 3, 2), {-3: 6, -2: 3}),
        ((30, 20), 0.001, {-2: 1, -1: 1}),
    ],
)
def test_ranks_of_each_mode(shape: tuple[int, ...], rank: float | tuple[int | None, ...], ranks: dict[int, int]) -> None:
    assert tucker.mode_ranks(shape, rank) == ranks


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(64, 64, 16, 9), (32, 32, 8, 8, 5), (48, 40, 30), (64, 64, 64, 33)])
def test_a_fraction_is_of_the_elements_and_nearly_used(shape: tuple[int, ...], fraction: float) -> None:
    """No rank can be raised without leaving the bound, and all are in proportion within two."""
    ranks = tucker.mode_ranks(shape, fraction)
    core = prod(ranks.get(axis - len(shape), size) for axis, size in enumerate(shape))
    assert core <= fraction * prod(shape)
    for axis, rank in ranks.items():
        assert abs(rank - shape[axis] * fraction ** (1 / len(shape))) < 2
        assert core // rank * (rank + 1) > fraction * prod(shape)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=\[4, 4\] has 2 numbers.*\(8, 8, 8\) has 3 dimensions"):
        tucker.mode_ranks((8, 8, 8), (4, 4))


# --- subspaces --------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.5])
@pytest.mark.parametrize(
    ("shape", "rank"), [((20, 18, 12, 9), 0.1), ((20, 18, 12, 9), 0.5), ((40, 30, 3, 3), 0.25), ((9, 8, 7, 6, 5), 0.2)]
)
def test_the_error_on_a_refresh_step_is_tensorlys_within_five_percent(
    shape: tuple[int, ...], rank: float, decay: float, dtype: torch.dtype
) -> None:
    """From nothing, and from the factors of an earlier gradient whose subspaces have turned since. decay 0 is noise."""
    tensorly = pytest.importorskip("tensorly", reason="tensorly is not installed")
    from tensorly.decomposition import partial_tucker

    first, later = tensor(shape, decay, dtype), tensor(shape, decay, dtype, turn=0.1)
    ranks = tucker.mode_ranks(shape, rank)
    factors = None
    for step, G in enumerate((first, later)):
        factors = tucker.find(G, ranks, factors, step)
        modes = [axis + len(shape) for axis in ranks]
        (core, theirs), _ = partial_tucker(G.numpy(), list(ranks.values()), modes=modes, init="svd", n_iter_max=100, tol=1e-6)
        best = torch.from_numpy(tensorly.tenalg.multi_mode_dot(core, theirs, modes=modes))
        assert error(G, factors) <= 1.05 * float((best - G).norm() / G.norm())


@each_dtype
def test_factors_are_orthonormal_and_own_their_storage(dtype: torch.dtype) -> None:
    G = tensor((12, 10, 8), 1.0, dtype)
    cold = tucker.find(G, {-3: 5, -2: 4, -1: 3}, None, 0)
    for factors in (cold, tucker.find(G, {-3: 5, -2: 4, -1: 3}, cold, 1)):
        assert {axis: tuple(U.shape) for axis, U in factors.items()} == {-3: (12, 5), -2: (10, 4), -1: (8, 3)}
        for U in factors.values():
            torch.testing.assert_close(U.mH @ U, torch.eye(U.shape[1], dtype=dtype))
            assert U.untyped_storage().nbytes() == U.numel() * U.element_size()


@each_dtype
def test_a_warm_sweep_on_the_same_gradient_leaves_each_vector_where_it_was(dtype: torch.dtype) -> None:
    """Moments then need no transport: C is the identity."""
    G = tensor((12, 10, 8), 1.0, dtype)
    factors = None
    for step in range(30):
        old, factors = factors, tucker.find(G, {-3: 5, -2: 4, -1: 3}, factors, step)
    C = tucker.overlap(factors, old)  # type: ignore[arg-type]
    for matrix in C.values():
        torch.testing.assert_close(matrix, torch.eye(len(matrix), dtype=dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(kept_share(C), torch.ones((), dtype=torch.float64))


@each_dtype
def test_a_gradient_that_left_every_subspace_is_found_again(dtype: torch.dtype) -> None:
    """A x_k (basis basis^H) is exactly zero: no old direction sees the new gradient."""
    first, second = torch.zeros(20, 16, 12, dtype=dtype), torch.zeros(20, 16, 12, dtype=dtype)
    first[:10, :8, :6], second[10:, 8:, 6:] = tensor((10, 8, 6), 1.0, dtype), tensor((10, 8, 6), 1.0, dtype, seed=5)
    ranks = {-3: 5, -2: 4, -1: 3}
    factors = tucker.find(first, ranks, None, 0)
    best = error(second, tucker.find(second, ranks, None, 0))
    for step in range(1, 4):
        factors = tucker.find(second, ranks, factors, step)
    assert error(second, factors) <= 1.05 * best


def test_a_gradient_of_fewer_directions_than_ranks_keeps_factors_orthonormal() -> None:
    G = torch.einsum("i,j,k->ijk", torch.randn(12), torch.randn(10), torch.randn(8))
    factors = None
    for step in range(3):
        factors = tucker.find(G, {-3: 5, -2: 4, -1: 3}, factors, step)
        assert error(G, factors) < 1e-5
        for U in factors.values():
            torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), rtol=0, atol=1e-5)


# --- products ---------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("axes", [(-4,), (-3,), (-2,), (-1,), (-4, -1), (-3, -2), (-4, -3, -2, -1)], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_products_with_the_factors_of_any_modes(axes: tuple[int, ...], dtype: torch.dtype, memory: str) -> None:
    shape = (6, 5, 7, 4)
    factors = {axis: torch.linalg.qr(torch.randn(shape[axis], 3, dtype=dtype)).Q for axis in axes}
    letters, names = "abcd", {-4: "a", -3: "b", -2: "c", -1: "d"}
    small = "".join(letter.upper() if letter in [names[axis] for axis in axes] else letter for letter in letters)
    terms = ",".join(names[axis] + names[axis].upper() for axis in axes)
    W, G = torch.randn(2, *shape, dtype=dtype)
    if memory == "channels_last":
        W, G = (each.contiguous(memory_format=torch.channels_last) for each in (W, G))
    core = tucker.project(G, factors)
    torch.testing.assert_close(core, torch.einsum(f"{letters},{terms}->{small}", G, *(U.conj() for U in factors.values())))
    expected = 0.9 * W - 0.3 * torch.einsum(f"{small},{terms}->{letters}", core, *factors.values())
    tucker.back(WeightUpdate(W, scale=0.3, decay_factor=0.9), core, factors)
    torch.testing.assert_close(W, expected)
