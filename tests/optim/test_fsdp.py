"""Sharded training is training: FSDP2, HSDP and tensor parallelism on gloo processes against one process with the whole batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from galore_torch.optim.methods import METHODS
from support.sharded import (
    Cut,
    Run,
    adafactor_rate,
    flattened,
    kept_gradients,
    on_the_wire,
    parameters,
    reduced_in_bf16,
    redundancy_free,
    sharded_late,
    stepped_in_between,
    weights,
)
from support.world import World

pytestmark = pytest.mark.dist
BOTH = [2, pytest.param(4, marks=pytest.mark.slow)]


RIGHT = {"proj_type": "right"}  # what "std" is for every matrix of which processes hold rows
ROWS = (Cut((16, 12)), Cut((9, 20)), Cut((3, 20)), Cut((6, 3, 2, 2)), Cut((7,)))  # uneven and empty shards, a kernel, a vector


def assert_same_training(world: World, run: Run, atol: float = 1e-5) -> None:
    """Weights as those of one process; what several ranks hold is the same bits on each."""
    mode = "" if run.once or run.mode == "update" else run.mode  # what one process does to the same
    assert_same(world, weights, (run,), (replace(run, mesh=(), plan=False, options=(), mode=mode),), atol)


def assert_same_steps(world: World, run: Run, cuts: tuple[Cut, ...]) -> None:
    """In float64, where the order of sums is no excuse."""
    run = replace(run, steps=range(20), dtype=torch.float64)
    assert_same(world, parameters, (run, cuts), (replace(run, mesh=()), cuts), 1e-9)


def assert_same(world: World, function: Any, mine: tuple[Any, ...], alone: tuple[Any, ...], atol: float) -> None:
    found, (expected, _) = world.run(function, *mine), function(*alone)
    for ours, theirs in zip(found[0][0], expected, strict=True):
        assert_close(ours, theirs, rtol=0.0, atol=atol)
    for other in found[1:]:
        assert_close(other, found[0], rtol=0.0, atol=0.0)
    started, _ = function(replace(alone[0], steps=range(0)), *alone[1:])
    assert all(float((ours - start).abs().max()) > 10 * atol for ours, start in zip(found[0][0], started, strict=True)), "it trains"


PROJECTORS = ("power", "rsvd", "gram", "svd", "random")


@pytest.mark.parametrize("size", BOTH)
def test_fully_shard_equals_one_process(size: int, worlds: dict[int, World]) -> None:
    """50 steps in float32 with five refreshes of each basis; uneven shards, empty ones, and vectors at full rank."""
    assert_same_training(worlds[size], Run(mesh=(size,), keys=RIGHT))


@pytest.mark.parametrize("size", BOTH)
def test_direct_passes_under_fully_shard_equal_one_process(size: int, worlds: dict[int, World]) -> None:
    assert_same_training(worlds[size], Run(mesh=(size,), mode="direct", keys=RIGHT))


@pytest.mark.parametrize("mode", ["", "direct"])
def test_direct_passes_share_out_low_rank_gradients_in_place_of_whole_ones(mode: str, worlds: dict[int, World]) -> None:
    """In a step without a refresh, in elements: what FSDP2 scatters, R, all-reduces. A shard is as large as the largest one."""
    pairs = [*pairwise(Run.sizes)]
    vectors = sum(rows(m) for _, m in pairs) + 2 * sum(rows(m) for _, m in pairs[1:-1:2])
    found = worlds[2].run(on_the_wire, Run(mesh=(2,), mode=mode, keys=RIGHT))
    matrices = sum(rows(m) * n for n, m in pairs)
    assert found == [(vectors, 2 * sum(rows(m) for _, m in pairs), 0) if mode else (vectors + matrices, 0, 0)] * 2


def rows(whole: int) -> int:
    """Of two padded shards."""
    return 2 * -(-whole // 2)


CASES: dict[str, Run] = {
    "full rank": Run(keys={"rank": None}),
    "accumulated": Run(micro=3, keys=RIGHT),
    "accumulated, shared out once": Run(micro=3, once=True, keys=RIGHT),
    "clipped": Run(clip=0.1, keys=RIGHT),
    "checkpointing": Run(options=("checkpointing",), keys=RIGHT),
    "offload": Run(options=("offload",), keys=RIGHT),
    "HSDP": Run(mesh=(2, 1), keys=RIGHT),
    "updates in the backward pass": Run(mode="update", keys=RIGHT),
    "updates in the backward pass, accumulated": Run(mode="update", micro=2, once=True, keys=RIGHT),
    "projected in the backward pass, clipped": Run(mode="project", clip=0.1, keys=RIGHT),
    "projected, accumulated, clipped": Run(mode="project", micro=3, clip=0.1, keys=RIGHT),
    "projected, accumulated, shared out once": Run(mode="project", micro=3, once=True, keys=RIGHT),
    "projected, offload": Run(mode="project", options=("offload",), micro=2, keys=RIGHT),
    "projected, HSDP, clipped": Run(mode="project", mesh=(2, 1), clip=0.1, keys=RIGHT),
    "direct, clipped": Run(mode="direct", clip=0.1, keys=RIGHT),
    "direct, accumulated, clipped": Run(mode="direct", micro=3, clip=0.1, keys=RIGHT),
    "direct, updated": Run(mode="direct_update", keys=RIGHT),
    "direct, HSDP": Run(mode="direct", mesh=(2, 1), micro=2, keys=RIGHT),
    "direct, checkpointing": Run(mode="direct", options=("checkpointing",), keys=RIGHT),
    "direct, offload": Run(mode="direct_update", options=("offload",), keys=RIGHT),
    "direct, the published projector": Run(mode="direct", keys={"projector": "svd", **RIGHT}),
    "direct, a rank too small for power steps alone": Run(mode="direct", keys={"rank": 1, **RIGHT}),
    "direct, tensor parallel": Run(mode="direct", mesh=(2,), micro=2, plan=True),  # which goes on as "project" does
    "projected, tensor parallel": Run(mode="project", mesh=(2,), micro=2, plan=True),
    "projected, tensor parallel and FSDP2": Run(mode="project", mesh=(1, 2), micro=2, plan=True, sizes=(12, 16, 8, 20, 20)),
    "tensor parallel": Run(mesh=(2,), plan=True),
    "tensor parallel and FSDP2": Run(mesh=(1, 2), plan=True, sizes=(12, 16, 8, 20, 20)),
}


SLOW_CASES = {  # whose like is among the others
    "projected in the backward pass, clipped",
    "projected, accumulated, shared out once",
    "projected, HSDP, clipped",
    "projected, tensor parallel",
    "direct, clipped",
    "direct, HSDP",
    "direct, checkpointing",
    "direct, the published projector",
    "direct, a rank too small for power steps alone",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_CASES else ()) for name in CASES])
def test_what_users_do_with_fully_shard_equals_one_process(name: str, worlds: dict[int, World]) -> None:
    run = replace(CASES[name], steps=range(13), keys={"update_proj_gap": 4, **CASES[name].keys})
    assert_same_training(worlds[2], replace(run, mesh=run.mesh or (2,)))


@pytest.mark.parametrize("mode", ["", "direct"])
@pytest.mark.parametrize("options", [("mixed",), pytest.param(("compile",), marks=pytest.mark.slow)])
def test_mixed_precision_and_compiled_models_equal_replicas_of_them(mode: str, options: tuple[str, ...], worlds: dict[int, World]) -> None:
    """Against HSDP whose replicas hold everything, which does the same arithmetic: bf16 passes, or those that torch.compile makes."""
    run = Run(options=options, mode=mode, steps=range(13), keys={"update_proj_gap": 4, **RIGHT})
    (found, _), (other, _) = worlds[2].run(weights, replace(run, mesh=(2,)))
    (expected, _), _ = worlds[2].run(weights, replace(run, mesh=(2, 1)))
    for mine, theirs, twin in zip(found, expected, other, strict=True):
        assert_close(mine, theirs, rtol=0.0, atol=1e-5)
        assert torch.equal(mine, twin)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "plan", "mode"),
    [((2, 2), False, ""), ((2, 2), False, "project"), ((2, 2), False, "direct"), ((2, 2), True, ""), ((4,), True, "")],
)
def test_meshes_of_four(mesh: tuple[int, ...], plan: bool, mode: str, worlds: dict[int, World]) -> None:
    """HSDP, FSDP2 with tensor parallelism, tensor parallelism alone."""
    run = Run(mesh=mesh, plan=plan, mode=mode, sizes=(12, 16, 8, 20, 20) if plan else Run.sizes, keys={} if plan else RIGHT)
    assert_same_training(worlds[4], run)


MUON: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "state_codec": "fp32", "basis_codec": "fp32"}
ROWS_AND_COLUMNS: dict[str, Run] = {
    **{name: Run(keys={"projector": name, **RIGHT}) for name in PROJECTORS},
    "full rank": Run(keys={"rank": None}),
    "adafactor": Run("GaLoreAdafactor", {"lr": 0.01, "beta1": 0.9, "weight_decay": 0.1}, RIGHT),
    "adafactor, its own step size": Run("GaLoreAdafactor", {"scale_parameter": True}, RIGHT),
    "adafactor at full rank": Run("GaLoreAdafactor", {"scale_parameter": True}, {"rank": None}),
    "a step by the weight": Run(keys={"scale_parameter": True, **RIGHT}),
    "a step by the weight, full rank": Run(keys={"scale_parameter": True, "rank": None}),
    "a step by the weight, apollo": Run(keys={"scale_parameter": True, **METHODS["apollo"].settings, **RIGHT}),
    "adagrad": Run("GaLoreAdagrad", {"lr": 0.1}, RIGHT),
    "sgd": Run("GaLoreSGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, RIGHT),
    "rmsprop": Run("RMSprop", {"lr": 0.01, "momentum": 0.9}, RIGHT),
    "adamw": Run("AdamW", {"lr": 0.01, "weight_decay": 0.1}, RIGHT),
    "fira": Run(keys={"recovery": "fira", **RIGHT}),
    "error feedback": Run(keys={"carry": "error_feedback", **RIGHT}),
    **{
        name: Run(keys={**method.settings, **RIGHT, **({"random_after": 8} if name == "golore" else {})})
        for name, method in METHODS.items()
        if name not in ("fira", "foam", "fold", "frugal")
    },
    "adaptive gap": Run(keys={"gap_range": (2, 20), "update_proj_gap": 5, **RIGHT}),
    "int4 basis": Run(keys={"basis_codec": "int4", **RIGHT}),
    "muon": Run("GaLoreMuon", {"lr": 0.01, "weight_decay": 0.1, "state_codec": "fp32"}, {"rank": "full", "update_proj_gap": 1}),
    "muon in a subspace": Run("GaLoreMuon", MUON, {"update_proj_gap": 1, **RIGHT}),
    "a basis that follows Adam's moment": Run(keys={"projector": "momentum", "update_proj_gap": 1, **RIGHT}),
}


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("name", ROWS_AND_COLUMNS)
def test_every_class_and_row_equals_one_process(name: str, size: int, worlds: dict[int, World]) -> None:
    assert_same_steps(worlds[size], replace(ROWS_AND_COLUMNS[name], mesh=(size,)), ROWS)


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("recovery", ["project_back", "foam", "fold"])
def test_block_means_equal_one_process(recovery: str, relative: bool, size: int, worlds: dict[int, World]) -> None:
    run = Run(mesh=(size,), keys={"projector": "block_mean", "recovery": recovery, "update_proj_gap": 200, "scale_parameter": relative})
    assert_same_steps(worlds[size], run, (Cut((16, 12)), Cut((25, 20))))


OTHER_CUTS: dict[str, tuple[Cut, ...]] = {
    "columns": (Cut((12, 17), (1,)), Cut((7, 9), (1,)), Cut((7, 3), (1,))),
    "experts": (Cut((5, 20, 18)), Cut((1, 20, 18))),
    "rows of experts": (Cut((3, 21, 18), (1,)),),
    "columns of experts": (Cut((3, 17, 19), (2,)),),
    "replicas": (Cut((16, 12), (None,)),),
}


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize(("optimizer", "relative"), [("GaLoreAdamW", False), ("GaLoreAdamW", True), ("GaLoreAdafactor", False)])
@pytest.mark.parametrize("name", OTHER_CUTS)
def test_every_cut_equals_one_process(name: str, optimizer: str, relative: bool, size: int, worlds: dict[int, World]) -> None:
    side = {"proj_type": "left"} if name == "columns" else {}  # what "std" is where processes hold columns
    run = Run(optimizer, {"lr": 0.01, "scale_parameter": relative}, side, mesh=(size,))
    assert_same_steps(worlds[size], run, OTHER_CUTS[name])


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("rank", ["full", 2])
@pytest.mark.parametrize("name", OTHER_CUTS)
def test_every_cut_of_muon_equals_one_process(name: str, rank: Any, size: int, worlds: dict[int, World]) -> None:
    """Each process puts the matrix together for its orthogonalisation."""
    settings = {key: value for key, value in MUON.items() if rank != "full" or key != "basis_codec"}
    side = {"proj_type": "left"} if name == "columns" and rank != "full" else {}
    assert_same_steps(
        worlds[size], Run("GaLoreMuon", settings, {"rank": rank, "update_proj_gap": 1, **side}, mesh=(size,)), OTHER_CUTS[name]
    )


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)])
def test_muon_with_rows_and_columns_cut_works_in_a_subspace_and_is_refused_at_full_rank(
    mesh: tuple[int, ...], worlds: dict[int, World]
) -> None:
    cuts = (Cut((9, 14), (0, 1)), Cut((14, 9), (0, 1)), Cut((12, 10), (1, 0)))
    assert_same_steps(worlds[2], Run("GaLoreMuon", MUON, {"update_proj_gap": 1}, mesh=mesh), cuts)
    whole = Run("GaLoreMuon", {"lr": 0.01}, {"rank": "full", "update_proj_gap": 1}, mesh=mesh, steps=range(1))
    with pytest.raises(ValueError, match=r"\(9, 14\) are both shared among processes, .*rank='full' .*: give it a rank below 9"):
        worlds[2].run(parameters, whole, cuts)


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("codec", ["int8", "mulaw4"])
def test_codes_of_muon_have_the_blocks_of_one_process(codec: str, size: int, worlds: dict[int, World]) -> None:
    run = Run(
        "GaLoreMuon",
        {"lr": 0.01, "min_8bit_size": 1, "state_codec": codec},
        {"rank": "full", "update_proj_gap": 1},
        steps=range(12),
        dtype=torch.float64,
    )
    cut, alone = Cut((128, 20)), Cut((128, 20), (None, 0))
    (found, _), *others = worlds[size].run(parameters, replace(run, mesh=(size,)), (cut,))
    (expected, _), *_ = worlds[size].run(parameters, replace(run, mesh=(size, 1)), (alone,))
    assert_close(found, expected, rtol=0.0, atol=1e-9)
    assert all(torch.equal(found[0], other[0]) for other, _ in others)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), pytest.param((2, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_matrix_with_rows_and_columns_cut_equals_one_process(projector: str, mesh: tuple[int, ...], worlds: dict[int, World]) -> None:
    cuts = (Cut((9, 14), (0, 1)), Cut((14, 9), (0, 1)), Cut((12, 10), (1, 0)))
    assert_same_steps(worlds[mesh[0] * mesh[1]], Run(mesh=mesh, keys={"projector": projector}), cuts)


@pytest.mark.parametrize("size", BOTH)
def test_8_bit_moments_have_the_blocks_of_one_process(size: int, worlds: dict[int, World]) -> None:
    """Against replicas that each hold the only shard. A shard cuts no block: 128 rows are blocks of 16 on 1 to 8 processes."""
    run = Run("GaLoreAdamW8bit", {"lr": 0.01, "min_8bit_size": 1}, RIGHT, steps=range(20))
    cut, alone = Cut((128, 20)), Cut((128, 20), (None, 0))
    (found, _), *others = worlds[size].run(parameters, replace(run, mesh=(size,)), (cut,))
    (expected, _), *_ = worlds[size].run(parameters, replace(run, mesh=(size, 1)), (alone,))
    assert_close(found, expected, rtol=0.0, atol=1e-6)
    assert all(torch.equal(found[0], other[0]) for other, _ in others)


CODECS: dict[str, dict[str, Any]] = {
    "bf16": {"state_codec": "bf16", "basis_codec": "bf16"},
    "int8, int4": {"state_codec": "int8", "basis_codec": "int4", "min_8bit_size": 1},
}


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("optimizer", ["GaLoreAdamW", "GaLoreAdafactor"])
@pytest.mark.parametrize("codec", CODECS)
def test_moments_in_every_codec_follow_those_in_float32(codec: str, optimizer: str, size: int, worlds: dict[int, World]) -> None:
    """bf16 rounds at random, int8 to levels and an INT4 basis to 16 of them: the same way, within a quarter of its length."""
    run = Run(optimizer, {"lr": 0.02}, RIGHT, steps=range(20))
    start, ended = (parameters(replace(run, steps=steps), ROWS)[0] for steps in (range(0), run.steps))
    coded = replace(run, keys={**RIGHT, **CODECS[codec]}, mesh=(size,))
    for found, begun, theirs in zip(worlds[size].run(parameters, coded, ROWS)[0][0], start, ended, strict=True):
        assert float((found - theirs).norm() / (theirs - begun).norm()) < 0.25


@pytest.mark.parametrize("size", BOTH)
@pytest.mark.parametrize("optimizer", ["GaLoreAdamW", "GaLoreAdafactor"])
def test_bf16_weights_equal_one_process_but_for_a_rounding(optimizer: str, size: int, worlds: dict[int, World]) -> None:
    """To nearest: a sum in another order can turn the last bit, 2^-7 of a weight up to 2 and 2^-6 above, in each of three steps."""
    run = Run(optimizer, {"lr": 0.2}, {**RIGHT, "stochastic_rounding": False}, steps=range(3), dtype=torch.bfloat16)
    started, alone = (parameters(replace(run, steps=steps), ROWS)[0] for steps in (range(0), run.steps))
    for found, theirs, start in zip(worlds[size].run(parameters, replace(run, mesh=(size,)), ROWS)[0][0], alone, started, strict=True):
        assert float((found.float() - theirs.float()).norm()) < 0.05 * float((theirs.float() - start.float()).norm())


def test_a_schedule_reads_adafactors_own_step_size_of_the_whole_matrix(worlds: dict[int, World]) -> None:
    run = Run("GaLoreAdafactor", {"scale_parameter": True}, RIGHT, steps=range(3))
    for found in worlds[2].run(adafactor_rate, replace(run, mesh=(2,))):
        assert found == pytest.approx(adafactor_rate(run), rel=1e-6)


def test_zero_redundancy_optimizer_trains_the_same_whatever_process_has_a_parameter(worlds: dict[int, World]) -> None:
    """Turns at refreshing are by the model's order, not by the order within a process' share."""
    run = Run(steps=range(15))
    for found in worlds[2].run(redundancy_free, run, 2):
        assert_close(found, redundancy_free(run, 1), rtol=0.0, atol=1e-7)


REFUSED: dict[str, tuple[Run, tuple[Cut, ...], str]] = {
    "left": (Run(keys={"proj_type": "left"}), ROWS[:1], r"rows are shared among 2 processes.*proj_type='std'"),
    "full": (Run(keys={"proj_type": "full"}), ROWS[:1], r"proj_type='full' projects the rows and columns.*columns here"),
    "rows": (Run(keys={"projector": "rows"}), ROWS[:1], r"projector='rows' projects the rows.*'power'"),
    "kernel": (Run(), (Cut((6, 8, 3, 3), (1,)),), r"cut along its dimension 1"),
    "a class that looks at all": (Run("Adafactor", {"lr": 0.01}), ROWS[:1], r"base=Adafactor looks at whole matrices"),
    "experts with an adaptive gap": (Run(keys={"gap_range": (2, 20)}), OTHER_CUTS["experts"][:1], r"gap_range=\(2, 20\) follows the mean"),
}


def test_a_dtype_on_the_wire_is_refused_for_shards(worlds: dict[int, World]) -> None:
    with pytest.raises(ValueError, match=r"reduce_dtype=torch.bfloat16 is of DistributedDataParallel.*leave it None"):
        worlds[2].run(reduced_in_bf16)


def test_a_second_gradient_of_a_shard_that_was_used_up_is_an_error(worlds: dict[int, World]) -> None:
    with pytest.raises(AssertionError, match=r"consumed inside the backward pass .*use mode='project' or 'direct'"):
        worlds[2].run(weights, Run(mesh=(2,), mode="update", micro=2, keys=RIGHT))


def test_a_direct_pass_of_a_shard_that_was_stepped_in_between_is_an_error(worlds: dict[int, World]) -> None:
    with pytest.raises(AssertionError, match=r"modified by an inplace operation between the forward and the backward pass"):
        worlds[2].run(stepped_in_between)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_is_kept_of_a_gradient_is_its_low_rank_part_of_the_rows_that_are_here(codec: str, worlds: dict[int, World]) -> None:
    """Between two backward passes: 2 of the columns, in fp32, of this process' half of the rows."""
    keys = {"state_codec": codec, "min_8bit_size": 1, **RIGHT}
    for rank, found in enumerate(worlds[2].run(kept_gradients, Run(mesh=(2,), mode="project", keys=keys))):
        rows = [-(-size // 2) if rank == 0 else size // 2 for size in Run.sizes[1:]]
        assert found == [(r, 2) for r in rows]


@pytest.mark.parametrize("mode", ["project", "direct", "update"])
def test_a_model_that_is_sharded_after_it_was_fused_is_an_error_of_the_step(mode: str, worlds: dict[int, World]) -> None:
    with pytest.raises(ValueError, match=r"is another parameter now.*fully_shard.*Call them first"):
        worlds[2].run(sharded_late, mode)


@pytest.mark.parametrize("keeps_originals", [True, False])
def test_what_fsdp1_has_flattened_is_refused_with_the_cure(keeps_originals: bool, worlds: dict[int, World]) -> None:
    with pytest.raises(ValueError, match=r"vectors that FSDP1 .*fully_shard.*leave rank out"):
        worlds[2].run(flattened, keeps_originals)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_cure(name: str, worlds: dict[int, World]) -> None:
    run, cuts, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        worlds[2].run(parameters, replace(run, mesh=(2,), steps=range(1)), cuts)
