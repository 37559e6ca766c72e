"""Tensors at the edges: gradients with few live rows, in halves of nothing, complex layers, and settings that nothing would read."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.layout import make_layout
from galore_torch.galore_projector_tensor import GaLoreProjectorTensor
from galore_torch.ops import linalg
from galore_torch.slots import sparse_tucker, tucker

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])


def live_rows(shape: tuple[int, ...], dtype: torch.dtype, live: int, seed: int) -> Tensor:
    """A gradient of a few random rows, as of an embedding."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.zeros(shape, dtype=dtype)
    rows = torch.randperm(shape[0], generator=generator)[:live]
    G[rows] = torch.randn(live, *shape[1:], dtype=dtype, generator=generator)
    return G


@each_dtype
@pytest.mark.parametrize(("shape", "rank", "live"), [((64, 32), 16, 2), ((64, 32), 16, 5), ((64, 32, 3, 3), 0.25, 4)])
def test_gradients_of_a_few_rows_train(shape: tuple[int, ...], rank: Any, live: int, dtype: torch.dtype) -> None:
    """Their Gram matrices go down to underflow, of which LAPACK in fp32 makes NaN and errors."""
    for seed in range(3):
        p = Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = g.TensorGaLoreAdamW([p], rank=rank, tensor=True, update_proj_gap=1)
        for step in range(10):
            p.grad = live_rows(shape, dtype, live, 100 * seed + step)
            optimizer.step()
            for name, basis in optimizer.state[p].items():
                if name.startswith("basis_") and isinstance(basis, Tensor) and basis.dim() == 2:
                    torch.testing.assert_close(basis.mH @ basis, torch.eye(basis.shape[1], dtype=dtype), rtol=0, atol=1e-5)
        assert p.detach().abs().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_orthonormalize_takes_columns_that_depend_on_one_another_or_are_near_underflow(dtype: torch.dtype) -> None:
    few = torch.randn(64, 2, dtype=dtype) @ torch.randn(2, 48, dtype=dtype)
    graded = torch.randn(64, 48, dtype=dtype) * torch.logspace(0, -44, 48)
    for columns in (few, graded, torch.zeros(64, 48, dtype=dtype)):
        Q = linalg.orthonormalize(columns)
        torch.testing.assert_close(Q.mH @ Q, torch.eye(48, dtype=dtype), rtol=0, atol=1e-5)
    found = linalg.orthonormalize(few)[:, :2]
    torch.testing.assert_close(found @ (found.mH @ few), few, rtol=0, atol=1e-4)


def test_a_gram_matrix_that_fp32_cannot_take_has_its_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What LAPACK does near underflow depends on its build, so it is played: NaN, or an error, on a device too. Oracle: fp64."""
    true_eigh, columns = torch.linalg.eigh, torch.randn(20, 6)
    gram = columns.mT @ columns
    expected = true_eigh(gram.double())[1][:, -4:].flip(-1)

    def fails(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float64:
            return true_eigh(matrix)
        if raises:
            raise torch.linalg.LinAlgError("did not converge")
        return None, torch.full_like(matrix, float("nan"))

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    for raises, readable in ((False, True), (True, True), (True, False)):  # noqa: B007 (the closures read them)
        monkeypatch.setattr(linalg, "readable", lambda _: readable)  # noqa: B023
        found = linalg._strongest_eigenvectors(gram, 4)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@each_dtype
@pytest.mark.parametrize(("shape", "rank"), [((8, 8, 8), 1), ((8, 8), 1), ((8, 7, 6), 4)])
def test_a_gradient_that_is_orthogonal_to_every_factor_is_found(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    """Its contraction with all other factors is 0 in every mode."""
    p = Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = g.TensorGaLoreAdamW([p], rank=rank, tensor=True, update_proj_gap=1)
    for at in ([0] * len(shape), [5] * len(shape)):
        before = p.detach().clone()
        for _ in range(3):
            p.grad = torch.zeros(shape, dtype=dtype)
            p.grad[tuple(at)] = 1.0
            optimizer.step()
        assert (p.detach() - before)[tuple(at)].abs() > 1e-4


def test_a_warm_sweep_that_holds_most_of_the_gradient_does_not_start_anew() -> None:
    """Moments would turn for nothing."""
    G = torch.randn(9, 8, 7)
    ranks = {-3: 8, -2: 7, -1: 6}
    first = tucker.find(G, ranks, None, 0)
    again = tucker.find(G + 0.01 * torch.randn_like(G), ranks, first, 5)
    for axis, factor in again.items():
        assert (factor * first[axis]).sum(0).min() > 0.5


@pytest.mark.parametrize("mode", ["direct", "direct_update"])
def test_complex_linear_layers_have_their_gradients_in_full(mode: str) -> None:
    """The products of a direct pass have no conjugates. Oracle: the run without it."""

    def run(fused: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(24, 16, dtype=torch.complex64)
        optimizer = g.TensorGaLoreAdamW(layer.parameters(), lr=0.01, rank=6)
        if fused:
            with pytest.warns(UserWarning, match="is complex"):
                g.fused_backward(layer, optimizer, mode)
        for _ in range(4):
            x = torch.randn(64, 24, dtype=torch.complex64, requires_grad=True)
            layer(x).abs().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert x.grad is not None
        return [p.detach() for p in layer.parameters()], x.grad

    (weights, slope), (expected, expected_slope) = run(True), run(False)
    for found, wanted in zip([*weights, slope], [*expected, expected_slope], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_predict_carries_complex_moments() -> None:
    """|m|^2 and not m^2. Oracle: the real weight, turned by a phase."""
    phase, moves = torch.polar(torch.ones(()), torch.tensor(0.7)), []
    for turn in (torch.ones((), dtype=torch.complex64), phase):
        p, generator = Parameter(torch.zeros(8, 8, 8, dtype=torch.complex64)), torch.Generator().manual_seed(0)
        optimizer = g.TensorGaLoreAdamW([p], lr=0.01, rank=4, transport="predict", update_proj_gap=1, betas=(0.9, 0.99))
        for _ in range(4):
            p.grad = turn * torch.randn(8, 8, 8, dtype=torch.complex64, generator=generator)
            optimizer.step()
        moves.append(p.detach())
    assert moves[0].abs().max() > 0
    torch.testing.assert_close(moves[1], phase * moves[0], rtol=1e-3, atol=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------------


def test_the_projector_tucker_keeps_single_elements_too() -> None:
    group = {**g.GaLoreAdamW([Parameter(torch.zeros(2))]).param_groups[0], "rank": 4, "projector": "tucker", "sparse": 0.2}
    assert make_layout((8, 8, 8), torch.float32, group).projector == "tucker_sparse"


@pytest.mark.parametrize(
    ("shape", "settings", "text"),
    [
        ((16, 12), {"sparse": 0.2}, r"sparse=0\.2 keeps single elements of none of this group's 1 parameters"),
        ((8, 8, 8), {"proj_type": "right"}, "proj_type='right' has no effect in a group whose parameters are all projected as tensors"),
        ((8, 8, 8), {"projector": "svd"}, "projector='svd' has no effect in a group"),
        ((8, 8, 8), {"batch_dims": 0}, "batch_dims=0 has no effect in a group"),
    ],
)
def test_settings_that_no_parameter_of_the_group_reads_are_said(shape: tuple[int, ...], settings: dict[str, Any], text: str) -> None:
    with pytest.warns(UserWarning, match=text):
        g.TensorGaLoreAdamW([Parameter(torch.zeros(shape))], rank=4, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = [Parameter(torch.zeros(8, 8, 8)), Parameter(torch.zeros(16, 12))]
        g.TensorGaLoreAdamW(both, rank=4, **settings)


def test_numbers_of_numpy_in_lists_are_plain_in_a_checkpoint() -> None:
    np = pytest.importorskip("numpy")
    for rank in ([np.int64(4), None, 4], np.array([4, 8, 4])):
        p = Parameter(torch.zeros(8, 8, 8))
        optimizer = g.TensorGaLoreAdamW([p], rank=rank, betas=(np.float64(0.9), 0.999))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        group = torch.load(buffer, weights_only=True)["param_groups"][0]
        assert group["betas"] == (0.9, 0.999)
        assert list(group["rank"])[::2] == [4, 4]


@pytest.mark.parametrize("rank", [4, 0.25, [4, None, 4, 4]])
def test_an_empty_tensor_is_none_of_its_business(rank: Any) -> None:
    p = Parameter(torch.zeros(0, 8, 8, 8))
    optimizer = g.TensorGaLoreAdamW([p], rank=rank)  # nor of a warning's, which is an error here
    p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize(("shape", "rank"), [((64, 4), 0.02), ((64, 1, 1, 3), 0.02), ((5, 1, 3), 0.1)])
def test_a_fraction_leaves_short_dimensions_whole(shape: tuple[int, ...], rank: float) -> None:
    assert all(shape[axis] > tucker.SHORT for axis in tucker.mode_ranks(shape, rank))


def test_the_largest_elements_of_a_tiny_gradient() -> None:
    G = torch.randn(8, 8, 8)
    found = sparse_tucker.find(1e-24 * G, {-3: 4, -2: 4, -1: 4, 0: 50}, None, 0)[0]
    assert torch.equal(found, G.abs().flatten().topk(50).indices.sort().values)


def test_single_elements_of_an_int8_weight_are_refused_at_once() -> None:
    model = g.quantize_linears(nn.Sequential(nn.Linear(64, 64)), targets="all-linear")
    with pytest.raises(ValueError, match=r"sparse=0\.05 writes single elements.*INT8"):
        g.QGaLoreAdamW8bit(g.galore_param_groups(model, 8, targets="all-linear", tensor=True, sparse=0.05))


def test_the_published_class_takes_a_rank_that_shortens_nothing_and_refuses_what_is_none() -> None:
    X = torch.randn(6, 6, 5)
    for rank in (100, [None, None, None]):
        projector = GaLoreProjectorTensor(rank, scale=2.0)
        torch.testing.assert_close(projector.project_back(projector.project(X, 0)), 2 * X)
    for rank in (-1, 0, 1.5, [4, 0, 4]):
        with pytest.raises(ValueError, match="is not a rank"):
            GaLoreProjectorTensor(rank)
    with pytest.raises(ValueError, match="update_proj_gap=0"):
        GaLoreProjectorTensor(4, update_proj_gap=0)


def test_a_complex_checkpoint_does_not_go_into_a_real_parameter() -> None:
    def made(dtype: torch.dtype) -> Any:
        p = Parameter(torch.zeros(8, 8, 8, dtype=dtype))
        optimizer = g.TensorGaLoreAdamW([p], rank=4)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match=r"is torch\.complex64, but a parameter of torch\.float32 needs torch\.float32"):
        made(torch.float32).load_state_dict(made(torch.complex64).state_dict())


def test_messages_name_a_cure_that_works() -> None:
    z = Parameter(torch.zeros(8, 8, dtype=torch.complex64))
    for rank in (4, "full"):
        with pytest.raises(ValueError, match=r"sides of real matrices.*without a rank"):
            g.GaLoreMuon([{"params": [z], "rank": rank}])
    with pytest.raises(ValueError, match=r"Give their group tensor=True; without a rank"):
        g.TensorGaLoreAdamW([Parameter(torch.zeros(8, 8))], rank=[4, 4])
