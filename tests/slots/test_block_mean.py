"""Means of neighbours, with and without the residual. Oracle: `BlockMeansReference`, block by block in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.inductor import has_compiler
from galore_torch.engine.layout import layout_of
from galore_torch.slots.structured import whole_blocks
from galore_torch.train.plan.optimizer_bytes import param_bytes
from references.slots import BlockMeansReference
from support.memory import peak_bytes, storage_bytes

each_recovery = pytest.mark.parametrize("recovery", ["project_back", "foam"])


def follow(W: Parameter, optimizer: torch.optim.Optimizer, reference: BlockMeansReference, tolerance: float, steps: int = 6) -> None:
    """The gradients shrink and grow, and one is zero: a block of which nothing is left moves by its momentum alone."""
    for t in range(steps):
        G = (0.3 + t % 3) * torch.randn(W.shape, dtype=torch.float64) * (t != 3)
        W.grad = G.to(W.dtype)
        optimizer.step()
        torch.testing.assert_close(W.detach().double(), reference.step(W.grad), rtol=tolerance, atol=tolerance)


@each_recovery
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "proj_type"), list(itertools.product([(16, 24), (24, 16), (16, 16)], ["std", "left", "right"])))
def test_equals_the_paper(shape: tuple[int, int], proj_type: str, weight_decay: float, recovery: str) -> None:
    """At rank 4 a side of 16 has blocks of 4, one of 24 blocks of 4 too, of which 6 are left."""
    W = Parameter(torch.randn(shape, dtype=torch.float64))
    axis = {"left": -2, "right": -1, "std": -1 if shape[0] >= shape[1] else -2}[proj_type]
    reference = BlockMeansReference(W.detach(), axis, 4, 0.25, 0.01, recovery == "foam", weight_decay)
    settings: dict[str, Any] = {"projector": "block_mean", "proj_type": proj_type, "recovery": recovery, "weight_decay": weight_decay}
    follow(W, g.GaLoreAdamW([W], lr=0.01, rank=4, scale=0.25, **settings), reference, 1e-10)


@pytest.mark.parametrize(("length", "rank", "means"), [(16, 4, 4), (24, 4, 6), (1376, 128, 172), (20, 7, 10), (12, 7, None), (15, 4, None)])
def test_blocks_divide_the_side_and_leave_at_least_the_rank(length: int, rank: int, means: int | None) -> None:
    assert whole_blocks(length, rank) == means


def test_a_side_without_such_blocks_trains_at_full_rank_with_a_warning_that_says_why() -> None:
    W = Parameter(torch.zeros(15, 20))
    with pytest.warns(UserWarning, match=r"leaves no means of 2, 4, 8, \.\.\. neighbours, which divide it, on the projected side"):
        optimizer = g.GaLoreAdamW([W], rank=4, projector="block_mean")
    assert optimizer.state[W]["exp_avg"].shape == (15, 20)
    assert not layout_of(W, optimizer.param_groups[0]).ranks


def test_both_sides_are_means_of_squares() -> None:
    """proj_type="full" with SGD: W moves by the mean of each 4 x 2 tile."""
    W, G = Parameter(torch.zeros(16, 8)), torch.randn(16, 8)
    optimizer = g.GaLoreSGD([W], lr=1.0, rank=4, scale=1.0, projector="block_mean", proj_type="full")
    W.grad = G
    optimizer.step()
    tiles = torch.nn.functional.avg_pool2d(G[None], (4, 2))[0]
    torch.testing.assert_close(W.detach(), -tiles.repeat_interleave(4, 0).repeat_interleave(2, 1))


def test_the_state_is_two_moments_of_the_means_and_nothing_else() -> None:
    """By hand, of a 48 x 64 weight at rank 12: 2 moments of 12 x 64 in fp32; no basis, no flag."""
    W = Parameter(torch.zeros(48, 64))
    for recovery in ("project_back", "foam"):
        assert storage_bytes(g.GaLoreAdamW([W], rank=12, projector="block_mean", recovery=recovery).state[W]) == 2 * 4 * 12 * 64


@pytest.mark.parametrize(
    ("mode", "projector", "recovery"),
    [
        *itertools.product(["project", "direct", "update"], ["block_mean", "rows"], ["project_back"]),
        ("update", "block_mean", "foam"),
    ],
)
def test_inside_the_backward_pass(mode: str, recovery: str, projector: str) -> None:
    """Two micro-batches but in mode "update". Oracle: the run without fused_backward."""

    def run(fused: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(64, 32, bias=False)
        optimizer = g.GaLoreAdamW(model.parameters(), rank=8, projector=projector, recovery=recovery)
        attached = g.fused_backward(model, optimizer, mode) if fused else None
        for _ in range(4):
            for _ in range(1 if mode == "update" else 2):
                model(torch.randn(4, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if attached is not None:
            attached.remove()
        return model.weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recovery", ["project_back", "foam", "fold"])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_other_codecs_of_moments_stay_near_fp32(codec: str, recovery: str) -> None:
    start, grads = torch.randn(64, 96), [torch.randn(64, 96) for _ in range(5)]
    found = []
    for each in ("fp32", codec):
        W = Parameter(start.clone())
        optimizer = g.GaLoreAdamW([W], lr=0.01, rank=16, projector="block_mean", recovery=recovery, state_codec=each, min_8bit_size=0)
        for G in grads:
            W.grad = G.clone()
            optimizer.step()
        found.append(W.detach() - start)
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_one_element_that_is_not_finite_or_whose_square_is_not_moves_nothing(value: float) -> None:
    """Only the decay acts; 1e30 and -1e30 in one block have a mean of 0."""
    W = Parameter(torch.randn(16, 16))
    optimizer = g.GaLoreAdamW([W], lr=0.1, rank=4, projector="block_mean", recovery="foam", weight_decay=0.5)
    W.grad = torch.randn(16, 16)
    optimizer.step()
    before, state = W.detach().clone(), {key: value.clone() for key, value in optimizer.state[W].items() if isinstance(value, Tensor)}
    W.grad[3, 4], W.grad[3, 5] = value, -value
    optimizer.step()
    torch.testing.assert_close(W.detach(), before * 0.95)
    assert all(torch.equal(optimizer.state[W][key], value) for key, value in state.items())


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_planner_knows_what_decoded_moments_take_in_one_pass(codec: str) -> None:
    """Both are in full; compiled, of a matrix whose R is more than a chunk of an elementwise pass."""
    if not has_compiler("cpu"):
        pytest.skip("torch.compile finds no C++ compiler here")
    W = Parameter(torch.randn(2048, 1024))
    W.grad = torch.randn_like(W)
    optimizer = g.GaLoreAdamW([W], rank=512, projector="block_mean", state_codec=codec, compile=True)
    for _ in range(2):
        optimizer.step()
    planned = param_bytes((2048, 1024), torch.float32, optimizer.param_groups[0], optimizer.rule).transient
    assert 0.95 < planned / peak_bytes(optimizer.step) < 1.25


@pytest.mark.parametrize("recovery", ["project_back", "foam", "fold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_planner_knows_what_a_step_takes_for_a_moment(codec: str, dtype: torch.dtype, recovery: str) -> None:
    """Within a quarter of the allocator's log."""
    for shape in ((1024, 1536), (1536, 1024)):
        W = Parameter(torch.randn(shape).to(dtype))
        W.grad = torch.randn_like(W)
        optimizer = g.GaLoreAdamW([W], rank=256, projector="block_mean", recovery=recovery, state_codec=codec, compile=False)
        optimizer.step()
        planned = param_bytes(shape, dtype, optimizer.param_groups[0], optimizer.rule).transient
        assert 0.8 < planned / peak_bytes(optimizer.step) < 1.25
