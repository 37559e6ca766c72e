"""Optimizers on tensors of any order, real and complex, with a factor for each mode. Oracle: `TensorGaLoreReference`, fp64, naive."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.layout import layout_of, make_layout
from galore_torch.engine.sharding import Placed
from galore_torch.engine.stored import state_spec
from galore_torch.galore_projector_tensor import GaLoreProjectorTensor
from references.tucker import TensorGaLoreReference
from support.memory import storage_bytes
from support.optimizer_infos import through_a_file

SHAPE, RANKS = (7, 6, 5, 4), [4, 3, None, 2]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])


def gradients(steps: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, ranks: Any = RANKS) -> list[Tensor]:
    """Of exactly these ranks, in subspaces that turn from step to step."""
    exact = torch.complex128 if dtype.is_complex else torch.float64
    bases = [None if rank is None else torch.randn(size, rank, dtype=exact) for size, rank in zip(shape, ranks, strict=True)]
    found = []
    for _ in range(steps):
        G = torch.randn([size if rank is None else rank for size, rank in zip(shape, ranks, strict=True)], dtype=exact)
        for mode, basis in enumerate(bases):
            if basis is not None:
                turned = torch.linalg.qr(basis + 0.3 * torch.randn_like(basis)).Q
                G = torch.tensordot(G, turned, dims=([mode], [1])).movedim(-1, mode)
        found.append(G.to(dtype))
    return found


def trained(p: Parameter, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> Tensor:
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
    return p.detach()


def noise(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(steps)]


# --- the algorithm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "ranks"), [(SHAPE, RANKS), ((6, 5, 4), [2, 3, 3]), ((6, 9), [3, 3]), ((3, 4, 3, 2, 5), [2, 2, 2, None, 2])]
)
def test_equals_the_paper_over_refreshes(shape: tuple[int, ...], ranks: Any, weight_decay: float, dtype: torch.dtype) -> None:
    W = Parameter(torch.randn(shape, dtype=dtype))
    reference = TensorGaLoreReference(W.detach(), ranks, 3, 0.25, 0.01, weight_decay)
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=ranks, scale=0.25, update_proj_gap=3, weight_decay=weight_decay, tensor=True)
    for G in gradients(8, dtype, shape, ranks):
        W.grad = G
        optimizer.step()
        torch.testing.assert_close(W.detach(), reference.step(G), rtol=1e-6, atol=1e-7)


@each_dtype
@pytest.mark.parametrize("rank", [None, list(SHAPE), 7])
def test_at_full_rank_it_is_adamw(dtype: torch.dtype, rank: Any) -> None:
    """Oracle for a real weight: torch's; for a complex one AdamW with the mean of |g|^2, written out. eps is 0."""
    start, grads = noise(SHAPE, 1, dtype, 9)[0], noise(SHAPE, 6, dtype)
    p, q = Parameter(start.clone()), Parameter(start.clone())
    with pytest.warns(UserWarning, match="trained at full rank") if rank else nullcontext():
        optimizer = g.GaLoreAdamW([p], lr=0.01, weight_decay=0.1, eps=0.0, rank=rank, scale=1.0, tensor=True)
    found = trained(p, optimizer, grads)
    if not dtype.is_complex:
        expected = trained(q, torch.optim.AdamW([q], lr=0.01, weight_decay=0.1, eps=0.0), grads)
    else:
        expected, m, v = start.to(torch.complex128), torch.zeros(()), torch.zeros(())
        for t, G in enumerate(grads, start=1):
            m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G.abs().double() ** 2
            expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / (v / (1 - 0.999**t)).sqrt()
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=1e-6)


def test_without_moments_a_gradient_of_these_ranks_is_followed_exactly() -> None:
    """SGD sees no difference between a gradient and its projection. Oracle: torch's SGD."""
    start = torch.randn(SHAPE)
    for dtype in (torch.float32, torch.complex64):
        p, q = (Parameter(start.to(dtype, copy=True)) for _ in range(2))
        grads = gradients(4, dtype)
        optimizer = g.GaLoreSGD([p], lr=0.1, rank=RANKS, scale=1.0, update_proj_gap=1, tensor=True)
        torch.testing.assert_close(trained(p, optimizer, grads), trained(q, torch.optim.SGD([q], lr=0.1), grads), rtol=1e-5, atol=1e-6)


def test_the_phase_of_a_complex_gradient_turns_the_update_and_nothing_else() -> None:
    """Conjugates in the right places: with one left out, or moments of real and imaginary parts, this fails."""
    phase = torch.polar(torch.ones(()), torch.tensor(0.7))
    moves = []
    for turn in (torch.ones((), dtype=torch.complex64), phase):
        p = Parameter(torch.zeros(SHAPE, dtype=torch.complex64))
        optimizer = g.GaLoreAdamW([p], lr=0.1, rank=RANKS, update_proj_gap=2, tensor=True)
        moves.append(trained(p, optimizer, [turn * G for G in noise(SHAPE, 5, torch.complex64)]))
    torch.testing.assert_close(moves[1], phase * moves[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [g.GaLoreAdafactor, g.GaLoreAdagrad, lambda p, **k: g.GaLoreSGD(p, momentum=0.9, **k)])
def test_other_rules_do_not_see_a_complex_weight_that_is_real(make: Any) -> None:
    """Imaginary parts of zero: the run of the real weight."""
    grads = gradients(6)
    found = []
    for dtype in (torch.float32, torch.complex64):
        p = Parameter(torch.ones(SHAPE, dtype=dtype))
        found.append(trained(p, make([p], lr=0.02, rank=RANKS, update_proj_gap=2, tensor=True), [G.to(dtype) for G in grads]))
    torch.testing.assert_close(found[1].real, found[0], rtol=1e-3, atol=1e-4)
    assert found[1].imag.abs().max() < 1e-5


def test_any_torch_class_runs_on_the_core() -> None:
    """Oracle: this package's own AdamW there."""
    grads = gradients(5)
    p, q = (Parameter(torch.ones(SHAPE)) for _ in range(2))
    shared: dict[str, Any] = {"lr": 0.01, "eps": 1e-12, "rank": RANKS, "update_proj_gap": 2, "tensor": True}
    one = trained(p, g.GaLore(torch.optim.AdamW, [p], weight_decay=0.0, **shared), grads)
    other = trained(q, g.GaLoreAdamW([q], **shared), grads)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_error_feedback_remembers_what_the_core_dropped() -> None:
    """With momentum-free SGD and a basis that stays, nothing is lost: weight and memory add up to plain SGD's weight."""
    for dtype in (torch.float32, torch.complex64):
        p = Parameter(torch.zeros(SHAPE, dtype=dtype))
        optimizer = g.GaLoreSGD([p], lr=1.0, rank=RANKS, scale=1.0, update_proj_gap=100, tensor=True, carry="error_feedback")
        grads = noise(SHAPE, 4, dtype)
        found = trained(p, optimizer, grads) - optimizer.state[p]["error"]
        torch.testing.assert_close(found, -torch.stack(grads).sum(0), rtol=1e-4, atol=1e-4)


# --- state ------------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(("state_codec", "basis_codec"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("int8", "int4")])
def test_the_state_is_what_state_spec_says_before_and_after_training(state_codec: str, basis_codec: str, dtype: torch.dtype) -> None:
    p = Parameter(torch.zeros(SHAPE, dtype=dtype))
    codecs: dict[str, Any] = {"state_codec": state_codec, "basis_codec": basis_codec, "min_8bit_size": 0}
    optimizer = g.GaLoreAdamW([p], rank=RANKS, update_proj_gap=2, tensor=True, **codecs)
    group = optimizer.param_groups[0]
    expected = sum(spec.nbytes for spec in state_spec(layout_of(p, group), group, optimizer.rule).values())
    assert storage_bytes(optimizer.state[p]) == expected
    trained(p, optimizer, noise(SHAPE, 5, dtype))
    assert storage_bytes(optimizer.state[p]) == expected
    assert all(isinstance(value, Tensor | int) for value in optimizer.state[p].values())


def test_bytes_by_hand() -> None:
    """A complex spectral weight: 8 bytes for the first moment, 4 for the second, 8 an element of the factors; one flag."""
    p = Parameter(torch.zeros(32, 32, 16, 9, dtype=torch.complex64))
    optimizer = g.GaLoreAdamW([p], rank=[16, 16, 8, 5], tensor=True)
    core, factors = 16 * 16 * 8 * 5, 32 * 16 + 32 * 16 + 16 * 8 + 9 * 5
    assert storage_bytes(optimizer.state[p]) == (8 + 4) * core + 8 * factors + 1
    eight = g.GaLoreAdamW8bit([p], rank=[16, 16, 8, 5], tensor=True)
    scales = core // 16  # blocks of 16 along the longest mode
    assert storage_bytes(eight.state[p]) == 3 * core + 3 * 4 * scales + 4 * factors + 1


@each_dtype
def test_eight_bit_moments_stay_near_fp32(dtype: torch.dtype) -> None:
    shape = (24, 20, 12, 8)
    found = []
    for codec in ("fp32", "int8", "bf16"):
        p = Parameter(torch.zeros(shape, dtype=dtype))
        grads = [0.5 * common + G for common in noise(shape, 1, dtype, 5) for G in noise(shape, 10, dtype)]
        found.append(trained(p, g.GaLoreAdamW([p], lr=0.01, rank=0.3, tensor=True, state_codec=codec, update_proj_gap=4), grads))
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()
    assert (found[2] - found[0]).norm() < 0.03 * found[0].norm()


@each_dtype
@pytest.mark.parametrize("cls", [g.GaLoreAdamW, g.GaLoreAdamW8bit])
def test_a_run_resumes_bit_for_bit_through_a_file(cls: Any, dtype: torch.dtype) -> None:
    grads = noise(SHAPE, 9, dtype)
    settings: dict[str, Any] = {"lr": 0.01, "rank": 0.3, "update_proj_gap": 2, "tensor": True, "min_8bit_size": 0}
    whole = Parameter(torch.ones(SHAPE, dtype=dtype))
    expected = trained(whole, cls([whole], **settings), grads)
    p = Parameter(torch.ones(SHAPE, dtype=dtype))
    first = cls([p], **settings)
    trained(p, first, grads[:5])
    q = Parameter(p.detach().clone())
    second = cls([q], **settings)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert torch.equal(trained(q, second, grads[5:]), expected)


def test_a_checkpoint_of_other_ranks_is_refused() -> None:
    p = Parameter(torch.ones(SHAPE))
    saved = g.GaLoreAdamW([p], rank=[4, 3, None, 2], tensor=True).state_dict()
    with pytest.raises(ValueError, match="checkpoint"):
        g.GaLoreAdamW([p], rank=[4, 3, 3, 2], tensor=True).load_state_dict(
            {**saved, "param_groups": [{**saved["param_groups"][0], "rank": 2}]}
        )


# --- weights ----------------------------------------------------------------------------------------------------------------


def test_bf16_weights_follow_fp32_ones_on_average() -> None:
    """Steps below half of bf16's last place are not lost."""
    shape, grads = (24, 20, 12, 8), noise((24, 20, 12, 8), 1)
    p, q = Parameter(torch.ones(shape)), Parameter(torch.ones(shape, dtype=torch.bfloat16))
    settings: dict[str, Any] = {"lr": 1e-4, "rank": 0.5, "tensor": True, "scale": 1.0, "basis_codec": "fp32"}
    moved = trained(p, g.GaLoreAdamW([p], **settings), grads * 20) - 1
    rounded = trained(q, g.GaLoreAdamW([q], **settings), [G.bfloat16() for G in grads * 20]).float() - 1
    assert float((rounded * moved).sum() / moved.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_weights_and_gradients_in_any_order_of_memory(layout: str) -> None:
    def arranged(tensor: Tensor) -> Tensor:
        if layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.transpose(0, 2).contiguous().transpose(0, 2)

    p, q = Parameter(torch.ones(SHAPE)), Parameter(arranged(torch.ones(SHAPE)))
    grads = noise(SHAPE, 5)
    one = trained(p, g.GaLoreAdamW([p], lr=0.01, rank=0.3, update_proj_gap=2, tensor=True), grads)
    other = trained(q, g.GaLoreAdamW([q], lr=0.01, rank=0.3, update_proj_gap=2, tensor=True), [arranged(G) for G in grads])
    assert not q.is_contiguous()
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(at: int, bad: float, dtype: torch.dtype) -> None:
    """At the first step, at a refresh, between two. The next gradient makes the basis that this one could not."""
    grads = noise(SHAPE, 6, dtype)
    grads[at][1, 2, 3, 1] = bad
    p = Parameter(torch.ones(SHAPE, dtype=dtype))
    optimizer = g.GaLoreAdamW([p], lr=0.01, rank=0.3, update_proj_gap=2, tensor=True)
    for step, G in enumerate(grads):
        before = (
            p.detach().clone(),
            {key: copy.deepcopy(value) for key, value in optimizer.state[p].items() if key not in ("step", "basis_ready")},
        )
        p.grad = G.clone()
        optimizer.step()
        if step == at:
            assert torch.equal(p, before[0])
            assert all(torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)) for key, value in before[1].items())
    assert p.isfinite().all()


# --- inside the backward pass -----------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    """A Fourier layer, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modes = Parameter(torch.randn(8, 8, 6, 5, dtype=torch.complex64) / 8)
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        F = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[..., :6, :5], self.modes)
        return self.head((torch.fft.irfft2(F, s=x.shape[-2:]) + self.conv(x)).movedim(1, -1))


@pytest.mark.parametrize("mode", ["project", "update", "direct"])
@pytest.mark.parametrize("tensor", [True, "auto"])
@pytest.mark.filterwarnings("ignore:the gradients of 2 matrices are made in full")
def test_fused_backward_is_the_plain_run(mode: str, tensor: bool | str) -> None:
    def run(fused: bool) -> list[Tensor]:
        model, generator = Spectral(), torch.Generator().manual_seed(1)
        optimizer = g.GaLoreAdamW(model.parameters(), lr=0.01, rank=0.3, update_proj_gap=2, tensor=tensor)
        attached = g.fused_backward(model, optimizer, mode) if fused else None
        for _ in range(5):
            for _ in range(1 if mode == "update" else 2):
                model(torch.randn(2, 8, 12, 12, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if attached:
            attached.remove()
        return [p.detach() for p in model.parameters()]

    for found, expected in zip(run(True), run(False), strict=True):
        if mode == "update" or tensor == "auto":  # a basis comes from the first micro-batch alone, so only near
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 if mode == "update" else 0.05)
        assert found.isfinite().all()


def test_a_low_rank_gradient_holds_the_core_alone() -> None:
    model = Spectral()
    optimizer = g.GaLoreAdamW([{"params": [model.modes], "rank": [4, 4, 3, 3], "tensor": True}])
    g.fused_backward(model, optimizer)
    model(torch.randn(2, 8, 12, 12)).square().mean().backward()
    grad: Any = model.modes.grad
    assert grad.low.shape == (4, 4, 3, 3)
    assert grad.low.dtype == torch.complex64


# --- refreshes, groups ------------------------------------------------------------------------------------------------------


def test_refreshes_take_turns_over_the_gap() -> None:
    """Fault B10: the published factors never changed after the first step."""
    params = [Parameter(torch.ones(SHAPE)) for _ in range(4)]
    optimizer = g.GaLoreAdamW(params, rank=0.3, update_proj_gap=8, tensor=True)
    when: dict[int, list[int]] = {i: [] for i in range(4)}
    for step in range(17):
        before = [optimizer.state[p]["basis_0"].clone() for p in params]
        for p in params:
            p.grad = torch.randn(SHAPE)
        optimizer.step()
        for i, p in enumerate(params):
            if not torch.equal(before[i], optimizer.state[p]["basis_0"]):
                when[i].append(step)
    assert all(steps[0] == 0 for steps in when.values())
    assert all(second - first == 8 for steps in when.values() for first, second in pairwise(steps[1:]))
    assert len({steps[1] for steps in when.values()}) == 4


def test_auto_takes_what_is_no_matrix() -> None:
    group = {**g.GaLoreAdamW([Parameter(torch.zeros(2))]).param_groups[0], "rank": 0.25, "tensor": "auto"}

    def projector(*shape: int, dtype: torch.dtype = torch.float32, **keys: Any) -> str:
        return make_layout(shape, dtype, {**group, **keys}).projector

    assert projector(64, 32) == "power"
    assert projector(8, 64, 32) == "power", "experts"
    assert projector(8, 64, 32, batch_dims=0) == "tucker"
    assert projector(64, 32, 3) == "tucker", "a 1-D convolution"
    assert projector(64, 32, 3, 3) == "tucker"
    assert projector(64, 32, dtype=torch.complex64) == "tucker"
    assert projector(64, 32, tensor=True) == "tucker"


def test_auto_trains_matrices_as_ever() -> None:
    """Oracle: the same group without it, bit for bit."""
    grads = noise((24, 16), 5)
    found = []
    for tensor in (False, "auto"):
        p = Parameter(torch.ones(24, 16))
        found.append(trained(p, g.GaLoreAdamW([p], rank=4, update_proj_gap=2, tensor=tensor), grads))
    assert torch.equal(*found)


def test_b08_b09_a_kernel_and_the_published_key_dim() -> None:
    """1.0 could not build its tensor path (B8, B9): dim above 2 asks for it, and gets it."""
    p = Parameter(torch.randn(12, 8, 5, 5))
    optimizer = g.GaLoreAdamW([{"params": [p], "rank": 4, "dim": 4}])
    assert {key for key in optimizer.state[p] if key.startswith("basis_") and key != "basis_ready"} == {f"basis_{k}" for k in range(4)}
    before = p.detach().clone()
    trained(p, optimizer, noise((12, 8, 5, 5), 2))
    assert not torch.equal(p, before)


def test_b10_the_weight_moves_by_what_adam_says() -> None:
    """The first step of Adam does not depend on the gradient's size; 1.0's tensor path threw Adam's answer away."""
    moves = []
    for factor in (1.0, 100.0):
        p = Parameter(torch.zeros(SHAPE))
        optimizer = g.GaLoreAdamW([p], rank=RANKS, eps=0.0, lr=0.1, scale=1.0, tensor=True)
        moves.append(trained(p, optimizer, [factor * gradients_of_seed()]))
        core = optimizer.state[p]["exp_avg"]
        assert float(moves[-1].norm()) == pytest.approx(0.1 * math.sqrt(core.numel()), rel=1e-4)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-5)


def gradients_of_seed() -> Tensor:
    torch.manual_seed(3)
    return gradients(1)[0]


def test_the_published_projector_class_refreshes_and_returns_what_it_is_given() -> None:
    """B10 again: it answered with its own first gradient, whatever the optimizer had made of it."""
    projector = GaLoreProjectorTensor(rank=[4, 3, 5, 2], update_proj_gap=2, scale=0.5)
    first, later = gradients(2)
    torch.testing.assert_close(projector.project_back(projector.project(first, 0)), 0.5 * first, rtol=1e-4, atol=1e-5)
    core = projector.project(first, 1)
    torch.testing.assert_close(projector.project_back(3 * core), 1.5 * first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector.project_back(projector.project(later, 2)), 0.5 * later, rtol=1e-4, atol=1e-5)


def test_the_gap_adapts_to_the_mean_overlap_of_all_modes() -> None:
    p = Parameter(torch.ones(SHAPE))
    optimizer = g.GaLoreAdamW([p], rank=RANKS, update_proj_gap=4, gap_range=(1, 16), tensor=True)
    trained(p, optimizer, [gradients_of_seed()] * 20)
    assert int(optimizer.state[p]["gap"]) == 16, "a gradient that stays"


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tensor": "yes"}, "tensor='yes' is not known"),
        ({"tensor": True, "rank": [4, 4]}, r"rank=\[4, 4\] has 2 numbers, and a parameter of shape \(7, 6, 5, 4\) has 4 dimensions"),
        ({"tensor": True, "rank": [4, 0, 1, 1]}, r"rank=\[4, 0, 1, 1\] is not a rank"),
        ({"tensor": True, "rank": 1.5}, "rank=1.5 is not a rank"),
        ({"rank": [4, 4, 4, 4]}, r"rank=\[4, 4, 4, 4\] has a number for each dimension.*tensor=True"),
        ({"tensor": True, "projector": "svd"}, "projector='svd' has no effect with tensor=True"),
        ({"tensor": True, "proj_type": "left"}, "proj_type='left' has no effect with tensor=True"),
        ({"tensor": True, "batch_dims": 1}, "batch_dims=1 has no effect with tensor=True"),
        ({"tensor": True, "recovery": "fira"}, "recovery='fira' is for projected sides"),
        ({"tensor": "auto", "recovery": "foam", "projector": "block_mean"}, "recovery='foam' is for projected sides"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        g.GaLoreAdamW([Parameter(torch.zeros(SHAPE))], **{"rank": 4, **settings})


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_weights_that_cannot_train_are_refused() -> None:
    z = Parameter(torch.zeros(6, 5, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"rank=2 of a parameter of shape \(6, 5\) and torch\.complex64.*tensor=True"):
        g.GaLoreAdamW([z], rank=2)
    with pytest.raises(ValueError, match=r"complex64.*another optimizer"):
        g.GaLore(torch.optim.RMSprop, [z])
    with pytest.raises(ValueError, match=r"complex64.*compile=None"):
        g.GaLoreAdamW([z], compile=True)
    with pytest.raises(ValueError, match=r"complex32.*keep the weight in torch.complex64"):
        g.GaLoreAdamW([Parameter(torch.zeros(6, 5, dtype=torch.complex32))])


def test_a_tensor_of_short_modes_trains_at_full_rank_and_says_so() -> None:
    with pytest.warns(UserWarning, match="leaves no dimension"):
        g.GaLoreAdamW([Parameter(torch.zeros(4, 3, 3))], rank=0.5, tensor=True)


def test_the_core_of_a_large_weight_is_the_fraction_of_it() -> None:
    group = {**g.GaLoreAdamW([Parameter(torch.zeros(2))]).param_groups[0], "rank": 0.25, "tensor": True}
    layout = make_layout((64, 64, 64, 33), torch.complex64, group)
    assert 0.24 < prod(layout.low_shape) / prod(layout.shape) <= 0.25


def test_a_tensor_that_is_cut_between_processes_is_refused_by_name() -> None:
    """A DTensor: every step would gather it. Without a rank it trains."""
    group = {**g.GaLoreAdamW([Parameter(torch.zeros(2))]).param_groups[0], "tensor": True}
    placed = Placed((12, 10, 8), ((0, 2),))
    with pytest.raises(ValueError, match=r"\(12, 10, 8\) is cut between processes.*tensor=False"):
        make_layout((6, 10, 8), torch.float32, {**group, "rank": 0.25}, placed)
    assert not make_layout((6, 10, 8), torch.float32, group, placed).ranks
