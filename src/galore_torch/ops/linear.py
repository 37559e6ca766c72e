"""Ops: the two products of a linear layer that leave its weight's gradient aside."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_torch.ops.int8_weight import Int8Weight, product


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + b (..., m) of x (..., n), or x W + b where ``transposed``, as in GPT-2's Conv1D.

    Made as the plain layer makes it, autocast included.
    """
    if not transposed:
        return torch.nn.functional.linear(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    assert bias is not None
    return torch.addmm(bias, flat, weight).view(*input.shape[:-1], weight.shape[-1])


def input_grad(grad: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """dx (..., n) of dy (..., m), in the dtype of dy."""
    if isinstance(weight, Int8Weight):
        return product(grad, weight, not transposed)
    weight = weight.detach().to(grad.dtype)
    return grad @ (weight.mT if transposed else weight)
