"""The step of block means in one pass: the C++ operator, and what Inductor makes of the same. Oracle: compile=False, the plain road, which
tests/slots/test_block_mean.py holds to the paper."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import cpp_extension

import galore_torch as g
from galore_torch.engine import inductor, one_pass
from galore_torch.ops import native, twins
from galore_torch.slots.projectors import PROJECTORS

ROADS = ["native", "inductor"]
each_recovery = pytest.mark.parametrize("recovery", ["project_back", "foam", "fold"])


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    yield
    native.library.cache_clear()


def take(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two roads alone; a test of what is not to be had here is skipped."""
    if road == "inductor":
        if not inductor.has_compiler("cpu"):
            pytest.skip("torch.compile finds no C++ compiler here")
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there is no ninja to build the operator with")
    else:
        monkeypatch.setattr(one_pass, "_compiled", None)


def trained(start: Tensor, compile: bool, steps: int = 5, grad_of: Any = None, **settings: Any) -> tuple[Tensor, dict[str, Any]]:
    """Gradients that grow; the fourth holds one NaN."""
    generator = torch.Generator().manual_seed(1)
    W = Parameter(start.clone())
    optimizer = g.GaLoreAdamW([W], **{"lr": 0.01, "rank": 4, "projector": "block_mean", "compile": compile, **settings})
    for t in range(steps):
        G = (1 + t) * torch.randn(start.shape, generator=generator)
        if t == 3:
            G.view(-1)[5] = float("nan")
        W.grad = G if grad_of is None else grad_of(G)
        optimizer.step()
    return W.detach(), optimizer.state[W]


def same(start: Tensor, **settings: Any) -> None:
    (W, state), (expected, plain) = (trained(start, compile, **settings) for compile in (True, False))
    torch.testing.assert_close(W, expected, rtol=1e-5, atol=2e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], plain[key], rtol=1e-5, atol=1e-6)
    assert state["step"] == plain["step"]


@each_recovery
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "settings",
    [
        {"proj_type": "left"},
        {"proj_type": "right", "weight_decay": 0.1},
        {"proj_type": "left", "maximize": True, "weight_decay": 0.1, "decay": "after"},
        {"proj_type": "right", "maximize": True, "correct_bias": False, "betas": (0.5, 0.9)},
    ],
)
def test_equals_the_plain_road(settings: dict[str, Any], road: str, recovery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(road, monkeypatch)
    for shape in ((64, 96), (3, 32, 64)):
        same(torch.randn(shape), recovery=recovery, **settings)


CODECS: dict[str, dict[str, Any]] = {"int8": {"state_codec": "int8", "min_8bit_size": 0}, "bf16": {"state_codec": "bf16"}}


@each_recovery
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("road", ROADS)
def test_coded_moments_take_the_pass_too(road: str, codec: str, recovery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded for it and encoded behind it: the same weights as on the plain road, and the same codes but for ties."""
    take(road, monkeypatch)
    settings = {"recovery": recovery, "rank": 24, "weight_decay": 0.1, **CODECS[codec]}
    for shape in ((128, 96), (3, 96, 128)):
        start = torch.randn(shape)
        (W, state), (expected, plain) = (trained(start, compile, **settings) for compile in (True, False))
        torch.testing.assert_close(W, expected, rtol=1e-4, atol=1e-4)
        assert state.keys() == plain.keys()
        for key, value in plain.items():
            if key.endswith("_codes"):
                assert (state[key] != value).float().mean() < 0.01
            elif isinstance(value, Tensor):
                torch.testing.assert_close(state[key], value, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compile", [False, True])
def test_coded_moments_are_rounded_once_a_step(compile: bool, codec: str) -> None:
    """The weight moves by the moments as they are before they are encoded: a first step is that of fp32 moments."""
    start = torch.randn(128, 96)
    settings = {"recovery": "fold", "rank": 24, "steps": 1, "compile": compile}
    found, expected = (trained(start, **settings, **own)[0] for own in (CODECS[codec], {}))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("compile", [False, True])
def test_a_gradient_that_is_not_finite_leaves_codes_to_the_bit(compile: bool, codec: str) -> None:
    W = Parameter(torch.randn(128, 96))
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=24, projector="block_mean", recovery="fold", compile=compile, **CODECS[codec])
    W.grad = torch.randn(128, 96)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[W].items() if isinstance(value, Tensor)}
    W.grad[3, 4] = float("nan")
    optimizer.step()
    assert all(torch.equal(optimizer.state[W][key], value) for key, value in before.items())


@each_recovery
@pytest.mark.parametrize(("block", "proj_type"), list(itertools.product([2, 4, 8, 16, 32, 64], ["left", "right"])))
def test_every_length_of_a_block(block: int, proj_type: str, recovery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 3 blocks, whose number no vector divides; 64 is none of the operator's, and goes to Inductor."""
    if native.library() is None or not inductor.has_compiler("cpu"):
        pytest.skip("needs both roads")
    side = (5, 3 * block) if proj_type == "right" else (3 * block, 5)
    same(torch.randn(side), rank=3, proj_type=proj_type, recovery=recovery)


# --- rows in turn -----------------------------------------------------------------------------------------------------------

ROWS: dict[str, Any] = {
    "projector": "rows",
    "rank": 20,
    "update_proj_gap": 2,
}  # of 64: the fourth turn is the last rows
each_turn = pytest.mark.parametrize("recovery", ["project_back", "sign"])


@each_turn
@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1, "decay": "after"}, {"correct_bias": False, "scale": 0.25}],
)
def test_rows_in_turn_equal_the_plain_road(
    settings: dict[str, Any], codec: str | None, recovery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over four turns, the fourth gradient with a NaN in a row that is not in turn; two threads give what one gives."""
    take("native", monkeypatch)
    settings = {"steps": 8, "recovery": recovery, **ROWS, **settings, **(CODECS[codec] if codec else {})}
    start, threads = torch.randn(64, 96), torch.get_num_threads()
    expected, plain = trained(start, False, **settings)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            W, state = trained(start, True, **settings)
            torch.testing.assert_close(W, expected, **({"rtol": 1e-3, "atol": 1e-4} if codec else {"rtol": 1e-5, "atol": 2e-6}))
            for key in [] if codec else ["exp_avg", "exp_avg_sq"]:
                torch.testing.assert_close(state[key], plain[key], rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


@each_turn
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("compile", [False, True])
def test_what_a_gradient_that_is_not_finite_leaves_alone(compile: bool, place: int, recovery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rows in turn: all but the decay. Elsewhere: the sign of that element."""
    take("native", monkeypatch)
    W = Parameter(torch.randn(64, 96))
    start = W.detach().clone()
    optimizer = g.GaLoreAdamW([W], lr=0.01, weight_decay=1.0, recovery=recovery, compile=compile, **ROWS)
    W.grad = torch.randn(64, 96)
    W.grad[place, 5] = float("inf")
    optimizer.step()
    if place == 0:
        torch.testing.assert_close(W.detach(), 0.99 * start)
        assert not optimizer.state[W]["exp_avg"].any()
    else:
        moved = (W.detach() - 0.99 * start).abs() > 1e-4
        moves = torch.ones(64, 96, dtype=torch.bool)
        moves[20:] = recovery == "sign"
        moves[place, 5] = False
        assert torch.equal(moved, moves)


def test_codes_of_rows_take_the_plain_road_where_the_host_may_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the pass sees to its rows, and nobody tells whether their codes are to be written."""
    start, settings = torch.randn(64, 96), {**ROWS, **CODECS["int8"], "steps": 3, "recovery": "sign"}
    expected, _ = trained(start, False, **settings)
    monkeypatch.setattr(one_pass, "readable", lambda _: False)
    monkeypatch.setattr(native, "library", None)
    torch.testing.assert_close(trained(start, True, **settings)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "settings"),
    [
        ((64, 96), torch.float32, {**ROWS}),  # one compiled region anyway
        ((64, 96), torch.bfloat16, {**ROWS, "recovery": "sign"}),
        ((3, 64, 96), torch.float32, {**ROWS, "recovery": "sign"}),
        ((64, 96), torch.bfloat16, {"projector": "block_mean", "rank": 24}),
        ((64, 96), torch.float32, {"projector": "block_mean", "rank": 24, "recovery": "sign"}),
    ],
)
def test_no_moment_is_decoded_for_a_pass_that_is_not_made(
    shape: tuple[int, ...], dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded for nothing")

    monkeypatch.setattr(one_pass, "opened", refuse)
    W = Parameter(torch.randn(shape).to(dtype))
    optimizer = g.GaLoreAdamW([W], lr=0.01, compile=True, **settings, **CODECS["int8"])
    W.grad = torch.randn_like(W)
    optimizer.step()


@pytest.mark.parametrize("settings", [{**ROWS, "recovery": "sign"}, {"projector": "block_mean", "rank": 24, "recovery": "fold"}])
def test_a_copy_of_an_optimizer_takes_the_same_pass(settings: dict[str, Any]) -> None:
    """Its rule is equal, and another object; on the plain road its last bits would differ."""
    W = Parameter(torch.randn(64, 96))
    optimizer = g.GaLoreAdamW([W], lr=0.01, compile=True, **settings)
    W.grad = torch.randn(64, 96)
    optimizer.step()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    twin = copied.param_groups[0]["params"][0]
    for p, each in ((W, optimizer), (twin, copied)):
        p.grad = torch.full((64, 96), 0.3).cumsum(1)
        assert one_pass.in_one_pass(each.view_of(p), p.grad)
    assert torch.equal(W, twin)


@pytest.mark.parametrize("settings", [{"batch": True}, {"weight": torch.bfloat16}, {"index": True}, {"recovery": "rms"}])
def test_rows_are_not_taken_where_it_would_be_wrong(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices whose sets may differ, other dtypes, a set that goes on at the first row, and another residual."""
    if (library := native.library()) is None:
        pytest.skip("there is no ninja to build the operator with")
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(galore_rows=None))
    W = Parameter(torch.zeros(3, 64, 96) if settings.get("batch") else torch.zeros(64, 96, dtype=settings.get("weight")))
    optimizer = g.GaLoreAdamW(
        [W], **{"lr": 0.01, "compile": True, "recovery": settings.get("recovery", "sign"), **ROWS, "update_proj_gap": 9}
    )
    W.grad = torch.randn(W.shape).to(W.dtype)
    if settings.get("index"):
        monkeypatch.setattr(native, "library", lambda: library)
        optimizer.step()
        optimizer.state[W]["basis"].copy_(torch.arange(50, 70) % 64)
        monkeypatch.setattr(native, "library", lambda: SimpleNamespace(galore_rows=None))
    before = W.detach().clone()
    optimizer.step()
    assert not torch.equal(W, before)


# --- edges ------------------------------------------------------------------------------------------------------------------


def test_both_sides_at_once_go_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    if not inductor.has_compiler("cpu"):
        pytest.skip("torch.compile finds no C++ compiler here")
    same(torch.randn(64, 96), recovery="foam", proj_type="full")


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": False},
        {"lr": torch.tensor(0.01)},
        {"carry": "error_feedback", "recovery": "project_back"},
        {"recovery": "fira"},
        {"weight": torch.zeros(64, 64, dtype=torch.bfloat16)},
        {"weight": torch.zeros(64, 64).double()},
    ],
)
def test_is_not_taken_where_it_would_be_wrong(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bool:
        raise AssertionError("a pass that is written for fp32 Adam was taken")

    monkeypatch.setattr(native, "library", refuse)
    monkeypatch.setattr(one_pass, "_compiled", refuse)
    W = Parameter(settings.pop("weight", torch.zeros(64, 64)).clone())
    optimizer = g.GaLoreAdamW([W], **{"lr": 0.01, "rank": 8, "projector": "block_mean", "recovery": "foam", "compile": True, **settings})
    W.grad = torch.randn(64, 64).to(W.dtype)
    optimizer.step()
    assert (W != 0).any()


def test_a_gradient_that_is_not_contiguous_takes_the_plain_road(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(one_pass, "_compiled", None)
    same(torch.randn(64, 96), recovery="foam", grad_of=lambda G: G.T.contiguous().T)


def test_autograd_sees_that_the_weight_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    take("native", monkeypatch)
    W = Parameter(torch.randn(64, 64))
    optimizer = g.GaLoreAdamW([W], rank=8, projector="block_mean", recovery="foam", compile=True)
    loss = W.square().sum()
    W.grad = torch.randn(64, 64)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_build_that_fails_warns_once_and_leaves_a_step_that_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the folder is read-only")

    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "load", fail)
    native.library.cache_clear()
    start = torch.randn(64, 64)
    with pytest.warns(UserWarning, match="could not be built .*the folder is read-only.* compile=False") as warned:
        found, _ = trained(start, True, recovery="foam")
    assert len(warned) == 1
    torch.testing.assert_close(found, trained(start, False, recovery="foam")[0], rtol=1e-5, atol=2e-6)


def test_without_ninja_nothing_is_built_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    native.library.cache_clear()
    assert native.library() is None


def with_triton(step: str, monkeypatch: pytest.MonkeyPatch, twin: Any) -> dict[str, Any]:
    """Settings whose step on a CPU asks for Triton's, as on a GPU: a module, or None, which Python then does not find."""
    projector = {"rows": "rows", "block_means": "block_mean"}[step]
    monkeypatch.setitem(PROJECTORS, projector, replace(PROJECTORS[projector], adam={"cpu": twins.in_triton(step)}))
    monkeypatch.setitem(sys.modules, "galore_torch.ops.triton_steps", twin)
    monkeypatch.delattr("galore_torch.ops.triton_steps", raising=False)
    monkeypatch.setattr(twins, "_without", set())
    return {"projector": projector} | ({"update_proj_gap": 2} if projector == "rows" else {})


@pytest.mark.parametrize("step", ["rows", "block_means"])
def test_a_triton_kernel_that_fails_warns_once_and_leaves_a_step_that_is_the_same(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a refresh that came before it are those of the plain road: not the next ones."""

    def fail(*_: Any) -> None:
        raise RuntimeError("PTX code of a later version")

    settings = with_triton(step, monkeypatch, SimpleNamespace(rows=fail, block_means=fail))
    start = torch.randn(64, 64)
    with pytest.warns(
        UserWarning, match=f"Triton kernel of {step} could not be built .*PTX code of a later version.* compile=False"
    ) as warned:
        found, _ = trained(start, True, **settings)
    assert len(warned) == 1
    torch.testing.assert_close(found, trained(start, False, **settings)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("step", ["rows", "block_means"])
def test_without_triton_a_step_is_the_plain_one_and_nothing_is_said(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_triton(step, monkeypatch, None)
    start = torch.randn(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = trained(start, True, **settings)
    torch.testing.assert_close(found, trained(start, False, **settings)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@each_recovery
def test_on_a_gpu_the_pass_is_triton_and_equals_the_plain_road(recovery: str) -> None:
    start = torch.randn(256, 512, device="cuda")
    same_on_gpu = {"recovery": recovery, "rank": 64, "grad_of": lambda G: G.cuda()}
    (W, _), (expected, _) = (trained(start, compile, **same_on_gpu) for compile in (True, False))
    torch.testing.assert_close(W, expected, rtol=1e-5, atol=2e-6)
