"""Subspaces against a full SVD."""

from __future__ import annotations

import pytest
import torch

from galore_torch.ops import linalg
from support.memory import peak_bytes

SHAPES = [(30, 20), (20, 30), (16, 16), (3, 30, 20)]


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ basis.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_and_svd_span_the_same_subspaces(shape: tuple[int, ...]) -> None:
    G = torch.randn(shape, dtype=torch.float64)
    for exact, gram in zip(linalg.svd_bases(G, 5), linalg.gram_bases(G, 5), strict=True):
        torch.testing.assert_close(projector(gram), projector(exact), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bases", [linalg.svd_bases, linalg.gram_bases])
@pytest.mark.parametrize("shape", SHAPES)
def test_bases_are_orthonormal_capture_the_best_energy_and_own_their_storage(bases, shape: tuple[int, ...]) -> None:
    G = torch.randn(shape)
    best = torch.linalg.svdvals(G)[..., :5].square().sum(-1)
    left, right = bases(G, 5)
    for basis, captured in ((left, left.mT @ G), (right, G @ right)):
        eye = torch.eye(5).expand(*shape[:-2], 5, 5)
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(captured.square().sum((-2, -1)), best, rtol=1e-4, atol=0)
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


def test_orthonormalize_keeps_the_side_of_each_vector() -> None:
    basis = linalg.orthonormalize(torch.randn(20, 5))
    torch.testing.assert_close(linalg.orthonormalize(basis * torch.tensor([2.0, 3, 1, 5, 4])), basis)
    torch.testing.assert_close(linalg.orthonormalize(-basis), -basis)


@pytest.mark.parametrize(("value", "good"), [(1.0, True), (1e-30, True), (0.0, False), (float("nan"), False), (float("inf"), False)])
def test_usable_gradients_are_finite_and_not_zero(value: float, good: bool) -> None:
    G = torch.zeros(4, 5)
    G[2, 3] = value
    assert bool(linalg.measured(G)[0]) is good


def test_mode_product_multiplies_rows_and_columns() -> None:
    X, A, B = torch.randn(4, 5), torch.randn(2, 4), torch.randn(3, 5)
    torch.testing.assert_close(linalg.mode_product(X, A, -2), torch.einsum("ij,jk->ik", A, X))
    torch.testing.assert_close(linalg.mode_product(X, B, -1), torch.einsum("ij,kj->ki", B, X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_a_16_bit_matrix_makes_no_fp32_copy_of_it(dtype: torch.dtype) -> None:
    """A few rows are widened at a time: the allocator gives less than the matrix holds, and what does not fit is still found."""
    matrix = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (matrix, matrix.T, matrix.view(6, 100, 1000), matrix.flatten()):
        torch.testing.assert_close(linalg.norm(tensor).double(), tensor.double().norm(), rtol=1e-5, atol=0)
        assert linalg.finite(tensor)
    assert linalg.norm(matrix).dtype == torch.float32
    assert peak_bytes(lambda: linalg.finite(matrix)) < matrix.nbytes / 2
    for bad in (torch.inf, -torch.inf, torch.nan):
        for place in (0, 300, -1):
            spoilt = matrix.clone()
            spoilt[place, -1] = bad
            assert not linalg.finite(spoilt)
