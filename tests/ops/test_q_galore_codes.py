"""INT8 weights and INT4 bases as they lie in memory: error bounds, awkward blocks, exact means, bytes. Oracles are written out by block."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from galore_torch.ops.codecs import StoredTensor
from galore_torch.ops.int8_codes import int8_spec, move
from galore_torch.ops.int8_weight import Int8Weight
from support.memory import storage_bytes

SHAPES = [(64, 128), (3, 5), (7, 37), (1, 1), (33, 255), (5, 257), (300, 1), (1, 1000), (500, 344)]


def blocks(W: Tensor) -> list[Tensor]:
    """Each 256 elements of the flattened matrix, the last as many as there are."""
    return list(W.flatten().split(256))


def half_steps(W: Tensor, levels: int = 255) -> Tensor:
    """The most that rounding to nearest may move each element, by block, element by element of the definition.

    Half a step of (max - min) / levels, where min has gone down to bf16 (2^-7 of it) and the step up to bf16 (2^-7 of itself).
    """
    bounds = []
    for block in blocks(W):
        span = float(block.max() - block.min()) + 2.0**-7 * abs(float(block.min()))
        bounds.append(torch.full_like(block, 0.5 * span / levels * (1 + 2.0**-7) + 2.0**-22 * float(block.abs().max())))
    return torch.cat(bounds).view(W.shape)


CASES = {
    "both signs": lambda shape: torch.randn(shape),
    "positive": lambda shape: 1 + 0.01 * torch.rand(shape),
    "negative": lambda shape: -5 - torch.rand(shape),
    "tiny": lambda shape: 1e-12 * torch.randn(shape),
    "huge": lambda shape: 1e12 * torch.randn(shape),
    "constant": lambda shape: torch.full(shape, 0.3),
    "outlier": lambda shape: torch.randn(shape).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(1000.0)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_quantising_moves_no_element_by_more_than_half_a_step(case: str, shape: tuple[int, int]) -> None:
    W = CASES[case](shape)
    assert ((Int8Weight.quantize(W).dequantize() - W).abs() <= half_steps(W)).all()


def test_a_block_of_one_sign_is_not_clipped_as_the_published_zero_point_clips_it() -> None:
    W = 1 + 0.01 * torch.rand(4, 64)
    scale = (W.max() - W.min()) / 255
    zero = (-(W.min() / scale).round()).clamp(0, 255)  # the published code
    published = (((W / scale).round() + zero).clamp(0, 255) - zero) * scale
    assert (published - W).abs().min() > 0.9  # every value has become 0.01 or so
    assert (Int8Weight.quantize(W).dequantize() - W).abs().max() < 1e-4


def test_zeros_stay_zero_and_a_block_of_zeros_learns_again() -> None:
    W = Int8Weight.quantize(torch.zeros(8, 64))
    assert torch.equal(W.dequantize(), torch.zeros(8, 64))
    update = torch.randn(8, 64)
    move(*W.stored, update.clone(), 1.0, 1.0, None)
    assert ((W.dequantize() + update).abs() <= 1.1 * half_steps(update)).all()


def test_an_outlier_costs_its_own_block_alone() -> None:
    W = torch.randn(8, 256)
    spoilt = W.clone()
    spoilt[3, 7] = 1000.0
    a, b = Int8Weight.quantize(W), Int8Weight.quantize(spoilt)
    others = [i for i in range(8) if i != 3]
    assert torch.equal(a.codes[others], b.codes[others])
    assert not torch.equal(a.codes[3], b.codes[3])


# --- stochastic rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["both signs", "positive", "negative", "outlier"])
@pytest.mark.parametrize("shape", [(16, 256), (7, 37)], ids=str)
def test_the_mean_of_stochastic_rounding_is_the_true_value(case: str, shape: tuple[int, int]) -> None:
    """Hoeffding: the mean of S numbers in an interval of one step is further than t from its expectation with 2 exp(-2 t^2 S / step^2).

    t is such that the chance that any element of any case fails is 1e-6.
    """
    samples = 200
    W, update = Int8Weight.quantize(CASES[case](shape)), 0.01 * torch.randn(shape)
    truth = W.dequantize().double() * 0.999 - 0.5 * update.double()
    total, step = torch.zeros(shape, dtype=torch.float64), torch.zeros(())
    for seed in range(samples):
        moved = copy.deepcopy(W)
        move(*moved.stored, update.clone(), 0.5, 0.999, seed)
        total += moved.dequantize().double()
        step = moved.scale.double().repeat_interleave(256)[: W.numel()].view(shape)
    t = step * math.sqrt(math.log(2 * 10 * W.numel() / 1e-6) / (2 * samples))
    error = total / samples - truth
    assert (error.abs() <= t + 2.0**-22 * truth.abs()).all()
    assert (step > 0).all()


def test_rounding_to_nearest_loses_small_updates_that_stochastic_rounding_keeps() -> None:
    """200 updates of a fiftieth of a step each: four steps in all."""
    start = Int8Weight.quantize(torch.randn(16, 256))
    update = start.scale.float().repeat_interleave(256).view(16, 256) / 50
    moved = {}
    for rounded in (True, False):
        W = copy.deepcopy(start)
        for step in range(200):
            move(*W.stored, update.clone(), 1.0, 1.0, step if rounded else None)
        moved[rounded] = float(((start.dequantize() - W.dequantize()) / update).mean())
    assert abs(moved[True] - 200) < 4
    assert moved[False] < 100


def test_the_grid_stays_while_the_values_fit_so_that_rounding_noise_comes_from_the_update_alone() -> None:
    """After 300 updates of mean zero, each a thousandth of a step: a grid that follows the extremes would add 1/6 step^2 a time."""
    W = Int8Weight.quantize(torch.randn(16, 256))
    move(*W.stored, torch.zeros(16, 256), 1.0, 1.05, 0)  # outgrows the first grid, which has no room
    start, scale = W.dequantize(), W.scale.clone()
    step = scale.float().repeat_interleave(256).view(16, 256)
    drift = torch.zeros(16, 256)
    for seed in range(300):
        update = torch.randn(16, 256) * step / 1000
        drift -= update
        move(*W.stored, update, 1.0, 1.0, seed + 1)
    noise = (W.dequantize() - start - drift) / step
    assert noise.square().mean() < 2 * 300 / 1000  # f (1 - f) <= |update|; following the extremes: 300 / 6
    assert (W.scale == scale).float().mean() > 0.9


def test_no_update_changes_no_bit() -> None:
    for case, make in CASES.items():
        W = Int8Weight.quantize(make((16, 256)))
        before = copy.deepcopy(W)
        for seed in range(20):
            move(*W.stored, torch.zeros(16, 256), 1.0, 1.0, seed)
        assert all(torch.equal(a, b) for a, b in zip(W.stored, before.stored, strict=True)), case


def test_values_that_grow_out_of_their_grid_or_shrink_within_it_get_a_new_one() -> None:
    W = Int8Weight.quantize(torch.randn(4, 256))
    move(*W.stored, torch.zeros(4, 256), 1.0, 10.0, 0)
    grown = W.dequantize()
    assert grown.abs().max() > 15
    move(*W.stored, torch.zeros(4, 256), 1.0, 0.001, 0)
    assert (W.dequantize() - 0.001 * grown).abs().max() < 1e-3 * 2 * 45 / 200


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    start, update = Int8Weight.quantize(torch.randn(16, 256)), 0.01 * torch.randn(16, 256)
    codes = []
    for seed in (1, 1, 2):
        W = copy.deepcopy(start)
        move(*W.stored, update.clone(), 1.0, 1.0, seed)
        codes.append(W.codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


# --- the tensor -----------------------------------------------------------------------------------------------------------


def test_a_weight_takes_1_0156_bytes_of_storage() -> None:
    W = Int8Weight.quantize(torch.randn(512, 1376, dtype=torch.bfloat16))
    assert storage_bytes(W.stored) == W.nbytes == 512 * 1376 * (1 + 4 / 256)
    for shape in SHAPES:
        stored = Int8Weight.quantize(torch.randn(shape)).stored
        assert storage_bytes(stored) == sum(spec.nbytes for spec in int8_spec(shape).values())


def test_copies_moves_and_files_keep_every_code() -> None:
    W = nn.Parameter(Int8Weight.quantize(torch.randn(7, 37, dtype=torch.bfloat16)))
    copies = [copy.deepcopy(W), pickle.loads(pickle.dumps(W)), W.clone(), W.detach(), W.data, W.to("cpu", copy=True)]
    for other in copies:
        assert isinstance(other, Int8Weight)
        assert (other.dtype, other.shape) == (torch.bfloat16, (7, 37))
        assert all(torch.equal(a, b) for a, b in zip(W.stored, other.stored, strict=True))
    assert W.float().dtype == torch.float32
    assert isinstance(copies[0], nn.Parameter)
    assert copies[0].requires_grad
    assert copies[0].codes.data_ptr() != W.codes.data_ptr()


def test_reading_gives_floating_copies_and_writing_past_the_optimizer_is_refused() -> None:
    W = nn.Parameter(Int8Weight.quantize(torch.randn(8, 16)))
    exact = W.dequantize()
    assert torch.equal(W + 0, exact)
    assert torch.equal(W.detach().flatten(), exact.flatten())
    assert bool(W.isfinite().all())
    assert type(torch.zeros_like(W)) is Tensor
    with torch.no_grad():
        for write in (lambda: W.mul_(0.9), lambda: torch.add(exact, 1, out=W), lambda: torch._foreach_add_([W], 1.0)):
            with pytest.raises(ValueError, match=r"write to an INT8 weight.*QGaLoreAdamW8bit.*dequantize_linears"):
                write()
        assert torch.equal(W.dequantize(), exact)
        W.copy_(2 * exact)  # as load_state_dict does
    assert ((W.dequantize() - 2 * exact).abs() <= half_steps(2 * exact)).all()


# --- INT4 bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 37, 256, 257, 509, 512])
@pytest.mark.parametrize("axis", [0, 1])
def test_int4_is_packed_two_to_a_byte_and_moves_no_element_by_more_than_half_a_step(length: int, axis: int) -> None:
    shape = (length, 6) if axis == 0 else (6, length)
    stored = StoredTensor("basis", shape, "int4", axis)
    state = {key: spec.allocate(torch.device("cpu")) for key, spec in stored.spec().items()}
    assert torch.equal(stored.decode(state), torch.zeros(shape))
    value = torch.randn(shape)
    stored.encode(state, value, None)
    found = stored.decode(state)
    columns = (value if axis == 0 else value.T, found if axis == 0 else found.T)
    for column, decoded in zip(columns[0].T, columns[1].T, strict=True):
        for block, its in zip(column.split(stored.block), decoded.split(stored.block), strict=True):
            padded = block if len(block) == stored.block else torch.cat([block, block.new_zeros(1)])
            span = float(padded.max() - padded.min()) + 2.0**-7 * abs(float(padded.min()))
            assert (its - block).abs().max() <= 0.5 * span / 15 * (1 + 2.0**-7) + 1e-6
    assert storage_bytes(state["basis_codes"]) == 6 * -(-length // 2)
    assert all(tensor.numel() == state["basis_scale"].numel() for key, tensor in state.items() if key != "basis_codes")


def test_an_int4_basis_is_nearly_orthonormal() -> None:
    """16 levels over a column of 256 numbers of deviation 1/16: a step is about 6 / 16 / 15, of variance step^2 / 12 a number."""
    basis = torch.linalg.qr(torch.randn(512, 64)).Q
    stored = StoredTensor("basis", (512, 64), "int4")
    state = {key: spec.allocate(torch.device("cpu")) for key, spec in stored.spec().items()}
    stored.encode(state, basis, None)
    found = stored.decode(state)
    assert (found - basis).square().sum() / basis.square().sum() < 0.02
