"""Storage of state: sizes, errors and determinism of fp32, bf16 and int8."""

from __future__ import annotations

import math

import pytest
import torch

from galore_torch.ops.codecs import (
    BLOCK,
    StoredTensor,
    TensorSpec,
    block_length,
    noise,
    shard_block,
    stochastic_round,
)
from galore_torch.ops.levels import code_table, levels, nearest_codes, zero_code

CPU = torch.device("cpu")


def allocate(stored: StoredTensor) -> dict[str, torch.Tensor]:
    return {key: spec.allocate(CPU) for key, spec in stored.spec().items()}


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_has_256_ascending_levels_over_seven_decades(signed: bool) -> None:
    """Oracle: the construction of arXiv 2110.02861 as bitsandbytes builds it (create_dynamic_map), known values written out."""
    table = levels(signed, CPU)
    assert table.numel() == 256
    assert (table.diff() > 0).all()
    assert table[-1] == 1
    assert table[zero_code(signed)] == 0
    smallest = table[table > 0][0]
    assert math.isclose(smallest, 5.5e-7 if signed else 3.25e-7, rel_tol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_every_level_is_its_own_nearest_code(signed: bool) -> None:
    table = levels(signed, CPU)
    assert torch.equal(nearest_codes(table, code_table(signed, CPU)).long(), torch.arange(256))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest_within_the_tables_resolution(signed: bool) -> None:
    """Oracle: brute force over all levels; the table cells are 2^-7 wide, so it may lose as much."""
    table = levels(signed, CPU)
    x = torch.cat([torch.rand(5000), 10 ** (-7 * torch.rand(5000))]) * (torch.randint(0, 2, (10000,)) * 2 - 1 if signed else 1)
    distance = (table[nearest_codes(x, code_table(signed, CPU)).long()] - x).abs()
    best = (table - x.unsqueeze(1)).abs().amin(1)
    slack = best + x.abs() * 2**-7
    if not signed:  # positive values below half the first level round up on purpose
        slack = torch.where(x < table[1] / 2, table[1], slack)
    assert (distance <= slack).all()


def test_a_positive_second_moment_is_never_stored_as_zero() -> None:
    x = torch.tensor([0.0, 1e-30, 1e-12, 1e-8, 1.0])
    assert (levels(False, CPU)[nearest_codes(x, code_table(False, CPU)).long()] > 0).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("shape", [(300, 64), (1009, 5), (7, 513), (512, 16), (4, 1376), (6, 5461), (3, 5)])
@pytest.mark.parametrize("axis", [0, 1])
def test_int8_error_is_bounded_by_its_block(shape: tuple[int, int], axis: int) -> None:
    """Every value comes back within 1 % of itself plus 6e-7 of its block's maximum... at the decade's coarsest cell: half a cell."""
    stored = StoredTensor("x", shape, "int8", axis)
    state = allocate(stored)
    assert not stored.decode(state).any()
    x = torch.randn(shape) * 10 ** torch.randn(shape)
    stored.encode(state, x, None)
    back = stored.decode(state)
    largest = x.abs().amax(axis, keepdim=True)  # at least the block's own maximum
    table = levels(True, CPU)
    coarsest = float(table.diff().max() / 2) + 2**-8
    assert ((back - x).abs() <= coarsest * largest).all()
    assert ((back - x).abs() / x.abs())[x.abs() > 0.1 * largest].max() < 0.08


def test_blocks_do_not_mix_singular_directions() -> None:
    """Rows that differ by 1e8 in size keep their relative precision because a block stays inside one of them."""
    x = torch.rand(2, 512) + 0.5
    x[1] *= 1e-8
    stored = StoredTensor("x", (2, 512), "int8", 1, signed=False)
    state = allocate(stored)
    stored.encode(state, x, None)
    assert ((stored.decode(state) - x).abs() / x).max() < 0.02


@pytest.mark.parametrize("length", [1, 5, 64, 256, 257, 512, 1009, 1376, 2048, 5461, 11008])
def test_blocks_are_at_most_256_long_and_pad_only_awkward_lengths(length: int) -> None:
    block = block_length(length)
    assert block <= BLOCK
    assert length % block == 0 or block == BLOCK


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("fill", [0.0, 0.25])
def test_first_value_is_the_fill(codec: str, fill: float) -> None:
    stored = StoredTensor("x", (300, 64), codec, 0, signed=False, fill=fill)
    assert (stored.decode(allocate(stored)) == fill).all()


def test_stochastic_rounding_is_right_on_average_and_repeats_with_its_seed() -> None:
    x = torch.tensor([1.0 + 2**-10, -3.14159, 1e-20, 0.0]).expand(2000, 4).contiguous()
    rounded = torch.stack([stochastic_round(x, seed).float() for seed in range(50)])
    spacing = torch.tensor([2**-7, 2**-6, 1e-20 * 2**-7, 0.0])
    deviation = spacing / 2 / math.sqrt(50 * 2000) * 5  # five standard errors of the mean
    assert ((rounded.mean((0, 1)) - x[0]).abs() <= deviation).all()
    assert ((rounded - x).abs() <= spacing).all()
    assert torch.equal(stochastic_round(x, 7), stochastic_round(x, 7))
    assert not torch.equal(stochastic_round(x, 7), stochastic_round(x, 8))


def test_stochastic_rounding_keeps_what_bf16_holds_and_what_is_not_finite() -> None:
    x = torch.randn(64, 64).bfloat16().float()
    x[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(stochastic_round(x, 3).float(), x, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_of_every_kind_of_number_lands_on_a_neighbour_in_bf16() -> None:
    """Oracle: the two bf16 numbers around a value, by its bits; NaN stays NaN whatever its payload, Inf stays Inf with its sign.

    All 2^16 upper halves of an fp32 number: every sign, exponent and bf16 mantissa, zeros, subnormals, both Infs and all NaNs.
    """
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        x = (upper + lower).view(torch.float32)
        nan, infinite = x.isnan(), x.isinf()
        below, above = upper.view(torch.float32), (upper + (0x10000 if lower else 0)).view(torch.float32)
        for seed in range(8):
            got = stochastic_round(x.view(256, 256), seed).float().view(-1)
            assert torch.equal(got.isnan(), nan)
            assert torch.equal(got[infinite], x[infinite])
            bits = got.view(torch.int32)
            right = (bits == below.view(torch.int32)) | (bits == above.view(torch.int32))  # bits: the sign of a zero counts
            assert (right | nan).all()


def test_noise_is_kept_for_small_matrices_and_made_anew_for_large_ones() -> None:
    """64 vectors of noise for a flat parameter would weigh 128 times as much as it does in bf16. Same seed, same numbers either way."""
    device = torch.device("cpu")
    assert noise(64, 96, 5, device)[1] is noise(64, 96, 5, device)[1]
    large = noise(1, 1 << 16, 5, device)
    assert noise(1, 1 << 16, 5, device)[1] is not large[1]
    assert torch.equal(large[1], noise(1, 1 << 16, 5, device)[1])


@pytest.mark.parametrize("host", [False, True])
def test_state_is_made_on_the_device_it_names(host: bool) -> None:
    """Not on the default device, which torch.set_default_device and torch.device("meta") change."""
    with torch.device("meta"):
        made = TensorSpec((3,), torch.float32, 2.0, host).allocate(torch.device("cpu"))
    assert made.tolist() == [2.0, 2.0, 2.0]


def test_a_weight_at_the_end_of_the_range_of_bf16_is_not_rounded_to_infinity() -> None:
    """Oracle: torch's own conversion, which makes Inf only of what lies half a step beyond the largest number."""
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([largest, largest * (1 + 2**-10), -largest, -largest * (1 + 2**-10)]).expand(256, 4).contiguous()
    for seed in range(4):
        assert torch.equal(stochastic_round(x, seed), x.to(torch.bfloat16))
    assert x.to(torch.bfloat16).isfinite().all()


def test_rounding_noise_of_neighbours_is_uncorrelated() -> None:
    x = torch.full((256, 256), 1.0 + 2**-8)  # half way: up or down with equal chance
    up = torch.stack([(stochastic_round(x, seed) > 1).float() for seed in range(400)]) - 0.5
    for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((3, 5), (5, 3)), ((10, 10), (200, 100))):
        assert abs(float((up[:, a[0], a[1]] * up[:, b[0], b[1]]).mean())) < 0.25 * 5 / math.sqrt(400)


def test_tables_do_not_follow_a_device_context() -> None:
    """A model may be built under torch.device("meta"); the shared tables must stay real."""
    levels.cache_clear()
    zero_code.cache_clear()
    with torch.device("meta"):
        assert zero_code(True) == 127
        assert levels(True, CPU).device == CPU


@pytest.mark.parametrize("ways", [1, 2, 3, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("length", [3, 7, 100, 128, 1376, 4096, 5461, 11008])
def test_no_block_of_a_shard_is_cut(length: int, ways: int) -> None:
    """Shards begin at multiples of the block, so that torch cuts the scales of the whole where it cuts the codes."""
    block, shard = shard_block(length, ways), -(-length // ways)
    assert shard % block == 0
    scales = torch.arange(-(-length // block)).chunk(ways)
    codes = torch.arange(length).chunk(ways)
    assert [len(part) for part in scales] == [-(-len(part) // block) for part in codes]
    if length % 128 == 0 and ways in (1, 2, 4, 8):
        assert block == shard_block(length, 1), "the same blocks on 1 to 8 processes"


def test_int8_blocks_of_another_world() -> None:
    """Into blocks that a longer one holds whole: the same value, bit for bit. Into longer ones: rounded once more, to the nearest level."""
    ours, theirs = StoredTensor("x", (128, 4), "int8", unit=16), StoredTensor("x", (128, 4), "int8")  # 16 and 128 a block
    value = torch.randn(128, 4)
    for one, other, step in ((theirs, ours, 0.0), (ours, theirs, 1 / 64)):
        saved = allocate(one)
        one.encode(saved, value, None)
        found = other.in_own_blocks(saved["x_codes"], saved["x_scale"])
        assert found["x_scale"].shape == other.spec()["x_scale"].shape
        torch.testing.assert_close(other.decode(found), one.decode(saved), rtol=0.0, atol=step * float(value.abs().max()))
    with pytest.raises(ValueError, match="x_scale has 127 blocks along an axis of 128"):
        ours.in_own_blocks(torch.zeros(128, 4, dtype=torch.uint8), torch.zeros(127, 4))
