"""The compiled elementwise region. Oracle: the same optimizer with compile=False, which the other tests hold to the papers.

Both run the same function. The compiler may keep a product unrounded on its way into a sum, so fp32 results may differ in the last
bits; a value that stands on the edge between two codes of int8, or two numbers of bf16, may then be stored as its neighbour.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.engine import fused as elementwise
from galore_torch.engine import inductor

pytestmark = pytest.mark.skipif(not inductor.has_compiler("cpu"), reason="torch.compile finds no C++ compiler here")

RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "adam": (g.GaLoreAdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "adagrad": (g.GaLoreAdagrad, {"lr_decay": 0.1}),
    "momentum": (g.GaLoreSGD, {"momentum": 0.9, "dampening": 0.1}),
}
SHAPES = [(96, 64), (64, 96), (80,)]  # rank 16: both sides, and a vector
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _no_trace_of_others() -> Iterator[None]:
    """What one test makes the compiler refuse, or find missing, is not for the next."""
    yield
    for key in [key for key, program in inductor.programs.items() if program is None]:
        del inductor.programs[key]
    inductor.has_compiler.cache_clear()


def graphs() -> int:
    """How often anything has been compiled: nothing else calls the compiler."""
    return len(inductor.programs)


def refused() -> int:
    return sum(program is None for program in inductor.programs.values())


def make(cls: Any, compile: bool | None, shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return params, cls(params, **{"lr": 0.01, "rank": 16, "update_proj_gap": 3, "min_8bit_size": 0, "compile": compile, **kwargs})


def train(params: list[nn.Parameter], optimizer: Any, steps: Any) -> list[Tensor]:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach().float().clone() for p in params]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rule", RULES)
def test_compiled_equals_eager(rule: str, codec: str) -> None:
    """Five steps and two refreshes. Codes may differ by one where a value stands on an edge: seldom, and then the update moves by
    that code's part of it, which the bounds on int8 and bf16 allow for a hundredth of the elements."""
    cls, hyper = RULES[rule]
    (p, compiled), (q, eager) = (
        make(cls, wish, SHAPES if codec == "fp32" else SHAPES[:2], state_codec=codec, weight_decay=0.1, **hyper) for wish in (True, False)
    )
    before, steps = graphs(), range(5)
    got, expected = train(p, compiled, steps), train(q, eager, steps)
    assert graphs() > before
    assert not refused()
    for x, y in zip(got, expected, strict=True):
        # 5 steps of some 10 roundings, of numbers up to the largest weight; refreshes multiply what they find by up to 10
        close = (x - y).abs() <= 500 * EPS * float(y.abs().max())
        assert close.float().mean() >= (1.0 if codec == "fp32" else 0.99)
        assert (x - y).abs().max() <= 0.02


@pytest.mark.parametrize("shape", [(4099,), (8, 4099)])
def test_int8_moments_whose_last_block_is_short(shape: tuple[int, ...]) -> None:
    """Three numbers in the block: Inductor's code took the scale from what lay behind them, and those weights hardly moved."""
    (p, compiled), (q, eager) = (make(g.GaLoreAdamW, wish, [shape], state_codec="int8", rank=None) for wish in (True, False))
    (x,), (y,) = train(p, compiled, range(3)), train(q, eager, range(3))
    assert (x - y).abs().max() <= 1e-5


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_bf16_weights_round_alike(codec: str) -> None:
    """The noise of stochastic rounding is integer arithmetic: weights are the same but where fp32 rounding moved one over an edge."""
    (p, compiled), (q, eager) = (make(g.GaLoreAdamW, wish, SHAPES[1:], torch.bfloat16, state_codec=codec) for wish in (True, False))
    got, expected = train(p, compiled, range(4)), train(q, eager, range(4))
    assert not refused()
    for x, y in zip(got, expected, strict=True):
        assert (x != y).float().mean() < 0.01


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_nothing_recompiles_after_the_second_step(codec: str) -> None:
    """lr (float, then tensor), betas, eps, weight decay and the step number move; only a tensor lr in place of a float is a new kind."""
    params, optimizer = make(g.GaLoreAdamW, True, state_codec=codec, weight_decay=0.1)
    group = optimizer.param_groups[0]
    train(params, optimizer, range(2))
    known = graphs()
    for t in range(2, 9):
        group.update(lr=0.01 / t, betas=(0.9 - 0.01 * t, 0.99 - 0.001 * t), eps=1e-6 * t, weight_decay=0.1 * t, scale=0.1 * t)
        train(params, optimizer, [t])
    assert graphs() == known
    group["lr"] = torch.tensor(0.01)
    train(params, optimizer, [9, 10])
    known = graphs()
    for t in range(11, 15):
        group["lr"] = torch.tensor(0.01 / t)
        train(params, optimizer, [t])
    assert graphs() == known
    assert not refused()


def test_twelve_shapes_compile_once_each() -> None:
    """torch gives up on a function after 8 versions of it."""
    params, optimizer = make(g.GaLoreSGD, True, [(40 + n, 30) for n in range(12)])
    before = graphs()
    train(params, optimizer, range(2))
    assert graphs() == before + 12
    assert not refused()


def test_small_tensors_are_left_alone_and_large_ones_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "COMPILING", 0.0)
    shapes = [(elementwise.WORTHWHILE - 1,), (elementwise.WORTHWHILE,)]
    for shape, expected in zip(shapes, (0, 1), strict=True):
        params, optimizer = make(g.GaLoreSGD, None, [shape], rank=None)
        before = graphs()
        train(params, optimizer, range(1))
        assert graphs() == before + expected


def test_a_first_step_compiles_nothing() -> None:
    """Twelve shapes: to compile them takes a hundred times as long as the step."""
    params, optimizer = make(g.GaLoreAdamW, None, [(256 + 16 * i, 384 + 16 * i) for i in range(12)], rank=128)
    before = graphs()
    train(params, optimizer, range(2))
    assert graphs() == before


@pytest.fixture
def compiled_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of one parameter that were compiled, where a pass takes a nanosecond an element and compiling 6 of 2^15.

    A stand-in for the compiler adds one to the weight: a step that goes the wrong way is not a matter of last bits.
    """
    monkeypatch.setattr(inductor, "COMPILING", 6 * 2**15 * 1e-9)
    monkeypatch.setattr(inductor, "PASS", {"cpu": (0.0, 1e-9)})
    steps: list[int] = []

    def call(function: Any, region: Any, *arguments: Any) -> None:
        weight = [x for x in arguments if isinstance(x, Tensor) and x.shape == (elementwise.WORTHWHILE,)][-1]
        function(region, *arguments)
        weight.add_(1.0)
        steps.append(1)

    monkeypatch.setattr(elementwise, "call", call)
    return steps


@pytest.mark.parametrize(("alike", "others", "eager"), [(1, 0, 6), (2, 0, 3), (3, 0, 2), (1, 2, 6), (2, 4, 3)])
def test_a_shape_is_compiled_when_its_steps_have_cost_as_much(alike: int, others: int, eager: int, compiled_at: list[int]) -> None:
    """Oracle: 6 passes over all parameters of the shape; those of other shapes do not count."""
    shapes = [(elementwise.WORTHWHILE,)] * alike + [(100,)] * others
    params, optimizer = make(g.GaLoreSGD, None, shapes, rank=None)
    for t in range(8):
        train(params, optimizer, [t])
        assert len(compiled_at) == alike * max(0, t + 1 - eager)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_goes_over_to_the_compiled_pass_at_the_same_step(stop: int, compiled_at: list[int]) -> None:
    """Before, at and after the step from which two matrices of a shape are compiled. Oracle: the run that was not stopped, to the bit."""
    shapes = [(elementwise.WORTHWHILE,)] * 2
    params, optimizer = make(g.GaLoreAdamW, None, shapes, torch.bfloat16, rank=None)
    train(params, optimizer, range(stop))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    expected = train(params, optimizer, range(stop, 7))
    assert len(compiled_at) == 2 * 4
    again, resumed = make(g.GaLoreAdamW, None, shapes, torch.bfloat16, rank=None)
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for p, weight in zip(again, weights, strict=True):
            p.copy_(weight)
    for x, y in zip(train(again, resumed, range(stop, 7)), expected, strict=True):
        assert torch.equal(x, y)


def test_torchs_own_switch_turns_it_off() -> None:
    """TORCH_COMPILE_DISABLE=1 sets torch._dynamo.config.disable. Oracle: compile=False."""
    from torch._dynamo import config

    (p, switched), (q, eager) = (make(g.GaLoreAdamW, wish, [(71, 53)]) for wish in (True, False))
    before = graphs()
    with config.patch(disable=True):
        got = train(p, switched, range(3))
    assert graphs() == before
    assert all(torch.equal(x, y) for x, y in zip(got, train(q, eager, range(3)), strict=True))


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_gradient_that_is_not_finite_is_skipped(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By branching, and masked as on an accelerator: moments stay, weights only decay."""
    from galore_torch.ops import linalg

    for masked in (False, True):
        if masked:
            monkeypatch.setattr(linalg, "readable", lambda tensor: False)
        params, optimizer = make(g.GaLoreAdamW, True, state_codec=codec, weight_decay=0.1, update_proj_gap=50)
        train(params, optimizer, range(2))
        held = copy.deepcopy([{k: v for k, v in optimizer.state[p].items() if k != "step"} for p in params])
        weights = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        for p, state, weight in zip(params, held, weights, strict=True):
            assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items() if isinstance(value, Tensor))
            torch.testing.assert_close(p.detach(), weight * (1 - 0.01 * 0.1))
        assert not refused()


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_resume_is_exact(codec: str) -> None:
    params, optimizer = make(g.GaLoreAdamW, True, SHAPES[:1], torch.bfloat16, state_codec=codec)
    train(params, optimizer, range(4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    expected = train(params, optimizer, range(4, 8))
    again, resumed = make(g.GaLoreAdamW, True, SHAPES[:1], torch.bfloat16, state_codec=codec)
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for p, weight in zip(again, weights, strict=True):
            p.copy_(weight)
    for x, y in zip(train(again, resumed, range(4, 8)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("mode", ["project", "update"])
def test_inside_the_backward_pass(mode: str) -> None:
    def run(wish: bool, fused: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
        optimizer = g.GaLoreAdamW(model.parameters(), lr=0.01, rank=16, compile=wish)
        if fused:
            g.fused_backward(model, optimizer, mode)
        for t in range(3):
            model(torch.randn(8, 64, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    got = run(True, True)
    assert inductor.programs
    assert not refused()
    torch.testing.assert_close(got, run(False, False), rtol=1e-4, atol=1e-5)


def test_inside_a_compiled_training_step() -> None:
    """A caller's torch.compile does not look into step(), which compiles its own."""
    params, optimizer = make(g.GaLoreAdamW, True)
    expected_params, expected = make(g.GaLoreAdamW, True)
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(3):
        for p, q in zip(params, expected_params, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            q.grad = p.grad.clone()
        step()
        expected.step()
    for p, q in zip(params, expected_params, strict=True):
        assert torch.equal(p, q)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is silently eager; True is an error that says what is missing, and nothing is added."""
    from torch._inductor import cpp_builder

    def missing() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    inductor.has_compiler.cache_clear()
    before = graphs()
    large = [(elementwise.WORTHWHILE,)]
    (p, automatic), (q, eager) = (make(g.GaLoreSGD, wish, large, rank=None) for wish in (None, False))
    for x, y in zip(train(p, automatic, range(2)), train(q, eager, range(2)), strict=True):
        assert torch.equal(x, y)
    assert graphs() == before
    with pytest.raises(ValueError, match=r"compile=True found no compiler.*compile=None"):
        make(g.GaLoreSGD, True)
    params, optimizer = make(g.GaLoreSGD, False)
    optimizer.param_groups[0]["compile"] = True
    weights = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="compile=True found no compiler"):
        train(params, optimizer, range(1))
    assert all(torch.equal(p, weight) for p, weight in zip(params, weights, strict=True))


def test_a_compiler_that_fails_leaves_the_step_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the compiler broke")

    monkeypatch.setattr(compile_fx, "compile_fx", broken)
    shapes = [(101, 67), (83,)]  # no other test has compiled these
    (p, failing), (q, eager) = (make(g.GaLoreAdamW, wish, shapes) for wish in (True, False))
    for x, y in zip(train(p, failing, range(3)), train(q, eager, range(3)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # numbers such as the step size are rounded to fp32 here
    assert refused() == 2
