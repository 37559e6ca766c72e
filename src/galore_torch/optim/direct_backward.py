"""The low-rank gradient of a linear layer, made inside its backward pass without the gradient itself.

For y = x W^T the weight's gradient is G = dy^T x, so R = G Q = dy^T (x Q) and P^T G = (dy P)^T x: thin products alone, and with the basis
on the input's side x Q (tokens x rank) is kept for the backward pass in place of x. R is the gradient of a probe, a parameter of R's
shape that is zero and holds no memory; autograd adds up its gradients, and a hook hands their sum to the optimizer.
A layer whose basis is due for a refresh keeps x whole in that step, and finds the basis from x and dy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from galore_torch.engine import step as engine
from galore_torch.engine.layout import ParamView
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.ops.int8_weight import check_unwritten
from galore_torch.ops.linear import input_grad, linear
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.base import LowRankOptimizer, without_autocast
from galore_torch.optim.direct_compiled import compiled_linear, register
from galore_torch.optim.swapped_class import SwappedClass, plain_class, restore_class, swap_class


class DirectLayer:
    """What the layer of one weight knows of its optimizer. ``finish(p)`` is called when a pass's low-rank gradient is in ``p.grad``."""

    def __init__(self, name: str, module: nn.Module, optimizer: LowRankOptimizer, finish: Callable[[Tensor], None]):
        weight: Any = module.weight
        self.name, self.weight, self.finish = name, weight, finish
        self.transposed = _is_conv1d(module)
        self.input_axis = -2 if self.transposed else -1
        self._optimizer = weakref.ref(optimizer)
        self._module = weakref.ref(module)
        self._terms: list[OuterProduct] = []  # the factors of this pass whose basis is due
        self._reduced = False  # whether this pass has made a part of R in the basis as it is
        self._whole_step = -1  # the step in which the input is kept whole: recomputed forward passes must do as the first one did
        self.kept: dict[int, Tensor] = {}  # of compiled layers: inputs that are kept whole, by ticket
        self.probe = self.new_probe()
        width = self.seen().layout.ranks.get(self.input_axis, 0)
        own = {"layer": self, "key": register(self), "probe": self.probe, "form": (width, self.transposed)}
        swap_class(module, _DirectForward, **own)

    def new_probe(self) -> Tensor:
        """The leaf whose gradient is R, on the weight's device: one zero, seen in R's shape."""
        layout = self.seen().layout
        probe = torch.zeros((), dtype=layout.compute_dtype, device=self.weight.device).expand(layout.low_shape).requires_grad_()
        probe.register_post_accumulate_grad_hook(_Arrival(weakref.ref(self)))
        return probe

    def seen(self) -> ParamView:
        """`view`, where it is needed."""
        view = self.view()
        if view is None:
            raise RuntimeError(
                f"the optimizer of layer {self.name} was freed between its forward and its backward pass: keep it for as long as its "
                "model trains, or call remove() on what fused_backward returned"
            )
        return view

    def remove(self) -> None:
        """The layer is an ordinary one again. A pass that is under way still reaches the optimizer."""
        if (module := self._module()) is not None:
            restore_class(module)

    def takes_plain(self) -> bool:
        """Whether an ordinary gradient of the weight is as it should be: it never is."""
        return False

    def view(self) -> ParamView | None:
        """The parameter as the engine sees it; None where the optimizer is gone."""
        optimizer = self._optimizer()
        return None if optimizer is None else optimizer.view_of(self.weight)

    def serves(self, weight: Tensor) -> bool:
        """Whether the layer's low-rank gradient is wanted: not where a caller has put another weight in, and not without gradients."""
        wanted = torch.is_grad_enabled() and weight is self.weight and weight.requires_grad
        return wanted and self._optimizer() is not None and not torch._C._are_functorch_transforms_active()

    def keep(self, view: ParamView, input: Tensor) -> tuple[Tensor, bool]:
        """What the backward pass needs of the input (T x n), and whether it is projected already."""
        if self.is_whole(view) or self.input_axis not in view.layout.ranks:
            return input, False
        with without_autocast([input]):
            return engine.project_factor(view, input, self.input_axis), True

    def is_whole(self, view: ParamView) -> bool:
        """Whether inputs are kept whole in this step, for the basis is due."""
        if refresh_is_due(view.state, view.group):
            self._whole_step = view.state["step"]
        return bool(self._whole_step == view.state["step"])

    @staticmethod
    def basis_version(view: ParamView) -> int:
        """Changes with the basis."""
        return sum(view.state[key]._version for stored in view.layout.bases.values() for key in stored.keys)

    def reduce(self, view: ParamView, output_grad: Tensor, kept: Tensor, projected: bool) -> Tensor:
        """R, the gradient of the probe: from dy (T x m) and what `keep` returned. Zero where the basis is due: `arrived` adds it."""
        with without_autocast([kept]):
            if self.is_whole(view) and not projected:
                self._terms.append(self._factors(output_grad, kept))
                return output_grad.new_zeros((), dtype=view.layout.compute_dtype).expand(view.layout.low_shape)
            self._reduced = True
            other = engine.project_factor(view, output_grad, -3 - self.input_axis)
            own = kept if projected else engine.project_factor(view, kept, self.input_axis)
            return self._factors(other, own).dense().to(view.layout.compute_dtype)

    def _factors(self, output_grad: Tensor, input: Tensor) -> OuterProduct:
        return OuterProduct(input, output_grad) if self.transposed else OuterProduct(output_grad, input)

    def arrived(self, low: Tensor) -> None:
        """All that this backward pass adds to R is there."""
        terms, self._terms = self._terms, []
        reduced, self._reduced = self._reduced, False
        self.kept.clear()
        optimizer = self._optimizer()
        if optimizer is not None:
            total = OuterProduct.total(terms) if terms else None
            optimizer.add_low_rank(self.weight, low if reduced or not terms else None, total)
            self.finish(self.weight)


class _Arrival:
    """The hook of a probe, which holds its layer weakly."""

    def __init__(self, layer: Callable[[], DirectLayer | None]):
        self.layer = layer

    def __call__(self, probe: Tensor) -> None:
        low, probe.grad = probe.grad, None
        if (layer := self.layer()) is not None and low is not None:
            layer.arrived(low)


# --- layers ----------------------------------------------------------------------------------------------------------------


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, of transformers, which this package does not import: y = x W + b."""
    kind = plain_class(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes y = x W^T + b or y = x W + b, and nothing else."""
    return (type(module).forward is nn.Linear.forward or _is_conv1d(module)) and "forward" not in vars(module)


class _DirectForward(SwappedClass):
    """What a linear layer's class becomes: the same layer with another backward pass."""

    _direct_layer: DirectLayer
    _direct_key: Tensor
    _direct_probe: Tensor
    _direct_form: tuple[int, bool]  # the rank of the input's axis, 0 where that is not projected, and whether W is transposed

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        bias: Any = self.bias
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and weight.requires_grad:
                return compiled_linear(input, weight.detach(), bias, self._direct_probe, self._direct_key, *self._direct_form)
        elif (layer := self._direct_layer).serves(weight):
            if layer.probe.device != layer.weight.device:  # the model was moved
                self._direct_probe = layer.probe = layer.new_probe()
            out: Tensor = _Linear.apply(input, weight.detach(), bias, layer.probe, layer)  # type: ignore[no-untyped-call]
            return out
        plain: Tensor = self._plain.forward(self, input)
        return plain


class _Linear(torch.autograd.Function):
    """y = x W^T + b, whose weight has no gradient: the probe has R for its.

    The weight comes without its place in the graph, where even no gradient would call its hooks. It is not among the saved tensors, whose
    hooks, such as `save_on_cpu`, would copy it.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor, layer: DirectLayer) -> Tensor:
        out = linear(input, weight, bias, layer.transposed)
        ctx.view = view = layer.seen()
        kept, ctx.projected = layer.keep(view, input.detach().reshape(-1, input.shape[-1]).to(out.dtype))
        ctx.save_for_backward(kept)
        ctx.layer, ctx.weight_version, ctx.basis_version = layer, layer.weight._version, layer.basis_version(view)
        ctx.shape, ctx.dtypes = input.shape, (input.dtype, None if bias is None else bias.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,), layer, (dtype, bias_dtype) = ctx.saved_tensors, ctx.layer, ctx.dtypes
        check_unwritten(layer.weight, ctx.weight_version)
        if ctx.projected and layer.basis_version(ctx.view) != ctx.basis_version:
            raise RuntimeError(
                f"the basis of layer {layer.name} has changed between its forward and its backward pass: call backward() before "
                "zero_grad() and before another backward pass of the same step refreshes it"
            )
        back = input_grad(grad, layer.weight, layer.transposed).to(dtype) if ctx.needs_input_grad[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        of_bias = flat.sum(0).to(bias_dtype) if ctx.needs_input_grad[2] else None
        return back, None, of_bias, layer.reduce(ctx.view, flat, kept, ctx.projected), None
