"""What ``p.grad`` holds after a fused backward pass. Two tensors of the parameter's shape that own no storage of it.

Standing in ``p.grad`` lets ordinary code work unchanged: autograd adds further micro-batches, `clip_grad_norm_` measures and scales,
`zero_grad` clears, `Module.to` converts. What a low-rank gradient cannot answer raises an error that says so. A stand-in knows the
optimizer that made it, by a weak reference, and holds nothing else alive: no parameter, no optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from galore_torch.engine.layout import ParamView

aten = torch.ops.aten
Owner = Callable[[], Any]  # a weak reference to the optimizer
_VIEWS = (aten.detach.default, aten.alias.default)
_IN_PLACE = {  # of one tensor, and of a list of them
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
    aten.zero_.default,
    aten._foreach_mul_.Tensor,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.ScalarList,
    aten._foreach_div_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.ScalarList,
    aten._foreach_zero_.default,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}
_ZERO = (aten.zero_.default, aten._foreach_zero_.default)
_NORMS = (aten.linalg_vector_norm.default, aten.norm.Scalar, aten._foreach_norm.Scalar)


def _is_view(func: Any, args: Any) -> bool:
    """Whether the call gives the same tensor again, as `DTensor.to_local` asks for it by its own shape."""
    return func in _VIEWS or (func is aten.view.default and tuple(args[1]) == tuple(args[0].shape))


class _StandIn(torch.Tensor):
    """A tensor with the shape, dtype and device of a parameter, and no data."""

    owner: Owner

    @staticmethod
    def __new__(cls, like: Tensor, *args: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> _StandIn:
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=device or like.device
        )

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def check_owner(self, optimizer: object) -> None:
        """Raise ValueError unless ``optimizer`` made this gradient."""
        if (owner := self.owner()) is not optimizer:
            whose = "an optimizer that is gone" if owner is None else f"another {type(owner).__name__}"
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(self.shape)} was made inside the backward pass for {whose}, whose basis this "
                "optimizer does not have: call remove() on what fused_backward returned for it, then zero_grad(), before another optimizer "
                "steps on these parameters"
            )


class LowRankGrad(_StandIn):
    """The gradient R = basis^T G of a parameter, accumulated over micro-batches.

    ``low``: R in fp32 or fp64, shape r x n, m x r or r x r. ``project(grad, first)``: maps a full gradient into the same basis.
    ``empty``: zeroed, so that the next gradient is the first of its step and may refresh the basis. ``has_dense``: whether autograd has
    added a full gradient to it, which was projected.
    Its norm is the norm of R, at most that of G: the length of the part the optimizer uses.
    """

    def __init__(
        self, like: Tensor, low: Tensor, owner: Owner, project: Callable[[Tensor, bool], Tensor], empty: bool = False, **_: Any
    ) -> None:
        self.low, self.owner, self.project, self.empty = low, owner, project, empty
        self.has_dense = False

    def _with(self, low: Tensor, empty: bool, **kind: Any) -> LowRankGrad:
        return LowRankGrad(self, low, self.owner, self.project, empty, **kind)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grad, *rest = args
        kwargs = kwargs or {}
        if _is_view(func, args):
            return grad._with(grad.low, grad.empty)
        if func is aten.clone.default:
            return grad._with(grad.low.clone(), grad.empty)
        if func is aten._to_copy.default:  # R keeps its own dtype: it is fp32 whatever the parameter's is
            where = {key: kwargs[key] for key in ("device", "non_blocking") if kwargs.get(key) is not None}
            kind = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
            return grad._with(aten._to_copy.default(grad.low, **where), grad.empty, **kind)
        adds = func in (aten.add_.Tensor, aten.add.Tensor) and not kwargs and isinstance(grad, LowRankGrad)
        if adds and isinstance(rest[0], Tensor):
            more = rest[0].low if isinstance(rest[0], LowRankGrad) else grad.project(rest[0], grad.empty)
            grad.has_dense = grad.has_dense or not isinstance(rest[0], LowRankGrad)
            grad.empty = False
            low = grad.low.add_(more) if func is aten.add_.Tensor else grad.low + more
            return grad if func is aten.add_.Tensor else grad._with(low, False)
        if func in _IN_PLACE:
            func(_low_of(grad), *rest, **kwargs)
            for each in grad if isinstance(grad, list | tuple) else (grad,):
                if isinstance(each, LowRankGrad) and func in _ZERO:
                    each.empty = True
            return None if isinstance(grad, list | tuple) else grad
        if func in _NORMS and (rest[0] if rest else 2) == 2 and len(rest) < 2:
            norms = func(_low_of(grad), 2)
            if isinstance(grad, list | tuple):
                return [norm.to(kwargs.get("dtype") or each.dtype) for norm, each in zip(norms, grad, strict=True)]
            return norms.to(kwargs.get("dtype") or grad.dtype)
        raise NotImplementedError(
            f"{func} is not defined on a low-rank gradient: after a fused backward pass p.grad can be accumulated, scaled, zeroed, "
            "converted and measured in the 2-norm. Read p.grad.low, or train without fused_backward: remove() on what it returned "
            "ends it, and other optimizers then see full gradients"
        )


def _low_of(grads: Any) -> Any:
    """The same nest with R in the place of each low-rank gradient."""
    if isinstance(grads, list | tuple):
        return [_low_of(grad) for grad in grads]
    return grads.low if isinstance(grads, LowRankGrad) else grads


class ConsumedGrad(_StandIn):
    """The mark of a gradient that has already updated its weight inside the backward pass: every use is an error."""

    def __init__(self, like: Tensor, owner: Owner, **_: Any) -> None:
        self.owner = owner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grad, kwargs = args[0], kwargs or {}
        if _is_view(func, args):
            return ConsumedGrad(grad, grad.owner)
        if func is aten._to_copy.default:
            return ConsumedGrad(grad, grad.owner, **{key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None})
        if func in _ZERO:
            if func is aten._foreach_zero_.default and (others := [each for each in grad if not isinstance(each, ConsumedGrad)]):
                func(others)
            return None if func is aten._foreach_zero_.default else grad
        ConsumedGrad.refuse()

    @staticmethod
    def refuse() -> NoReturn:
        """Raise RuntimeError: what any use of it is."""
        raise RuntimeError(
            "this gradient was consumed inside the backward pass (fused_backward mode='update' or 'direct_update'), so it cannot be "
            "accumulated, clipped or read, nor used by another optimizer. Call optimizer.step() or zero_grad() between backward passes. "
            "For gradient accumulation or clipping use mode='project' or 'direct'; remove() on what fused_backward returned ends it"
        )


def owner_of(optimizer: object) -> Owner:
    """What a stand-in remembers of the optimizer that makes it."""
    return weakref.ref(optimizer)


def dtype_of_grad(p: Tensor) -> torch.dtype:
    """What autograd has ``p.grad`` in: the weight's dtype, unless ``p.grad_dtype`` says otherwise."""
    return getattr(p, "grad_dtype", None) or p.dtype


def in_place_of(view: ParamView, stand_in: Tensor) -> Tensor:
    """What stands in for this process' part of a gradient, as the gradient does: in a DTensor where the parameter is one.

    Along a projected axis that is cut, R is the sum over its processes, and each has all of it.
    """
    if view.place is None:
        return stand_in
    summed = {cut.dim for cut in view.layout.cuts if cut.axis - len(view.layout.view) in view.layout.ranks}
    return view.place.wrap(stand_in, view.place.shape, {dim: dim for dim in range(len(view.place.shape)) if dim not in summed})
