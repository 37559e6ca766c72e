"""A backward pass that fails on its way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("as an out-of-memory error would")
