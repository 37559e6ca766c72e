"""`direct_backward` for the experts of a mixture, whose weights are one parameter (E x m x n) that no linear layer owns.

While the module that holds it computes, the products of its matrices are watched: `F.linear`, `@`, `bmm` and grouped products of one
expert or of all. Each becomes one whose backward pass makes R of the experts that it used, and not their gradients. Where a basis is due,
or where the tensors are not as expected, the product is an ordinary one, and its full gradient is projected.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from galore_torch.engine import step as engine
from galore_torch.engine.layout import ParamView
from galore_torch.engine.refresh import gap_is_over
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.base import LowRankOptimizer, without_autocast
from galore_torch.optim.direct_backward import Finish
from galore_torch.optim.direct_pass import Pass, at_end, changed_basis, differentiable_once, end_pass, in_graph, is_named, runs
from galore_torch.optim.swapped_class import SwappedClass, restore_class, swap_class

Segments = Sequence[tuple[int, slice]]  # expert, and which of the tokens are its
_GROUPED = {getattr(home, name) for home, name in ((nn.functional, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(home, name)}
_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.bmm),
    *(torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__),
}


class DirectExperts:
    """The experts' parameter and its optimizer. ``finish(p, low, None)`` takes the R that a pass has made."""

    def __init__(self, name: str, module: nn.Module, weight: Tensor, optimizer: LowRankOptimizer, finish: Finish):
        self.name, self.weight, self.finish = name, weight, finish
        self.layout = engine.layout_of(weight, optimizer.group_of(weight))
        self.has_warned = False
        self._optimizer = weakref.ref(optimizer)
        self._passes: dict[int, Pass] = {}  # by autograd's number of the backward pass: one that failed never ends
        self._whole_step = -1  # the step whose products are ordinary ones: recomputed forward passes must do as the first one did
        self._plain_step = -1  # the last step in which one was
        self.trigger = torch.zeros((), requires_grad=True)
        self.trigger.register_post_accumulate_grad_hook(_Arrival(weakref.ref(self)))
        self._node: Any = get_gradient_edge(self.trigger).node
        self._module = weakref.ref(module)
        _attach(module, self)

    def remove(self) -> None:
        """The module is an ordinary one again, once all of its parameters are."""
        if (module := self._module()) is not None:
            _detach(module, self)

    def is_wanted(self) -> bool:
        """Whether the backward pass under way runs through a product whose R is made."""
        return runs(self._node)

    def begins(self) -> bool:
        """Whether R is to be made in a product's backward pass; where the pass names the weight, it is handed on when that ends."""
        if self.is_wanted():
            return True
        if not is_named(self.weight):
            return False
        number = torch._C._current_graph_task_id()
        if number not in self._passes:
            at_end(lambda: self.arrived(number))
        return True

    def takes_plain(self) -> bool:
        """Whether an ordinary gradient of the weight is as it should be: where a product of this step was an ordinary one."""
        optimizer = self._optimizer()
        return optimizer is not None and bool(optimizer.view_of(self.weight).state["step"] == self._plain_step)

    def check_basis(self, view: ParamView) -> None:
        """Raise RuntimeError where the bases are others by now than in the forward pass, whose ``view`` it is.

        Loading makes another state. A refresh replaces bases in use only after a step, which has changed the weight too: that is an error
        of autograd's. What it gives to experts without a basis leaves those of the others, so the tensor's version says nothing.
        """
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.view_of(self.weight).state is not view.state:
            raise changed_basis(self.name)

    def view(self, segments: Segments) -> ParamView | None:
        """The parameter as the engine sees it; None where the product of these experts is to be an ordinary one."""
        optimizer = self._optimizer()
        if optimizer is None or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return None
        view = optimizer.view_of(self.weight)
        state = view.state
        ready = all(state["basis_ready"][expert] for expert, _ in segments)
        if gap_is_over(state, view.group):
            self._whole_step = state["step"]
        if self._whole_step == state["step"] or not ready or torch._C._are_functorch_transforms_active():
            self._plain_step = state["step"]
            return None
        return view

    def add(self, view: ParamView, expert: int, low: Tensor) -> None:
        """Add to R of the backward pass under way."""
        this = self._passes.setdefault(torch._C._current_graph_task_id(), Pass(view.state["step"]))
        if this.low is None:
            this.low = torch.zeros(view.layout.low_shape, dtype=view.layout.compute_dtype, device=low.device)
        this.low[expert] += low

    def arrived(self, number: int | None = None) -> None:
        """All products of this backward pass have been seen. ``number``: which pass, where it does not run any more."""
        this = end_pass(self._passes, number)
        if self._optimizer() is not None and this.low is not None:
            self.finish(self.weight, this.low, None)


class _Arrival:
    def __init__(self, layer: Callable[[], DirectExperts | None]):
        self.layer = layer

    def __call__(self, trigger: Tensor) -> None:
        trigger.grad = None
        if (layer := self.layer()) is not None:
            layer.arrived()


class _Products(torch.autograd.Function):
    """y = x W_e^T, or x W_e where ``transposed``, of some experts, each with tokens (rows of x) of its own."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, trigger: Tensor, layer: DirectExperts, view: ParamView, how: tuple[Any, Segments, bool]
    ) -> Tensor:
        product, segments, transposed = how
        out: Tensor = product()
        flat = input.reshape(-1, input.shape[-1]).to(out.dtype)
        axis = -2 if transposed else -1
        if axis in view.layout.ranks:
            with without_autocast([input]):
                flat = torch.cat([engine.project_factor(_one(view, expert), flat[rows], axis) for expert, rows in segments])
        ctx.save_for_backward(flat, weight)
        ctx.layer, ctx.view, ctx.segments, ctx.transposed = layer, view, segments, transposed
        ctx.shape, ctx.dtype = input.shape, input.dtype
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        back = grad.new_empty((grad.shape[0], weight.shape[-2 if ctx.transposed else -1]))
        other = -1 if ctx.transposed else -2
        ctx.layer.check_basis(ctx.view)
        begins = ctx.layer.begins()
        with without_autocast([kept]):
            for expert, rows in ctx.segments:
                W = weight[expert].to(grad.dtype)
                torch.mm(grad[rows], W.mT if ctx.transposed else W, out=back[rows])
                if not begins:
                    continue
                factor = engine.project_factor(_one(ctx.view, expert), grad[rows], other)
                low = OuterProduct(kept[rows], factor) if ctx.transposed else OuterProduct(factor, kept[rows])
                ctx.layer.add(ctx.view, expert, low.dense())
        return back.to(ctx.dtype).reshape(ctx.shape), None, grad.new_zeros((), dtype=torch.float32, device="cpu"), None, None, None


def _one(view: ParamView, expert: int) -> ParamView:
    """One matrix of the batch, as far as its basis goes."""
    keys = [key for stored in view.layout.bases.values() for key in stored.keys]
    return replace(view, state={key: view.state[key][expert] for key in keys}, layout=view.layout.one)


class _Watch(TorchFunctionMode):
    """Exchanges the products of some parameters' matrices."""

    def __init__(self, layers: list[DirectExperts]):
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            named = ("input", "weight", "bias")[len(args) :]
            input, weight, bias = tuple(args) + tuple(kwargs.get(key) for key in named)
            out = self.product(input, weight, True, None, lambda: func(input, weight))
            if out is not None:
                return out if bias is None else out + bias
        elif _is_product(func, args, kwargs):
            out = self.product(args[0], args[1], False, kwargs.get("offs"), lambda: func(*args, **kwargs))
            if out is not None:
                return out
        return func(*args, **kwargs)

    def product(self, input: Any, weight: Any, linear: bool, offsets: Tensor | None, plain: Callable[[], Tensor]) -> Tensor | None:
        """The product as `_Products`; None where it is none of these experts', or has to be an ordinary one."""
        if not isinstance(weight, Tensor) or not isinstance(input, Tensor):
            return None
        for layer in self.layers:
            p = layer.weight
            if weight is not p and not _is_view(weight, p):
                continue
            size, strides = p.shape[-2:], p.stride()[-2:]
            if (weight.shape[-2:], weight.stride()[-2:]) == (size, strides):
                flipped = False
            elif (weight.shape[-2:], weight.stride()[-2:]) == (size[::-1], strides[::-1]):
                flipped = True
            else:
                return None
            segments = _segments(p, input, weight, offsets)
            view = layer.view(segments) if segments is not None else None
            if segments is None or view is None:
                return None
            how = plain, segments, linear == flipped  # y = x W_e^T is linear of W_e, and a product with W_e^T
            out: Tensor = _Products.apply(input, in_graph(layer), layer.trigger, layer, view, how)  # type: ignore[no-untyped-call]
            return out
        return None


def _is_product(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is a product of two tensors, one matrix or batch each, or of groups of rows with ``offs``."""
    if len(args) != 2:
        return False
    if func in _PRODUCTS:
        return not kwargs
    given = {key for key, value in kwargs.items() if value is not None}
    return given == {"offs"} and (func in _GROUPED or str(func) == "transformers.grouped_mm_fallback")


def _is_view(weight: Tensor, p: Tensor) -> bool:
    """Whether it is a view of p whose gradient is p's: one that was made under `no_grad` is a leaf of its own."""
    node = weight.grad_fn if weight._base is p else None
    while node is not None and node.next_functions:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None) is p


def _segments(p: Tensor, input: Tensor, weight: Tensor, offsets: Tensor | None) -> Segments | None:
    """Which rows of the flattened input meet which expert; None where that is not plain."""
    experts = _experts(p, weight)
    if not experts:
        return None
    rows = input.numel() // max(1, input.shape[-1])
    if offsets is not None:
        if not offsets.is_cpu or weight.dim() != 3 or input.dim() != 2 or len(offsets) != len(experts):
            return None
        ends = [int(end) for end in offsets.unbind()]
    else:
        if len(experts) > 1 and (input.dim() != 3 or len(input) != len(experts)):  # one expert takes all tokens there are
            return None
        ends = [rows // len(experts) * (i + 1) for i in range(len(experts))]
    if ends[-1] != rows:
        return None
    return [(expert, slice(start, end)) for expert, start, end in zip(experts, [0, *ends], ends, strict=False)]


def _experts(p: Tensor, weight: Tensor) -> list[int]:
    """Which expert each matrix of a view is, by where it begins in memory: a slice, or one expert expanded; empty where one is none."""
    first, stride = weight.storage_offset() - p.storage_offset(), p.stride(0)
    starts = [first] if weight.dim() == 2 else [first + i * weight.stride(0) for i in range(weight.shape[0])]
    whole = all(start % stride == 0 and 0 <= start // stride < p.shape[0] for start in starts)
    return [int(start // stride) for start in starts] if whole and weight.dim() <= 3 else []


class _DirectExpertsForward(SwappedClass):
    """What the class of a module with experts becomes."""

    _direct_experts: list[DirectExperts]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._plain.forward(self, *args, **kwargs)
        with _Watch(self._direct_experts):
            return self._plain.forward(self, *args, **kwargs)


def _attach(module: nn.Module, layer: DirectExperts) -> None:
    """Watch the products of one more parameter of the module."""
    if not isinstance(module, SwappedClass):
        swap_class(module, _DirectExpertsForward, experts=[])
    module._direct_experts.append(layer)  # type: ignore[union-attr,operator]


def _detach(module: nn.Module, layer: DirectExperts) -> None:
    """Undo `_attach`."""
    layers: Any = vars(module).get("_direct_experts", [])
    if layer in layers:
        layers.remove(layer)
        if not layers:
            restore_class(module)
