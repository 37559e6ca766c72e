"""`direct_backward` for layers that torch.compile follows: what depends on the step is hidden from the compiler in two operators.

A graph is made once and serves every step, so whether a basis is due cannot be part of it. `keep` projects a layer's input; where the
basis is due it also puts the whole input aside, under a ticket that the backward pass hands to `reduce`.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galore_torch.engine.layout import ParamView
from galore_torch.ops.linear import input_grad, linear


class Layer(Protocol):
    """`direct_backward.DirectLayer`, as far as it is used here."""

    kept: dict[int, Tensor]

    def view(self) -> ParamView | None: ...
    def is_whole(self, view: ParamView) -> bool: ...
    def basis_version(self, view: ParamView) -> int: ...
    def check_basis(self, version: int) -> None: ...
    def keep(self, view: ParamView, input: Tensor) -> tuple[Tensor, bool]: ...
    def reduce(self, view: ParamView, output_grad: Tensor, kept: Tensor, projected: bool) -> Tensor: ...


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_KEYS, _TICKETS = itertools.count(), itertools.count()


def register(layer: Layer) -> Tensor:
    """The number of a layer, as the tensor that graphs carry: layers of one shape share a graph."""
    key = next(_KEYS)
    _LAYERS[key] = layer
    return torch.tensor(key, device="cpu")


def _seen(key: Tensor) -> tuple[Layer, ParamView]:
    layer = _LAYERS.get(int(key))
    view = None if layer is None else layer.view()
    if layer is None or view is None:
        raise RuntimeError(
            "a compiled layer runs after the optimizer that its backward pass belongs to is gone: keep the optimizer for as long as the "
            "model trains, or call remove() on what fused_backward returned, which compiles the layer anew"
        )
    return layer, view


@torch.library.custom_op("galore_torch::keep", mutates_args=())
def _keep(input: Tensor, key: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x (T x n) on the basis of its axis (T x width), and a ticket: of the whole x where the basis is due, else -1 - the basis's version.

    The whole x is freed with its ticket.
    """
    layer, view = _seen(key)
    kept, projected = layer.keep(view, input)
    if projected:
        return kept.contiguous(), torch.tensor(-1 - layer.basis_version(view), device="cpu")
    number = next(_TICKETS)
    layer.kept[number] = input.clone()  # the compiler may write over the tensor itself
    ticket = torch.tensor(number, device="cpu")
    weakref.finalize(ticket.untyped_storage(), layer.kept.pop, number, None).atexit = False
    return input.new_empty(input.shape[0], width), ticket


@_keep.register_fake
def _(input: Tensor, key: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape[0], width), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("galore_torch::reduce", mutates_args=())
def _reduce(grad: Tensor, kept: Tensor, ticket: Tensor, key: Tensor, probe: Tensor, projects: bool) -> Tensor:
    """R from dy (T x m) and what `_keep` returned, or x itself where the input's axis is not projected (``projects`` is False)."""
    layer, view = _seen(key)
    whole = layer.kept.get(int(ticket)) if projects else kept
    if int(ticket) < 0 and projects:
        layer.check_basis(-1 - int(ticket))
        return layer.reduce(view, grad, kept, True).contiguous()
    if whole is None:
        raise RuntimeError("the input of a compiled layer was freed before its backward pass: train without hooks that move saved tensors")
    if layer.is_whole(view):
        grad, whole = grad.clone(), whole.clone() if whole is kept else whole
    return layer.reduce(view, grad, whole, False).contiguous()


@_reduce.register_fake
def _(grad: Tensor, kept: Tensor, ticket: Tensor, key: Tensor, probe: Tensor, projects: bool) -> Tensor:
    return probe.new_empty(probe.shape)


class _CompiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor, key: Tensor, width: int, transposed: bool
    ) -> Tensor:
        out = linear(input, weight, bias, transposed)
        kept, ticket = input.to(out.dtype), key
        if width:
            kept, ticket = torch.ops.galore_torch.keep(kept, key, width)
        ctx.save_for_backward(kept, ticket, key, probe, weight)
        ctx.width, ctx.transposed, ctx.bias = width, transposed, None if bias is None else bias.dtype
        ctx.dtype = input.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, ticket, key, probe, weight = ctx.saved_tensors
        back = input_grad(grad, weight, ctx.transposed).to(ctx.dtype)
        of_bias = None if ctx.bias is None else grad.sum(0).to(ctx.bias)
        low = torch.ops.galore_torch.reduce(grad, kept, ticket, key, probe, ctx.width > 0)
        return back, None, of_bias, low, None, None, None


def compiled_linear(input: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor, key: Tensor, width: int, transposed: bool) -> Tensor:
    """y = x W^T + b, or x W + b where ``transposed``; x: T x n. ``width``: the rank of the input's axis, 0 where that is not projected."""
    out: Tensor = _CompiledLinear.apply(input, weight, bias, probe, key, width, transposed)  # type: ignore[no-untyped-call]
    return out
