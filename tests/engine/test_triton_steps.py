"""The steps in Triton, in its interpreter on a CPU and compiled on a GPU. Oracles: compile=False, the plain road, which tests/slots hold to
the papers, and the C++ operator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import galore_torch as g
from galore_torch.ops import native, twins
from galore_torch.slots.projectors import PROJECTORS

triton = pytest.importorskip("triton", reason="triton is not installed")
from galore_torch.ops import triton_steps  # noqa: E402  # which imports it

ROWS: dict[str, Any] = {"projector": "rows", "update_proj_gap": 2}
MEANS: dict[str, Any] = {"projector": "block_mean"}
FOAM: dict[str, Any] = {"projector": "block_mean", "recovery": "foam"}
# numpy's, which says of Triton's interpreter that a number has become infinite, or none
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
each_step = pytest.mark.parametrize("step", [ROWS, MEANS, FOAM], ids=["rows", "means", "foam"])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On the CPU the projectors' rows name Triton's steps in the place of those that they have there. A test has to take one."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's kernels are compiled where there is a GPU, and not interpreted")
    taken: list[bool | None] = []
    for name in ("rows", "block_means"):
        plain = getattr(triton_steps, name)
        monkeypatch.setattr(triton_steps, name, lambda *arguments, plain=plain: taken.append(plain(*arguments)) or taken[-1])
    for projector, name in (("rows", "rows"), ("block_mean", "block_means")):
        monkeypatch.setitem(PROJECTORS, projector, replace(PROJECTORS[projector], adam={request.param: twins.in_triton(name)}))
    monkeypatch.setattr(twins, "_without", set())
    yield request.param
    assert taken
    assert all(taken)


def trained(start: Tensor, compile: bool, steps: int = 6, bad: int = 4, value: float = float("nan"), **settings: Any) -> Any:
    """Gradients that grow; the fourth holds a ``value`` in the row ``bad``. Sets of rows change at the third and the fifth."""
    generator = torch.Generator().manual_seed(1)
    W = Parameter(start.clone())
    optimizer = g.GaLoreAdamW([W], **{"lr": 0.01, "rank": 4, "compile": compile, **settings})
    for t in range(steps):
        G = (1 + t) * torch.randn(start.shape, generator=generator)
        if t == 3:
            G.view(-1, start.shape[-1])[bad, 3] = value
        W.grad = G.to(W)
        optimizer.step()
    return W.detach(), optimizer.state[W]


def assert_same(start: Tensor, **settings: Any) -> None:
    (W, state), (expected, plain) = (trained(start, compile, **settings) for compile in (True, False))
    coarse = start.dtype == torch.bfloat16  # the last bit of a few weights may differ, where sums in fp32 round differently
    torch.testing.assert_close(W, expected, rtol=2**-7 if coarse else 1e-5, atol=1e-3 if coarse else 2e-6)
    assert not coarse or (W - expected).count_nonzero() < 0.02 * W.numel()
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], plain[key], rtol=1e-5, atol=1e-6)
    assert state["step"] == plain["step"]


@each_step
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1, "decay": "after"},
        {"maximize": True, "correct_bias": False, "betas": (0.5, 0.9), "scale": 1.0},
    ],
    ids=str,
)
def test_equals_the_plain_road(step: dict[str, Any], settings: dict[str, Any], device: str) -> None:
    for shape in ((24, 32), (20, 48), (3, 16, 24)):
        assert_same(torch.randn(shape, device=device), **step, **settings)


@pytest.mark.parametrize("step", [MEANS, FOAM], ids=["means", "foam"])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("block", [2, 4, 16, 64])
def test_every_side_and_length_of_a_block(block: int, proj_type: str, step: dict[str, Any], device: str) -> None:
    """Three blocks, so that no program is full, on a side or on both; 64 x 64 are more than one program takes."""
    if block == 64 and proj_type == "full":
        block = 32
    tall, wide = (block if proj_type != side else 5 / 3 for side in ("right", "left"))
    assert_same(torch.randn(int(3 * tall), int(3 * wide), device=device), rank=3, proj_type=proj_type, **step)


@pytest.mark.parametrize("step", [MEANS, FOAM], ids=["means", "foam"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_equals_the_operator_in_cpp(proj_type: str, step: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("there is no ninja to build the operator with")
    start = torch.randn(64, 96)
    found, state = trained(start.to(device), True, proj_type=proj_type, weight_decay=0.1, **step)
    row = replace(PROJECTORS["block_mean"], adam={"cpu": native.block_means})
    with monkeypatch.context() as patch:
        patch.setitem(PROJECTORS, "block_mean", row)
        expected, other = trained(start, True, proj_type=proj_type, weight_decay=0.1, **step)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(state["exp_avg_sq"].cpu(), other["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@each_step
@pytest.mark.parametrize("rounds", [False, True], ids=["nearest", "at random"])
def test_bf16_weights_with_the_same_random_bits(rounds: bool, step: dict[str, Any], device: str) -> None:
    """Rows that decay; of the others the plain road on a CPU rounds the block alone, in a stream of its own."""
    start = torch.randn(64, 96, device=device).bfloat16()
    assert_same(start, stochastic_rounding=rounds, weight_decay=0.1, **step)


def test_bf16_rows_without_a_decay_round_the_block_alone_and_right_on_average(device: str) -> None:
    start = torch.ones(64, 512, device=device).bfloat16()
    rounded, _ = trained(start, True, steps=1, lr=1e-4, scale=1.0, eps=1e-12, **ROWS)
    block, rest = rounded[:4].float(), rounded[4:]
    assert torch.equal(rest, start[4:])
    assert block.unique().numel() == 3  # one up, none, one down: a step of 1e-4 is 1/39 of what is between 1 and its upper neighbour
    exact, _ = trained(start.float(), True, steps=1, lr=1e-4, scale=1.0, eps=1e-12, **ROWS)
    assert abs(float((block - exact[:4]).mean())) < 5e-5  # four deviations of the mean of 2,048 numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@each_step
def test_a_gradient_that_is_not_finite_moves_nothing_and_the_weight_decays(value: float, step: dict[str, Any], device: str) -> None:
    """1e30 is finite, and its square is not."""
    assert_same(torch.randn(64, 96, device=device), value=value, weight_decay=0.1, **step)
    W, state = trained(torch.randn(64, 96, device=device), True, steps=4, value=value, **step)
    assert W.isfinite().all()
    assert state["exp_avg"].isfinite().all()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_ask_their_own_gradient_alone(decay: float, device: str) -> None:
    """The NaN is in the last row, which is not in the set of that step."""
    assert_same(torch.randn(64, 96, device=device), bad=63, weight_decay=decay, **ROWS)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_set_of_rows_that_goes_on_at_the_first_row(decay: float, device: str) -> None:
    """As older checkpoints may hold it."""
    results = []
    for compile in (True, False):
        W = Parameter(torch.linspace(-1, 1, 64 * 32, device=device).view(64, 32))
        optimizer = g.GaLoreAdamW([W], lr=0.1, rank=8, weight_decay=decay, compile=compile, **(ROWS | {"update_proj_gap": 50}))
        for t in range(3):
            if t == 1:
                optimizer.state[W]["basis"].copy_((60 + torch.arange(8)) % 64)
            W.grad = torch.cos(100 * (t + 1) * W.detach())
            optimizer.step()
        results.append(W.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=2e-6)


def test_autograd_sees_that_the_weight_was_written(device: str) -> None:
    W = Parameter(torch.randn(64, 64, device=device))
    optimizer = g.GaLoreAdamW([W], rank=8, compile=True, **ROWS)
    loss = W.square().sum()
    W.grad = torch.randn(64, 64, device=device)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_plain_road(dtype: torch.dtype) -> None:
    W = torch.zeros(64, 64, dtype=dtype)
    assert triton_steps.block_means(W, W, (), native.AdamStep(())) is None
    assert triton_steps.rows(W, W, (), native.AdamStep(())) is None


_COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from galore_torch.ops import triton_steps as steps

def compiled(kernel, kinds, capability, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, kinds)) | {name: "constexpr" for name in constants}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
    return "ptx" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm

numbers = ["fp32"] * 6
for capability, kind in itertools.product((80, 90), ("fp32", "bf16")):
    tensors, noise = ["*" + kind, "*" + kind, "*fp32", "*fp32"], ["*i32", "*i32"] if kind == "bf16" else ["*fp32"] * 2
    for residual, (tall, wide) in itertools.product((False, True), ((1, 8), (4, 1), (2, 2))):
        assert compiled(steps._means_kernel, [*tensors, "*fp32", *noise, *["i32"] * 3, *numbers], capability,
                        TALL=tall, WIDE=wide, DOWN=2, ACROSS=32, RESIDUAL=residual, ROUNDS=kind == "bf16")
    assert compiled(steps._squares_kernel, ["*" + kind, "*i64", "*fp32", *["i32"] * 3], capability, BLOCK=128)
    for decays in (False, True):
        assert compiled(steps._rows_kernel, [*tensors, "*i64", "*fp32", *noise, *["i32"] * 3, *numbers], capability,
                        DECAYS=decays, ROUNDS=kind == "bf16", BLOCK=128)
"""  # noqa: E501


@pytest.mark.slow
def test_every_kernel_compiles_to_machine_code_without_a_gpu() -> None:
    """For the A100 and the H100, by Triton's own compiler. What it computes there, no test without a GPU says."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
