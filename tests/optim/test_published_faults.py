"""Every proven fault of galore-torch 1.0's bases, inputs and numbers (B1 to B15 of docs/differences.md) is absent here.

Each test names its oracle: torch.linalg.svd, a formula by hand, or a second run of ours that must agree. B16 to B21 are in
test_published_faults_step.py, those of the 8-bit class, B22 to B26, in test_published_faults_8bit.py.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing import assert_close

from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD
from galore_torch.galore_projector_tensor import GaLoreProjectorTensor

PUBLISHED: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (GaLoreAdamW, {}),
    (GaLoreAdamW8bit, {}),
    (GaLoreAdafactor, {"lr": 0.01}),
]
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
each_class = pytest.mark.parametrize(("cls", "own"), PUBLISHED, ids=[cls.__name__ for cls, _ in PUBLISHED])


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer: Optimizer, params: list[Parameter], steps: int, first: int = 0, shape: tuple[int, ...] | None = None) -> None:
    """Steps on gradients that depend on nothing but the step and the parameter's place; drawn in ``shape`` where given."""
    for step in range(first, first + steps):
        for place, p in enumerate(params):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * place + step))
            p.grad = noise.to(p.dtype)
        optimizer.step()


def tensors(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}


def everything(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The weight and its state, but for the flag that asks for a new basis."""
    return {"weight": p.detach(), **{k: v for k, v in tensors(optimizer, p).items() if k != "basis_ready"}}


def held(values: dict[str, Tensor]) -> int:
    """Bytes of the storages behind some tensors: what stays allocated because of them."""
    return sum(value.untyped_storage().nbytes() for value in values.values())


@each_class
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_b01_basis_owns_its_storage(cls: type[Optimizer], own: dict[str, Any], proj_type: str) -> None:
    """Memory held and bytes in a file are those of the elements, not those of the whole U or Vh the basis was cut from."""
    p = weight(96, 64)
    optimizer = cls([p], rank=4, proj_type=proj_type, **own)
    train(optimizer, [p], 2)
    state = tensors(optimizer, p)
    assert any(key.startswith("basis") for key in state)
    elements = sum(value.numel() * value.element_size() for value in state.values())
    assert held(state) == elements
    torch.save(optimizer.state_dict()["state"], file := io.BytesIO())
    assert len(file.getvalue()) < elements + 8192  # the file format's own overhead; U alone has 96 x 64 x 4 = 24,576 bytes
    assert elements < 16_384


def test_b02_adafactor_under_bf16_holds_factors_and_a_thin_basis() -> None:
    """Oracle: sizes by hand, in bytes. 256 x 192 at rank 4: basis 192 x 4, row means 256, column means 4, one flag."""
    for codec, width in (("fp32", 4), ("bf16", 2)):
        p = weight(256, 192, dtype=torch.bfloat16)
        optimizer = GaLoreAdafactor([p], lr=0.01, rank=4, basis_codec=codec)
        train(optimizer, [p], 1)
        assert held(tensors(optimizer, p)) == 192 * 4 * width + (256 + 4) * 4 + 1


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_b03_a_refresh_does_not_turn_the_momentum(proj_type: str) -> None:
    """Two singular directions swap places at the refresh: same subspace, other basis vectors.

    Oracle: the running average of the gradients, in full. All of them lie in the subspace, so it must be basis x momentum.
    "keep", as 1.0 did, hands one direction's momentum to the other.
    """
    u, v = torch.linalg.qr(torch.randn(24, 2))[0], torch.linalg.qr(torch.randn(16, 2))[0]
    gradients = [u @ torch.diag(torch.tensor(s)) @ v.T for s in ([9.0, 1.0], [9.0, 1.0], [1.0, 9.0], [1.0, 9.0])]
    cosines = {}
    for transport in ("rotate", "keep"):
        p = weight(24, 16)
        keys = {"update_proj_gap": 2, "proj_type": proj_type, "projector": "svd", "transport": transport}
        optimizer = GaLoreAdamW([p], rank=2, **keys)
        average = torch.zeros(24, 16)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
            average.lerp_(gradient, 0.1)
        state = optimizer.state[p]
        if proj_type == "full":
            momentum = state["basis_left"] @ state["exp_avg"] @ state["basis_right"].T
        elif proj_type == "std":
            momentum = state["exp_avg"] @ state["basis"].T
        else:
            momentum = state["basis"] @ state["exp_avg"]
        cosines[transport] = torch.cosine_similarity(momentum.flatten(), average.flatten(), dim=0).item()
    assert cosines["rotate"] > 0.9999
    assert cosines["keep"] < 0.9


@each_class
@pytest.mark.parametrize("rank", [4, 6])
def test_b04_reverse_std_of_a_wide_matrix_takes_any_rank(cls: type[Optimizer], own: dict[str, Any], rank: int) -> None:
    """4 x 10 at rank 4 and above, where 1.0 stopped with a shape error. Oracle: the same run without a rank."""
    a, b = weight(4, 10), weight(4, 10)
    with pytest.warns(UserWarning, match="full rank"):
        optimizer = cls([a], rank=rank, proj_type="reverse_std", scale=1.0, **own)
    train(optimizer, [a], 3)
    train(cls([b], **own), [b], 3)
    assert torch.equal(a, b)


@each_class
def test_b05_unknown_proj_type_is_refused_by_name(cls: type[Optimizer], own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"proj_type='diagonal'.*'std', 'reverse_std', 'left', 'right', 'full'"):
        cls([{"params": [weight(6, 4)], "rank": 2, "proj_type": "diagonal"}], **own)


@each_class
def test_b06_a_group_needs_only_its_rank(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """1.0 stopped with a KeyError at the first step. Oracle: the same run with the documented defaults written out."""
    a, b = weight(12, 8), weight(12, 8)
    train(cls([{"params": [a], "rank": 2}], **own), [a], 3)
    train(cls([{"params": [b], "rank": 2, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}], **own), [b], 3)
    assert torch.equal(a, b)


@each_class
@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": -1}, {"rank": 2.0}, {"update_proj_gap": 0}], ids=str)
def test_b06_bad_settings_are_refused_at_construction(cls: type[Optimizer], own: dict[str, Any], bad: dict[str, Any]) -> None:
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{key}={value}"):
        cls([{"params": [weight(6, 4)], "rank": 2, **bad}], **own)


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (5, 0), (2, 3, 0)], ids=str)
def test_b07_parameters_that_are_no_matrices_train(
    cls: type[Optimizer], own: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Scalars, vectors and the empty shards of flattening wrappers share a group with a rank. Oracle: the run without one."""
    runs, own = [], {**own, "lr": 0.1}
    for rank in (2, None):
        p, matrix = weight(*shape, dtype=dtype), weight(8, 6, dtype=dtype)
        groups = [{"params": [p]}, {"params": [matrix], "rank": rank}]
        if rank and len(shape) < 2:
            groups = [{"params": [p, matrix], "rank": rank}]
        train(cls(groups, **own), [p, matrix], 2)
        runs.append(p.detach())
    assert torch.equal(runs[0], runs[1])
    assert runs[0].isfinite().all()
    assert runs[0].numel() == 0 or not torch.equal(runs[0], weight(*shape, dtype=dtype))


@each_class
@pytest.mark.parametrize("shape", [(12, 6, 2, 2), (6, 5, 3, 2, 2)], ids=str)
def test_b08_b09_b10_tensors_train_as_their_matrices(cls: type[Optimizer], own: dict[str, Any], shape: tuple[int, ...]) -> None:
    """4-D and 5-D weights, refreshed bases included. Oracle: the run of the reshaped matrix, bit for bit."""
    tensor = weight(*shape)
    matrix = Parameter(tensor.detach().clone().flatten(1))
    for p in (tensor, matrix):
        optimizer = cls([p], rank=3, update_proj_gap=2, **own)
        train(optimizer, [p], 2)
        first = optimizer.state[p]["basis"].clone()
        train(optimizer, [p], 3, first=2)
        assert not torch.equal(optimizer.state[p]["basis"], first)
    assert torch.equal(tensor.flatten(1), matrix)


def test_b09_the_published_key_dim_is_read_or_refused() -> None:
    """1.0 wrote dim=2 into its groups; a larger one chose its broken tensor projector, and chooses one that works here."""
    GaLoreAdamW([{"params": [weight(6, 4)], "rank": 2, "dim": 2}])
    p = weight(6, 5, 2, 2, 2)
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2, "dim": 5}])
    assert optimizer.state[p]["exp_avg"].shape == (2, 2, 2, 2, 2)
    with pytest.raises(ValueError, match=r"dim=5.*tensor=True"):
        GaLoreAdamW([{"params": [weight(6, 5, 2, 2, 2)], "rank": 2, "dim": 5, "tensor": False}])
    core = GaLoreProjectorTensor(rank=2).project(weight(6, 5, 2).detach(), 0)
    assert core.shape == (2, 2, 2)


def test_b10_a_tensor_moves_by_what_the_rule_says() -> None:
    """The first step of Adam does not depend on the gradient's size; 1.0's tensor path was plain SGD, which does."""
    moves = []
    for factor in (1.0, 100.0):
        p = weight(8, 4, 3, 3)
        before = p.detach().clone()
        optimizer = GaLoreAdamW([p], rank=2, eps=0.0, lr=0.1)
        p.grad = factor * weight(8, 4, 3, 3, seed=1).detach()
        optimizer.step()
        moves.append(p.detach() - before)
    assert_close(moves[0], moves[1], rtol=1e-4, atol=1e-5)
    assert moves[0].abs().max() > 1e-3


@each_class
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_b11_gradients_that_are_not_finite_change_nothing(cls: type[Optimizer], own: dict[str, Any], bad: float) -> None:
    """On a refresh step and on another, projected or not: weights, moments and basis stay, and training goes on."""
    params = [weight(12, 8), weight(6, 5), weight(7)]
    optimizer = cls([{"params": params[:1], "rank": 2, "update_proj_gap": 2}, {"params": params[1:]}], **own)
    for first in (2, 3):  # then step 2, where a refresh is due, and step 3, where none would be
        train(optimizer, params, first)
        before = copy.deepcopy([everything(optimizer, p) for p in params])
        for p in params:
            p.grad = torch.ones_like(p)
            p.grad.view(-1)[1] = bad
        optimizer.step()
        assert_close([everything(optimizer, p) for p in params], before, rtol=0.0, atol=0.0)
        train(optimizer, params, 1, first=50)
        assert not any(torch.equal(p, old["weight"]) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("projector", ["svd", "gram"])
def test_b11_a_zero_gradient_never_makes_a_basis(projector: str) -> None:
    """The basis comes from the first gradient that has one. Oracle: torch.linalg.svd of that gradient."""
    p = weight(12, 8)
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=4, projector=projector)
    for step in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert not optimizer.state[p]["basis"].any(), f"a basis was made at step {step}"
    train(optimizer, [p], 1)
    basis = optimizer.state[p]["basis"].clone()
    top = torch.linalg.svd(p.grad)[2][:3].T
    assert_close(basis @ basis.T, top @ top.T, rtol=0.0, atol=1e-4)
    p.grad = torch.zeros_like(p)  # step 4, where a refresh is due: the basis it has stays
    optimizer.step()
    assert torch.equal(optimizer.state[p]["basis"], basis)
    train(optimizer, [p], 1, first=9)  # and the refresh is made up for
    assert not torch.equal(optimizer.state[p]["basis"], basis)


@pytest.mark.parametrize("projector", ["svd", "gram"])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_b11_the_basis_does_not_depend_on_the_gradients_size(projector: str, size: float) -> None:
    """Squares of small gradients underflow and those of large ones overflow. Oracle: torch.linalg.svd in fp64."""
    p = weight(12, 8)
    optimizer = GaLoreAdamW([p], rank=3, projector=projector)
    p.grad = weight(12, 8, seed=1).detach() * size
    optimizer.step()
    top = torch.linalg.svd(p.grad.double())[2][:3].T.float()
    basis = optimizer.state[p]["basis"]
    assert_close(basis @ basis.T, top @ top.T, rtol=0.0, atol=1e-4)


@each_class
def test_b12_state_lives_where_its_parameter_lives(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """Also when the checkpoint was on another device; "meta" stands for it. The flag alone is always on the host."""
    saved = cls([weight(12, 8)], rank=2, **own).state_dict()
    p = Parameter(torch.empty(12, 8, device="meta"))
    optimizer = cls([p], rank=2, **own)
    assert "basis" in optimizer.state[p]
    for _ in range(2):
        assert {k: v.device.type for k, v in tensors(optimizer, p).items()} == {
            k: "cpu" if k == "basis_ready" else "meta" for k in tensors(optimizer, p)
        }
        optimizer.load_state_dict(saved)


@pytest.mark.gpu(2)
def test_b12_a_device_index_is_kept() -> None:
    p = Parameter(torch.randn(12, 8, device="cuda:1"))
    optimizer = GaLoreAdamW([p], rank=2)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["basis"].device == p.device


@each_class
def test_b13_a_closure_may_call_backward(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """Oracle: backward and step() by hand."""
    a, b, x = weight(8, 6), weight(8, 6), torch.randn(6)
    with_closure, by_hand = cls([a], rank=2, **own), cls([b], rank=2, **own)

    def closure(p: Parameter = a) -> Tensor:
        p.grad = None
        loss = (p @ x).square().sum()
        loss.backward()
        return loss

    loss = with_closure.step(closure)
    assert_close(loss, closure(b))
    by_hand.step()
    assert torch.equal(a, b)


@each_class
def test_b14_a_checkpoint_loads_with_torchs_defaults(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """torch.load with weights_only=True, and the run goes on as if nothing had happened. Oracle: the uninterrupted run."""
    a, b = weight(12, 8), weight(12, 8)
    one, two = (cls([p], rank=2, update_proj_gap=3, **own) for p in (a, b))
    train(one, [a], 4)
    torch.save({"weights": a.detach(), "optimizer": one.state_dict()}, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file)
    assert {type(value) for value in loaded["optimizer"]["state"][0].values()} <= {Tensor, int}
    with torch.no_grad():
        b.copy_(loaded["weights"])
    two.load_state_dict(loaded["optimizer"])
    train(one, [a], 4, first=4)
    train(two, [b], 4, first=4)
    assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [None, 2])
def test_b15_second_moments_under_bf16_reach_their_limit(rank: int | None) -> None:
    """Constant gradient: v must come to g^2 (projected: to its squared coordinate); in bf16 it stuck at half of it."""
    p = Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([p], lr=1e-5, rank=rank)
    for _ in range(1200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    state = optimizer.state[p]
    expected = 1.0 if rank is None else torch.linalg.matrix_norm(torch.ones(8, 8)).square().item() / 8
    assert state["exp_avg_sq"].dtype == torch.float32
    assert state["exp_avg_sq"].max().item() == pytest.approx(expected * (1 - 0.999**1200), rel=1e-3)


@pytest.mark.parametrize("rank", [None, 4])
def test_b15_small_updates_of_bf16_weights_add_up(rank: int | None) -> None:
    """1000 updates of -1e-3 on weights of 1 come to 0 on average; rounded to nearest, as in 1.0, they stay at 1."""
    means = {}
    for rounding in (True, False):
        p = Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
        optimizer = GaLoreSGD([p], lr=1e-3, rank=rank, scale=1.0, stochastic_rounding=rounding)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means[rounding] = p.float().mean().item()
    assert abs(means[True]) < 0.02  # its standard error is about 0.04 / 32
    assert means[False] == 1.0
