"""TensorGRaD: single elements beside a Tucker core. Oracles: `TensorGRaDReference`, naive; torch's AdamW on the elements alone."""

from __future__ import annotations

import copy
from math import ceil, prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.layout import layout_of, make_layout
from galore_torch.engine.sharding import Placed
from galore_torch.engine.stored import state_spec
from galore_torch.optim.low_rank_hook import LowRankHookState
from galore_torch.slots import sparse_tucker
from galore_torch.slots.subspace import kept_share
from references.tucker import TensorGRaDReference
from support.memory import storage_bytes
from support.optimizer_infos import through_a_file

SHAPE, RANKS, SHARE = (7, 6, 5, 4), [4, 3, None, 2], 0.02
K = ceil(SHARE * prod(SHAPE))
FREE = 5  # the rows from here on hold outliers alone
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])


def noise(steps: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(steps)]


def with_outliers(steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Of exactly `RANKS` in the first rows, and K large elements in the others, half of which move from step to step."""
    found = []
    bases = [None if rank is None else torch.randn(size, rank, dtype=dtype) for size, rank in zip(SHAPE, RANKS, strict=True)]
    places = torch.randperm(prod(SHAPE[1:]) * (SHAPE[0] - FREE))
    for step in range(steps):
        G = torch.randn([rank or size for size, rank in zip(SHAPE, RANKS, strict=True)], dtype=dtype)
        for mode, basis in enumerate(bases):
            if basis is not None:
                turned = basis + 0.3 * torch.randn_like(basis)
                turned[FREE:] *= mode != 0
                G = torch.tensordot(G, torch.linalg.qr(turned).Q, dims=([mode], [1])).movedim(-1, mode)
        G[FREE:] = 0
        at = torch.cat([places[: K // 2], places[K * (1 + step) : K * (1 + step) + K - K // 2]])
        G[FREE:].view(-1)[at] = 30 * torch.randn(K, dtype=dtype) + 90
        found.append(G)
    return found


def trained(p: Parameter, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> Tensor:
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
    return p.detach()


# --- the algorithm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize(("scale", "sparse_scale", "weight_decay"), [(0.25, 1.0, 0.0), (1.0, 0.4, 0.1)])
def test_equals_the_paper_over_refreshes(scale: float, sparse_scale: float, weight_decay: float, dtype: torch.dtype) -> None:
    W = Parameter(torch.randn(SHAPE, dtype=dtype))
    reference = TensorGRaDReference(W.detach(), RANKS, K, 3, scale, sparse_scale, 0.01, weight_decay)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"rank": RANKS, "scale": scale, "sparse": SHARE, "sparse_scale": sparse_scale, "tensor": True}
    optimizer = g.GaLoreAdamW([W], lr=0.01, update_proj_gap=3, weight_decay=weight_decay, **settings)
    for G in with_outliers(8, dtype):
        W.grad = G
        optimizer.step()
        torch.testing.assert_close(W.detach(), reference.step(G), rtol=1e-6, atol=1e-7)


def test_outliers_alone_are_trained_as_adamw_trains_them_whatever_the_scale() -> None:
    """Oracle: torch's AdamW. All other weights stay where they are, for nothing is left for the core."""
    at = torch.randperm(prod(SHAPE))[:K]
    grads = []
    for _ in range(7):
        G = torch.zeros(prod(SHAPE))
        G[at] = torch.randn(K)
        grads.append(G.view(SHAPE))
    p, q = (Parameter(torch.ones(SHAPE)) for _ in range(2))
    optimizer = g.GaLoreAdamW([p], lr=0.01, eps=1e-12, rank=RANKS, scale=0.3, sparse=SHARE, tensor=True, update_proj_gap=2)
    adamw = torch.optim.AdamW([q], lr=0.01, eps=1e-12, weight_decay=0.0)
    torch.testing.assert_close(trained(p, optimizer, grads), trained(q, adamw, grads), rtol=1e-5, atol=1e-6)


@each_dtype
def test_without_moments_what_the_set_and_the_core_hold_is_followed(dtype: torch.dtype) -> None:
    """Oracle: torch's SGD, on gradients whose outliers stand where the rest is zero."""
    p, q = (Parameter(torch.ones(SHAPE, dtype=dtype)) for _ in range(2))
    grads = with_outliers(4, dtype)
    settings: dict[str, Any] = {"rank": RANKS, "scale": 1.0, "sparse": SHARE, "tensor": True, "update_proj_gap": 1}
    found = trained(p, g.GaLoreSGD([p], lr=0.01, **settings), grads)
    torch.testing.assert_close(found, trained(q, torch.optim.SGD([q], lr=0.01), grads), rtol=1e-4, atol=1e-5)


def test_the_set_is_found_at_a_refresh_and_kept_until_the_next() -> None:
    p = Parameter(torch.zeros(SHAPE))
    optimizer = g.GaLoreAdamW([p], rank=RANKS, sparse=SHARE, tensor=True, update_proj_gap=3)
    for step, G in enumerate(noise(7)):
        before = optimizer.state[p]["basis_index"].clone()
        trained(p, optimizer, [G])
        index = optimizer.state[p]["basis_index"]
        expected = G.flatten().abs().argsort(descending=True)[:K].sort().values.int() if step % 3 == 0 else before
        assert torch.equal(index, expected)


def test_a_set_crosses_a_refresh_element_by_element() -> None:
    """C of an index set, by hand; the share that stayed is what the adaptive gap reads."""
    U = torch.eye(3)[:, :2]
    old = {-1: U, sparse_tucker.SET: torch.tensor([2, 5, 7, 9], dtype=torch.int32)}
    new = {-1: U, sparse_tucker.SET: torch.tensor([1, 5, 9, 11])}
    C = sparse_tucker.overlap(new, old)
    assert C[sparse_tucker.SET].tolist() == [-1, 1, 3, -1]
    assert float(kept_share(C)) == 0.75, "of the factors all, of the set half"


@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("cls", [g.GaLoreAdamW, g.GaLoreAdafactor, g.GaLoreAdagrad, g.GaLoreSGD])
def test_every_rule_and_transport_trains_both_parts(cls: Any, transport: str) -> None:
    p = Parameter(torch.zeros(SHAPE))
    settings: dict[str, Any] = {"rank": RANKS, "sparse": SHARE, "tensor": True, "update_proj_gap": 2, "transport": transport}
    found = trained(p, cls([p], lr=0.01, **settings), noise(5))
    assert found.isfinite().all()
    assert (found != 0).all()


def test_any_torch_class_runs_on_both_parts() -> None:
    """Oracle: this package's own AdamW there."""
    grads = noise(5)
    p, q = (Parameter(torch.ones(SHAPE)) for _ in range(2))
    shared: dict[str, Any] = {"lr": 0.01, "eps": 1e-12, "rank": RANKS, "update_proj_gap": 2, "tensor": True, "sparse": SHARE}
    one = trained(p, g.GaLore(torch.optim.AdamW, [p], weight_decay=0.0, **shared), grads)
    torch.testing.assert_close(one, trained(q, g.GaLoreAdamW([q], **shared), grads), rtol=1e-4, atol=1e-5)


@each_dtype
def test_error_feedback_remembers_what_both_parts_dropped(dtype: torch.dtype) -> None:
    """Weight and memory add up to plain SGD's weight."""
    p = Parameter(torch.zeros(SHAPE, dtype=dtype))
    settings: dict[str, Any] = {"rank": RANKS, "scale": 1.0, "sparse": SHARE, "tensor": True, "update_proj_gap": 100}
    optimizer = g.GaLoreSGD([p], lr=1.0, carry="error_feedback", **settings)
    grads = noise(4, dtype)
    found = trained(p, optimizer, grads) - optimizer.state[p]["error"]
    torch.testing.assert_close(found, -torch.stack(grads).sum(0), rtol=1e-4, atol=1e-4)


# --- state ------------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(("state_codec", "basis_codec"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int4")])
def test_the_state_is_what_state_spec_says_before_and_after_training(state_codec: str, basis_codec: str, dtype: torch.dtype) -> None:
    p = Parameter(torch.zeros(SHAPE, dtype=dtype))
    codecs: dict[str, Any] = {"state_codec": state_codec, "basis_codec": basis_codec, "min_8bit_size": 0}
    optimizer = g.GaLoreAdamW([p], rank=RANKS, sparse=SHARE, update_proj_gap=2, tensor=True, **codecs)
    group = optimizer.param_groups[0]
    expected = sum(spec.nbytes for spec in state_spec(layout_of(p, group), group, optimizer.rule).values())
    assert storage_bytes(optimizer.state[p]) == expected
    trained(p, optimizer, noise(5, dtype))
    assert storage_bytes(optimizer.state[p]) == expected
    assert all(isinstance(value, Tensor | int) for value in optimizer.state[p].values())


def test_bytes_by_hand() -> None:
    """5 % beside 20 %: an index of 4 bytes an element, and both moments, 12 of a complex number."""
    p = Parameter(torch.zeros(32, 32, 16, 9, dtype=torch.complex64))
    optimizer = g.TensorGaLoreAdamW([p], rank=[16, 16, 8, 5], sparse=0.05)
    core, factors, k = 16 * 16 * 8 * 5, 32 * 16 + 32 * 16 + 16 * 8 + 9 * 5, ceil(0.05 * 32 * 32 * 16 * 9)
    assert storage_bytes(optimizer.state[p]) == 12 * (core + k) + 8 * factors + 4 * k + 1


@each_dtype
@pytest.mark.parametrize("cls", [g.GaLoreAdamW, g.GaLoreAdamW8bit])
def test_a_run_resumes_bit_for_bit_through_a_file(cls: Any, dtype: torch.dtype) -> None:
    grads = noise(9, dtype)
    settings: dict[str, Any] = {"lr": 0.01, "rank": 0.3, "sparse": 0.05, "update_proj_gap": 2, "tensor": True, "min_8bit_size": 0}
    whole = Parameter(torch.ones(SHAPE, dtype=dtype))
    expected = trained(whole, cls([whole], **settings), grads)
    p = Parameter(torch.ones(SHAPE, dtype=dtype))
    first = cls([p], **settings)
    trained(p, first, grads[:5])
    q = Parameter(p.detach().clone())
    second = cls([q], **settings)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert torch.equal(trained(q, second, grads[5:]), expected)


def test_a_checkpoint_of_another_share_is_refused() -> None:
    p = Parameter(torch.ones(SHAPE))
    saved = g.GaLoreAdamW([p], rank=RANKS, sparse=0.1, tensor=True).state_dict()
    for sparse in (None, 0.2):
        other = g.GaLoreAdamW([p], rank=RANKS, sparse=sparse, tensor=True)
        groups = [{**saved["param_groups"][0], "sparse": sparse}]
        with pytest.raises(ValueError, match="checkpoint"):
            other.load_state_dict({**saved, "param_groups": groups})


@each_dtype
def test_eight_bit_moments_stay_near_fp32(dtype: torch.dtype) -> None:
    shape = (24, 20, 12, 8)
    found = []
    for codec in ("fp32", "int8", "bf16"):
        p = Parameter(torch.zeros(shape, dtype=dtype))
        common = noise(1, dtype, shape)[0]
        grads = [0.5 * common + G for G in noise(10, dtype, shape)]
        settings: dict[str, Any] = {"rank": 0.25, "sparse": 0.05, "tensor": True, "state_codec": codec, "update_proj_gap": 4}
        found.append(trained(p, g.GaLoreAdamW([p], lr=0.01, **settings), grads))
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()
    assert (found[2] - found[0]).norm() < 0.03 * found[0].norm()


# --- weights and gradients --------------------------------------------------------------------------------------------------


def test_bf16_weights_follow_fp32_ones_on_average() -> None:
    """Steps below half of bf16's last place are not lost, at the elements neither, which are rounded once for each part."""
    shape = (32, 24, 24, 16)
    p, q = Parameter(torch.ones(shape)), Parameter(torch.ones(shape, dtype=torch.bfloat16))
    settings: dict[str, Any] = {"lr": 1e-4, "rank": 0.3, "sparse": 0.2, "tensor": True, "scale": 1.0, "basis_codec": "fp32"}
    one = g.GaLoreAdamW([p], **settings)
    grads = noise(1, torch.bfloat16, shape) * 20
    moved = trained(p, one, [G.float() for G in grads]) - 1
    rounded = trained(q, g.GaLoreAdamW([q], **settings), grads).float() - 1
    index = one.state[p]["basis_index"].long()
    for some in (slice(None), index):
        found, expected = rounded.flatten()[some], moved.flatten()[some]
        assert float((found * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.05)


def test_weights_and_gradients_in_any_order_of_memory() -> None:
    def arranged(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last)

    p, q = Parameter(torch.ones(SHAPE)), Parameter(arranged(torch.ones(SHAPE)))
    grads, settings = noise(5), {"lr": 0.01, "rank": 0.3, "sparse": 0.05, "update_proj_gap": 2, "tensor": True}
    one = trained(p, g.GaLoreAdamW([p], **settings), grads)  # type: ignore[arg-type]
    other = trained(q, g.GaLoreAdamW([q], **settings), [arranged(G) for G in grads])  # type: ignore[arg-type]
    assert not q.is_contiguous()
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(at: int, dtype: torch.dtype) -> None:
    grads = noise(6, dtype)
    grads[at][1, 2, 3, 1] = float("nan")
    p = Parameter(torch.ones(SHAPE, dtype=dtype))
    optimizer = g.GaLoreAdamW([p], lr=0.01, rank=0.3, sparse=0.05, update_proj_gap=2, tensor=True)
    for step, G in enumerate(grads):
        weight, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
        trained(p, optimizer, [G])
        if step == at:
            assert torch.equal(p, weight)
            kept = state.keys() - {"step", "basis_ready", "index"}
            assert all(torch.equal(optimizer.state[p][key], state[key]) for key in kept)
    assert p.isfinite().all()


@pytest.mark.parametrize("mode", ["project", "update", "direct"])
@pytest.mark.filterwarnings(r"ignore:the gradients of \d matrices are made in full")
def test_fused_backward_is_the_plain_run(mode: str) -> None:
    """The linear layer too, whose outer product of two factors is made in full under "direct"."""

    def run(fused: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, generator = nn.Sequential(nn.Conv1d(8, 8, 7, padding=3), nn.Linear(24, 12)), torch.Generator().manual_seed(1)
        optimizer = g.GaLoreAdamW(model.parameters(), lr=0.01, rank=0.3, sparse=0.05, update_proj_gap=3, tensor=True)
        if fused:
            g.fused_backward(model, optimizer, mode)
        for _ in range(5):
            model(torch.randn(2, 8, 24, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_communication_hook_sends_such_a_gradient_whole() -> None:
    """Of basis R the projection is not R again, so R alone must not cross the wire; of a core without elements it is."""
    for sparse, whole in ((0.05, True), (None, False)):
        p = Parameter(torch.ones(SHAPE))
        optimizer = g.GaLoreAdamW([p], rank=RANKS, sparse=sparse, tensor=True)
        trained(p, optimizer, noise(1))
        assert (LowRankHookState(optimizer).projected(p) is None) == whole


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sparse": 0.05}, "sparse=0.05 keeps elements beside a tensor projection: give tensor=True"),
        ({"sparse": 5, "tensor": True}, "sparse=5 is not a share.*between 0 and 1"),
        ({"sparse": 1.0, "tensor": True}, r"sparse=1\.0 is not a share"),
        ({"sparse": 0.0, "tensor": "auto"}, r"sparse=0\.0 is not a share"),
        ({"sparse_scale": 0.5, "tensor": True}, r"sparse_scale=0\.5 has no effect without sparse"),
        ({"sparse": 0.05, "sparse_scale": 0.0, "tensor": True}, r"sparse_scale=0\.0 is not a finite number above 0"),
        ({"projector": "tucker_sparse"}, "projector='tucker_sparse' keeps single elements: say which share"),
        ({"sparse": 0.05, "tensor": True, "recovery": "fira"}, "recovery='fira' is for projected sides"),
        ({"sparse": 0.05, "tensor": True, "transport": "predict"}, "transport='predict' has no rule for the single elements"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        g.GaLoreAdamW([Parameter(torch.zeros(SHAPE))], **{"rank": 4, **settings})


def test_a_tensor_that_is_cut_between_processes_is_refused_by_name() -> None:
    group = {**g.GaLoreAdamW([Parameter(torch.zeros(2))]).param_groups[0], "tensor": True, "rank": 0.25, "sparse": 0.05}
    with pytest.raises(ValueError, match=r"\(12, 10, 8\) is cut between processes.*tensor=False"):
        make_layout((6, 10, 8), torch.float32, group, Placed((12, 10, 8), ((0, 2),)))


def test_auto_keeps_elements_of_tensors_alone() -> None:
    group = {**g.GaLoreAdamW([Parameter(torch.zeros(2))]).param_groups[0], "rank": 0.25, "tensor": "auto", "sparse": 0.05}
    assert make_layout((64, 32), torch.float32, group).projector == "power"
    assert make_layout((64, 32, 3, 3), torch.float32, group).low_shape == (32 * 16 * 9 + ceil(0.05 * 64 * 32 * 9),)
    assert not make_layout((4, 3, 2), torch.float32, group).ranks, "short dimensions: full rank, and no set"
