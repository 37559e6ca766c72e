"""Optimizer checkpoints of 2.0.0 before its release, whose state said "turn" where it now says "index": how golden/beta.pt was made.

Run with the tree of commit 7f9fcd2: PYTHONPATH=src python tests/golden/beta.py tests/golden/beta.pt
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, QGaLoreAdamW8bit

CASES: dict[str, tuple[Any, dict[str, Any], torch.dtype]] = {
    "adamw": (GaLoreAdamW, {}, torch.float32),
    "adamw, both sides": (GaLoreAdamW, {"proj_type": "full"}, torch.float32),
    "adamw, bf16 weights": (GaLoreAdamW, {}, torch.bfloat16),
    "adamw8bit": (GaLoreAdamW8bit, {"min_8bit_size": 0}, torch.float32),
    "adaptive gap, int4 basis": (QGaLoreAdamW8bit, {"min_8bit_size": 0, "update_proj_gap": 2}, torch.float32),
    "adafactor": (GaLoreAdafactor, {}, torch.float32),
    "sgd": (GaLoreSGD, {"momentum": 0.9}, torch.float32),
}
SAVED, LATER = 5, 9  # steps before the checkpoint, and in all


def params(name: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(CASES[name][2])) for shape in ((24, 16), (16, 40), (24,))]


def make(name: str, weights: list[nn.Parameter]) -> Any:
    cls, settings, _ = CASES[name]
    return cls([{"params": weights[:2], "rank": 8, "update_proj_gap": 3, **settings}, {"params": weights[2:]}], lr=1e-2, compile=False)


def train(optimizer: Any, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def values(weights: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in weights]


def main(path: str) -> None:
    torch.set_num_threads(1)
    out = {}
    for name in CASES:
        weights = params(name)
        optimizer = make(name, weights)
        train(optimizer, weights, range(SAVED))
        saved = {"optimizer": copy.deepcopy(optimizer.state_dict()), "weights": values(weights)}
        train(optimizer, weights, range(SAVED, LATER))
        out[name] = saved | {"later": values(weights)}
    torch.save(out, path)


if __name__ == "__main__":
    main(sys.argv[1])
