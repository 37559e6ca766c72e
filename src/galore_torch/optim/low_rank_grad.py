"""Faces: what ``p.grad`` holds after a fused backward pass. Two tensors of the parameter's shape that own no storage of it.

Standing in ``p.grad`` lets ordinary code work unchanged: autograd adds further micro-batches, `clip_grad_norm_` measures and
scales, `zero_grad` clears. What a low-rank gradient cannot answer raises an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class _StandIn(torch.Tensor):
    """A tensor with the shape, dtype and device of a parameter, and no data."""

    @staticmethod
    def __new__(cls, like: Tensor, *args: Any, **kwargs: Any) -> _StandIn:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


class LowRankGrad(_StandIn):
    """The gradient R = basis^T G of a parameter, accumulated over micro-batches.

    ``low``: R in fp32 or fp64, shape r x n, m x r or r x r. ``project(grad, first)``: maps a full gradient into the same basis.
    ``empty``: zeroed, so that the next gradient is the first of its step and may refresh the basis.
    Its norm is the norm of R, at most that of G: the length of the part the optimizer uses.
    """

    def __init__(self, like: Tensor, low: Tensor, project: Callable[[Tensor, bool], Tensor], empty: bool = False):
        self.low, self.project, self.empty = low, project, empty
        self._like = like

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grad, *rest = args
        kwargs = kwargs or {}
        if func is aten.detach.default or func is aten.alias.default:
            return LowRankGrad(grad._like, grad.low, grad.project, grad.empty)
        if func is aten.clone.default:
            return LowRankGrad(grad._like, grad.low.clone(), grad.project, grad.empty)
        adds = func in (aten.add_.Tensor, aten.add.Tensor) and not kwargs and isinstance(grad, LowRankGrad)
        if adds and isinstance(rest[0], Tensor):
            more = rest[0].low if isinstance(rest[0], LowRankGrad) else grad.project(rest[0], grad.empty)
            grad.empty = False
            low = grad.low.add_(more) if func is aten.add_.Tensor else grad.low + more
            return grad if func is aten.add_.Tensor else LowRankGrad(grad._like, low, grad.project)
        if func in (aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.zero_.default):
            func(grad.low, *rest)
            grad.empty = grad.empty or func is aten.zero_.default
            return grad
        if func in (aten.linalg_vector_norm.default, aten.norm.Scalar) and (rest[0] if rest else 2) == 2 and len(rest) < 2:
            return torch.linalg.vector_norm(grad.low).to(kwargs.get("dtype") or grad.dtype)
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            return func([g.low if isinstance(g, LowRankGrad) else g for g in grad], *rest)
        raise NotImplementedError(
            f"{func} is not defined on a low-rank gradient: after a fused backward pass p.grad can be accumulated, scaled, zeroed and "
            "measured in the 2-norm. Read p.grad.low, or train without fused_backward to see full gradients"
        )


class ConsumedGrad(_StandIn):
    """The mark of a gradient that has already updated its weight inside the backward pass: every use is an error."""

    def __init__(self, like: Tensor):
        self._like = like

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default or func is aten.alias.default:
            return ConsumedGrad(args[0]._like)
        if func is aten.zero_.default:
            return args[0]
        raise RuntimeError(
            "this gradient was consumed inside the backward pass (fused_backward mode='update'), so it cannot be accumulated, clipped "
            "or read. Call optimizer.step() or zero_grad() between backward passes; for gradient accumulation or global clipping "
            "use mode='project'"
        )
