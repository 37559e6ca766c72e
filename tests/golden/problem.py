"""The problems behind the golden fixtures: parameters, gradients and cases.

Shared by make_golden.py, which runs the published optimizers in an environment of their own, and by the tests, which
run ours. It imports torch alone and nothing of galore_torch. Every number comes from integer arithmetic or float64, so
both sides see the same gradient to one float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

FULL_RANK = "bias"  # 1-D, in the group without a rank: the published optimizers crash on 1-D with one
GAP = 10  # update_proj_gap
SCALE = 0.25
STEPS = 25
REFRESHES = (1, 11, 21)
KEPT = (1, 5, 10, 11, 12, 15, 20, 21, 22, 25)  # weights after so many steps are in the fixture
SAVED_AT = 12  # the legacy state dicts were saved after this step; a refresh follows in step 21
LAST_8BIT = 20  # the 8-bit run ends before that refresh
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

Snapshots = dict[int, Tensor]


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    """float64 in [-1, 1), the same bits everywhere: a linear congruential generator with xor shifts, modulo 2^31."""
    x = torch.arange(prod(shape), dtype=torch.int64) + 1_000_003 * (seed + 1)
    for _ in range(4):
        x = (x * 1_103_515_245 + 12_345) % 2**31
        x = x ^ (x >> 15)
    return (x.double() / 2**30 - 1.0).reshape(shape)


@dataclass(frozen=True)
class Problem:
    """L = 1/2 sum of l_i r_j (W - target)_ij^2 with fresh noise every step; l and r separate the singular values."""

    shapes: dict[str, tuple[int, ...]]
    rank: int
    seed: int
    noise: float = 0.2

    def parameters(self) -> dict[str, Parameter]:
        """Initial weights, uniform in [-1, 1)."""
        return {k: Parameter(uniform(s, self.seed + i).float()) for i, (k, s) in enumerate(self.shapes.items())}

    def gradient(self, name: str, weight: Tensor, step: int) -> Tensor:
        """Gradient of `weight` (any float dtype) in step `step` = 1, 2, ...; computed in float64."""
        place, shape = list(self.shapes).index(name), self.shapes[name]
        target = 2.0 * uniform(shape, self.seed + 100 + place)
        grad = weight.detach().double() - target + self.noise * uniform(shape, self.seed + 1000 * step + place)
        for dim, size in enumerate(shape):
            decay = torch.exp(-4.0 * torch.arange(size, dtype=torch.float64) / size)
            grad = grad * decay.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        return grad.to(weight.dtype)

    def groups(self, params: dict[str, Parameter], proj_type: str, **keys: Any) -> list[dict[str, Any]]:
        """[full-rank group, projected group] with the four published keys, plus `keys` in both groups."""
        matrices = [p for name, p in params.items() if name != FULL_RANK]
        galore = {"rank": self.rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": proj_type}
        return [{"params": [params[FULL_RANK]], **keys}, {"params": matrices, **galore, **keys}]

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Where each parameter lies in a snapshot."""
        start = 0
        for name, shape in self.shapes.items():
            yield name, slice(start, start + prod(shape))
            start += prod(shape)

    def restore(self, params: dict[str, Parameter], snapshot: Tensor) -> None:
        """Write a snapshot into the parameters."""
        with torch.no_grad():
            for name, part in self.slices():
                params[name].copy_(snapshot[part].reshape(self.shapes[name]))

    def svd_signs(self, snapshot: Tensor, step: int) -> Tensor:
        """Signs (int8) that LAPACK gives the leading singular vectors of each matrix's gradient at these weights."""
        signs = []
        for name, part in self.slices():
            if len(self.shapes[name]) == 2:
                grad = self.gradient(name, snapshot[part].reshape(self.shapes[name]), step)
                u = torch.linalg.svd(grad, full_matrices=False).U[:, : self.rank]
                signs.append(u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0])
        return torch.cat(signs).to(torch.int8)

    def train(self, step: Callable[[], Any], params: dict[str, Parameter], steps: Iterable[int]) -> Snapshots:
        """Run the given steps (1-based numbers); the weights after each, flat, in float32, in memory of their own."""
        weights = {}
        for number in steps:
            for name, p in params.items():
                p.grad = self.gradient(name, p, number)
            step()
            weights[number] = torch.cat([p.detach().float().reshape(-1) for p in params.values()])
        return weights


SMALL = Problem({"tall": (14, 9), "wide": (9, 14), "square": (10, 10), FULL_RANK: (7,)}, rank=3, seed=115)

# For 8-bit states: low-rank gradients of 4096 elements, the smallest that bitsandbytes quantises; and one it does not.
LARGE = Problem({"tall": (1024, 8), "wide": (8, 1024), "small": (14, 9), FULL_RANK: (7,)}, rank=4, seed=46)


@dataclass(frozen=True)
class Case:
    """One trajectory of one published optimizer on SMALL."""

    optimizer: str  # AdamW or Adafactor
    proj_type: str
    variant: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.optimizer.lower(), self.proj_type, self.variant]))

    @property
    def kwargs(self) -> dict[str, Any]:
        """Constructor arguments that the published class and ours have in common."""
        if self.optimizer == "AdamW":
            common: dict[str, Any] = {"lr": 0.1, "no_deprecation_warning": True}
        else:
            common = {"lr": 0.1, "scale_parameter": False, "relative_step": False}
        return {**common, "weight_decay": 0.1, **self.settings}


# With proj_type full the first low-rank gradient of a basis is diagonal, and Adam divides the rounding errors off the
# diagonal by their own size plus eps: with eps = 1e-6 the last bit of a GEMM would move weights by 1e-4.
FULL: dict[str, dict[str, Any]] = {"AdamW": {"eps": 1e-3}, "Adafactor": {}}

CASES = [
    Case(optimizer, proj_type, settings=FULL[optimizer] if proj_type == "full" else {})
    for optimizer in ("AdamW", "Adafactor")
    for proj_type in PROJ_TYPES
] + [
    Case("AdamW", "std", "eps", {"eps": 1e-2}),  # large enough to see whether eps is added before the bias correction
    Case("AdamW", "std", "uncorrected", {"correct_bias": False, "lr": 0.02}),
    Case("Adafactor", "std", "scale_parameter", {"scale_parameter": True}),
    Case("Adafactor", "std", "relative_step", {"lr": None, "scale_parameter": True, "relative_step": True}),
    Case("Adafactor", "std", "beta1", {"beta1": 0.9}),
]

# Cases whose state dict is saved after SAVED_AT steps, as legacy/NAME.pt
LEGACY = [c for c in CASES if not c.variant or c.variant == "beta1"]

LARGE_KWARGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
LARGE_DECAY = 0.1  # of the projected group; the other has none, for bitsandbytes' kernels do not agree on its order
