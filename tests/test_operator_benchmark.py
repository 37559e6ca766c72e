"""The benchmark of neural operators: its solver against exact solutions, its flattenings, a run that is run once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import Parameter

from support.benchmarks import BENCHMARKS, benchmark_modules

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """(navier_stokes, run); what they import by plain names is forgotten afterwards."""
    with benchmark_modules("operator", "navier_stokes", "run") as (navier_stokes, run):
        yield navier_stokes, run


def grid(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(size, dtype=torch.float64) * 2 * math.pi / size
    return x[:, None], x[None, :]


def test_taylor_green_vortices_decay_as_they_must(modules: tuple[ModuleType, ModuleType]) -> None:
    """w = 2 cos kx cos ky decays as exp(-2 k^2 nu t), for its advection is zero: diffusion, and the signs of products that cancel."""
    x, y = grid(32)
    for k in (1, 3):
        w = 2 * torch.cos(k * x) * torch.cos(k * y)
        later = modules[0].Solver(32, 0.05).solve(w, 1.5, 0.05)
        torch.testing.assert_close(later, w * math.exp(-2 * k**2 * 0.05 * 1.5), rtol=1e-10, atol=1e-10)


def test_a_vortex_carried_by_a_uniform_shear_of_its_own(modules: tuple[ModuleType, ModuleType]) -> None:
    """Advection itself: -u . grad w by finite differences of the same fields, and without viscosity energy and enstrophy that stay."""
    solver = modules[0].Solver(64, 0.0)
    x, y = grid(64)
    w = torch.cos(x + y) + torch.cos(2 * x) - torch.sin(3 * y - x)
    psi = torch.cos(x + y) / 2 + torch.cos(2 * x) / 4 - torch.sin(3 * y - x) / 10  # laplace psi = -w
    h = 2 * math.pi / 64

    def slope(field: torch.Tensor, axis: int) -> torch.Tensor:
        """Of order 4."""
        return (8 * (field.roll(-1, axis) - field.roll(1, axis)) - (field.roll(-2, axis) - field.roll(2, axis))) / (12 * h)

    expected = -(slope(psi, 1) * slope(w, 0) - slope(psi, 0) * slope(w, 1))
    found = torch.fft.irfft2(solver.advection(torch.fft.rfft2(w)), s=(64, 64))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    later = solver.solve(w, 0.5, 0.005)
    assert float((later * later).mean()) == pytest.approx(float((w * w).mean()), rel=1e-5)
    assert not torch.allclose(later, w, atol=0.1)


def test_flattened_weights_share_their_memory_and_their_state_is_as_large(modules: tuple[ModuleType, ModuleType]) -> None:
    run = modules[1]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spectral, self.real = Parameter(torch.ones(12, 12, 8, 5, dtype=torch.complex64)), Parameter(torch.ones(12))

    sizes = {}
    for method in ("tensor", "channels", "frequencies", "sparse", "matrix1", "matrix2", "matrix3"):
        model = Model()
        optimizer, before_step = run.build(run.Case(method, 0.25), model, 0.01, 50)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        before_step()
        optimizer.step()
        assert (model.spectral != 1).all(), "the model's own weight has moved"
        sizes[method] = run.state_bytes(optimizer)
    assert sizes["matrix2"] == pytest.approx(sizes["tensor"], rel=0.1)
    assert 0.8 * sizes["tensor"] < sizes["frequencies"] < 1.05 * sizes["tensor"], "8 of 40 frequencies: the most within the ratio"
    assert sizes["channels"] == pytest.approx(sizes["tensor"], rel=0.1)
    assert sizes["tensor"] < sizes["sparse"] < 1.2 * sizes["tensor"], "the same number of moments, and indices"
    assert sizes["matrix1"] == pytest.approx(sizes["tensor"], rel=0.25)
    rank = run.Flattened([Model().spectral], 3).rank(10**9)
    assert rank == [None, 5], "the short side, and never more than it has"


def test_a_run_is_run_once_and_rates_come_from_those_that_are_done(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    run = modules[1]
    import argparse
    import json
    from dataclasses import asdict

    arguments = argparse.Namespace(problem="darcy", width=8, modes=4, batch=8, gap=5, epochs=4, seeds=2, cases=2)
    tuning = list(run.planned(arguments, {}))
    assert all(each.tuning and each.epochs == 2 for each in tuning)
    file = tmp_path / "results.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for each in tuning:
            error = abs(math.log(each.lr / 1e-2))  # the best rate is 1e-2
            lines.write(json.dumps({**asdict(each), "errors": {"held out": {"h1": error}}}) + "\n")
    done = run.read(file)
    assert [each.key() in done for each in tuning] == [True] * len(tuning)
    left = [each for each in run.planned(arguments, done) if each.key() not in done]
    assert [(each.case.method, each.case.ratio, each.seed, each.lr) for each in left] == [
        ("adamw", 1.0, 1, 1e-2),
        ("tensor", 0.25, 1, 1e-2),
        ("adamw", 1.0, 2, 1e-2),
        ("tensor", 0.25, 2, 1e-2),
    ]
