"""The data of the neural-operator benchmark: Darcy flow, Burgers' equation, Navier-Stokes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from navier_stokes import pairs
from torch import Tensor

BUILD = Path(__file__).resolve().parents[2] / "build" / "operator"
Pair = tuple[Tensor, Tensor]  # inputs and outputs, samples x 1 x height x width, fp32


@dataclass(frozen=True)
class Problem:
    """``train``, and the test sets by name (the resolution). ``mean``, ``std``: of the training outputs."""

    train: Pair
    tests: dict[str, Pair]

    @property
    def mean(self) -> float:
        return float(self.train[1].mean())

    @property
    def std(self) -> float:
        return float(self.train[1].std())

    def tuning(self) -> Problem:
        """The last tenth of the training data as the test: the test sets choose nothing."""
        (x, y), cut = self.train, len(self.train[0]) * 9 // 10
        return Problem((x[:cut], y[:cut]), {"held out": (x[cut:], y[cut:])})


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as held:  # arrays of numbers: nothing is unpickled
        return held["x"], held["y"]


def _pair(x: np.ndarray, y: np.ndarray) -> Pair:
    return torch.from_numpy(x).float().unsqueeze(1), torch.from_numpy(y).float().unsqueeze(1)


def darcy(folder: Path) -> Problem:
    """Permeability to pressure, 1,000 samples of 16 x 16; tests of 50 at 16 x 16 and at 32 x 32 (neuraloperator's data)."""
    tests = {size: _pair(*_read(folder / f"darcy_test_{size}.npz")) for size in ("16", "32")}
    return Problem(_pair(*_read(folder / "darcy_train_16.npz")), tests)


def burgers(folder: Path) -> Problem:
    """The velocity at time 0 to that at 17 times, 16 points: 700 samples, and 100 as the test (neuraloperator's data)."""
    x, y = _read(folder / "burgers_train_16.npz")
    inputs, outputs = _pair(np.repeat(x[:, None, :], y.shape[1], axis=1), y)
    return Problem((inputs[:700], outputs[:700]), {"17 x 16": (inputs[700:], outputs[700:])})


def navier_stokes(folder: Path) -> Problem:
    """Vorticity at time 0 to that at time 1, viscosity 1e-3, 32 x 32: 500 samples, and 100 as the test. Solved once, kept in build."""
    kept = BUILD / "navier_stokes.pt"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pairs(600), kept)
    x, y = (field.unsqueeze(1) for field in torch.load(kept, weights_only=True))
    return Problem((x[:500], y[:500]), {"32": (x[500:], y[500:])})


PROBLEMS = {"darcy": darcy, "burgers": burgers, "navier_stokes": navier_stokes}
