"""Small models with INT8 weights, and how the tests of Q-GaLore train them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.ops.int8_weight import Int8Weight

X = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))


def model(dtype: torch.dtype = torch.float32, quantized: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    m = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 6)).to(dtype)
    return g.quantize_linears(m, targets="all-linear") if quantized else m  # type: ignore[return-value]


def optimizer_of(m: nn.Module, **keys: Any) -> Any:
    return g.QGaLoreAdamW8bit(m.parameters(), **{"lr": 0.01, "rank": 3, "min_8bit_size": 0, "update_proj_gap": 4, **keys})


def loss(m: nn.Module, shift: float = 0.0) -> Tensor:
    return (m((X + shift).to(next(m.parameters()).dtype)) - 0.3).square().mean()


def train(m: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        loss(m, 0.1 * t).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(m: nn.Module) -> list[Tensor]:
    return [part for p in m.parameters() for part in (p.stored if isinstance(p, Int8Weight) else (p.detach(),))]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def layers(count: int = 20, size: int = 256) -> nn.Sequential:
    return g.quantize_linears(nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(count)]), targets="all-linear")
