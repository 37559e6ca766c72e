"""The low-rank gradient of a linear layer, made inside its backward pass without the gradient itself.

For y = x W^T the weight's gradient is G = dy^T x, so R = G Q = dy^T (x Q) and P^T G = (dy P)^T x: thin products alone, and with the basis
on the input's side x Q (tokens x rank) is kept for the backward pass in place of x. R is the gradient of a probe, a parameter of R's
shape that is zero and holds no memory; autograd adds up its gradients, and a hook hands their sum to the optimizer.
A layer whose basis is due for a refresh keeps x whole in that step, and finds the basis from x and dy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from galore_torch.engine import step as engine
from galore_torch.engine.layout import Layout, ParamView
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.engine.sharding import local
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.ops.int8_weight import check_unwritten
from galore_torch.ops.linear import input_grad, linear
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.base import LowRankOptimizer, without_autocast
from galore_torch.optim.direct_compiled import compiled_linear, register
from galore_torch.optim.direct_pass import F, Pass, at_end, changed_basis, differentiable_once, end_pass, in_graph, is_named, runs
from galore_torch.optim.swapped_class import SwappedClass, plain_class, restore_class, swap_class

Finish = Callable[[Tensor, "Tensor | None", "OuterProduct | SharedGradient | None"], None]


def _untraced(method: F) -> F:
    """A method that compiled autograd does not trace. Where nothing is traced, it costs nothing: `torch._disable_dynamo` does."""
    hidden = torch._disable_dynamo(method)

    @wraps(method)
    def call(*args: Any) -> Any:
        return (hidden if torch.compiler.is_compiling() else method)(*args)

    return cast(F, call)


class DirectLayer:
    """What the layer of one weight knows of its optimizer. ``finish(p, low, factors)`` takes what a pass has made: R, and the factors of a
    part whose basis is due."""

    def __init__(self, name: str, module: nn.Module, optimizer: LowRankOptimizer, finish: Finish):
        weight: Any = module.weight
        self.name, self.weight, self.finish = name, weight, finish
        self.layout = engine.layout_of(weight, optimizer.group_of(weight))  # that of the probe: a checkpoint may bring another
        self.transposed = _is_conv1d(module)
        self.input_axis = -2 if self.transposed else -1
        self.has_warned = False
        self._optimizer = weakref.ref(optimizer)
        self._module = weakref.ref(module)
        self._passes: dict[int, Pass] = {}  # by autograd's number of the backward pass: reentrant checkpoints nest passes
        self._whole_step = -1  # the step in which the input is kept whole: recomputed forward passes must do as the first one did
        self.kept: dict[int, Tensor] = {}  # of compiled layers: inputs that are kept whole, by ticket
        self._arrival: _Arrival | None = None
        self.probe: Tensor | None = self.new_probe()
        self._node: Any = get_gradient_edge(self.probe).node  # what adds up the probe's gradients; until `remove`
        width = self.layout.ranks.get(self.input_axis, 0)
        own = {"layer": self, "key": register(self), "probe": self.probe, "weight": weight, "form": (width, self.transposed)}
        swap_class(module, _DirectForward, **own)

    def new_probe(self) -> Tensor:
        """The leaf whose gradient is R, on the weight's device: one zero, seen in R's shape."""
        probe = self.zero(self.used_weight().device).requires_grad_()
        self._arrival = _Arrival(weakref.ref(self))
        probe.register_post_accumulate_grad_hook(self._arrival)
        return probe

    def zero(self, device: torch.device) -> Tensor:
        """A tensor of R's shape, of one element."""
        layout = self.layout.entire
        return torch.zeros((), dtype=layout.compute_dtype, device=device).expand(layout.low_shape)

    def used_weight(self) -> Tensor:
        """What products are made with."""
        return self.weight

    def in_graph(self) -> Tensor:
        """The weight as the forward pass takes it."""
        return in_graph(self)

    def version(self) -> int:
        """Changes with what the optimizer writes; `check` raises RuntimeError where it has changed."""
        return local(self.weight)._version

    def check(self, version: int) -> None:
        check_unwritten(local(self.weight), version)

    def deliver(self, low: Tensor | None, factors: OuterProduct | None) -> None:
        """Hand on what a backward pass has made."""
        self.finish(self.weight, low, factors)

    @_untraced  # compiled autograd took the view of one layer for another's
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
        """The layer is an ordinary one again. A pass that is under way still reaches the optimizer: its graph holds probe and hook."""
        if (module := self._module()) is not None:
            restore_class(module)
        if self._arrival is not None:
            self._arrival.layer, self._arrival, self.probe, self._node = (lambda: self), None, None, None

    def takes_plain(self) -> bool:
        """Whether an ordinary gradient of the weight is as it should be: it never is."""
        return False

    def view(self) -> ParamView | None:
        """The parameter as the engine sees it; None where the optimizer is gone."""
        optimizer = self._optimizer()
        return None if optimizer is None else optimizer.view_of(self.weight)

    def serves(self, weight: Tensor) -> bool:
        """Whether the layer's low-rank gradient is wanted: not where a caller has put another weight in, and not without gradients."""
        wanted = torch.is_grad_enabled() and self.is_own(weight) and weight.requires_grad and self.probe is not None
        return wanted and self._optimizer() is not None and not _is_transformed()

    def is_own(self, weight: Tensor) -> bool:
        """Whether what the module has for its weight is the one that the optimizer trains."""
        return weight is self.weight

    def move(self) -> Tensor:
        """The probe, on the device where the model has gone since."""
        assert self.probe is not None
        if self.probe.device != self.used_weight().device:
            self.probe = self.new_probe()
            self._node = get_gradient_edge(self.probe).node
        return self.probe

    def is_wanted(self) -> bool:
        """Whether the backward pass under way asks for R: `torch.autograd.grad` of something else runs through the layer too."""
        return self._node is None or runs(self._node)

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
        """Changes with the basis, and with the state that holds it; not negative."""
        versions = (view.state[key]._version for stored in view.layout.bases.values() for key in stored.keys)
        return hash((id(view.state), *versions)) & 0x3FFFFFFFFFFFFFFF

    @_untraced
    def check_basis(self, version: int) -> None:
        """Raise RuntimeError where the basis that an input is projected with is another one by now."""
        if self.basis_version(self.seen()) != version:
            raise changed_basis(self.name)

    @_untraced
    def reduce(self, view: ParamView, output_grad: Tensor, kept: Tensor, projected: bool) -> Tensor:
        """R, the gradient of the probe: from dy (T x m) and what `keep` returned. Zero where the basis is due: `arrived` adds it."""
        if not is_alike(view.layout, self.layout):
            raise changed_basis(self.name)
        zero = self.zero(output_grad.device)
        wanted, number = self.is_wanted(), torch._C._current_graph_task_id()
        if not wanted and not is_named(self.weight):
            return zero
        if not wanted and number not in self._passes:  # the probe has no part in the pass
            at_end(lambda: self.arrived(zero, number))
        this = self._passes.setdefault(number, Pass(view.state["step"]))
        with without_autocast([kept]):
            if self.is_whole(view) and not projected:
                this.terms.append(self._factors(output_grad, kept))
                return zero
            this.reduced = True
            other = engine.project_factor(view, output_grad, -3 - self.input_axis)
            own = kept if projected else engine.project_factor(view, kept, self.input_axis)
            low = self._factors(other, own).dense().to(view.layout.compute_dtype)
        if wanted:
            return low
        this.low = low if this.low is None else this.low + low
        return zero

    def _factors(self, output_grad: Tensor, input: Tensor) -> OuterProduct:
        return OuterProduct(input, output_grad) if self.transposed else OuterProduct(output_grad, input)

    @_untraced
    def arrived(self, low: Tensor, number: int | None = None) -> None:
        """All that this backward pass adds to R is there. ``number``: which pass, where it does not run any more."""
        this = end_pass(self._passes, number)
        low = low if this.low is None else this.low
        if self._optimizer() is not None and self.weight.requires_grad:  # it may have been frozen since the forward pass
            total = OuterProduct.total(this.terms) if this.terms else None
            self.deliver(low if this.reduced or not this.terms else None, total)


def is_alike(layout: Layout, other: Layout) -> bool:
    """Whether both make the same of a gradient, but for the bases; neither has to do with the model's dtype."""
    return (layout.view, layout.ranks) == (other.view, other.ranks)


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


def _is_transformed() -> bool:
    """Whether gradients are those of torch.func or of forward mode, or the layer is recorded to run elsewhere."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch._C._are_functorch_transforms_active() or forward_mode or torch._C._get_tracing_state() is not None


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes y = x W^T + b or y = x W + b, and nothing else."""
    return (type(module).forward is nn.Linear.forward or _is_conv1d(module)) and "forward" not in vars(module)


class _DirectForward(SwappedClass):
    """What a linear layer's class becomes: the same layer with another backward pass."""

    _direct_layer: DirectLayer
    _direct_key: Tensor
    _direct_probe: Tensor
    _direct_weight: Tensor
    _direct_form: tuple[int, bool]  # the rank of the input's axis, 0 where that is not projected, and whether W is transposed

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        bias: Any = self.bias
        out: Tensor
        if torch.compiler.is_compiling():
            direct = (
                torch.is_grad_enabled() and weight.requires_grad and weight is self._direct_weight and not torch.compiler.is_exporting()
            )
        else:
            direct = self._direct_layer.serves(weight)
        if not direct:
            out = self._plain.forward(self, input)
            return out
        flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        if torch.compiler.is_compiling():
            out = compiled_linear(flat, weight.detach(), bias, self._direct_probe, self._direct_key, *self._direct_form)
        else:
            self._direct_probe = self._direct_layer.move()
            out = _Linear.apply(flat, self._direct_layer.in_graph(), bias, self._direct_probe, self._direct_layer)  # type: ignore[no-untyped-call]
        # A view that is made inside of the function cannot be written in place, as nn.ReLU(inplace=True) does.
        return out if input.dim() == 2 else out.view(*input.shape[:-1], out.shape[-1])


class _Linear(torch.autograd.Function):
    """y = x W^T + b, whose weight has no gradient: the probe has R for its.

    x: T x n, y: T x m. The weight comes as `in_graph` has it. It is not among the saved tensors, whose hooks, such as `save_on_cpu`, would
    copy it.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor, layer: DirectLayer) -> Tensor:
        out = linear(input, weight, bias, layer.transposed)
        view = layer.seen()
        kept, ctx.projected = layer.keep(view, input.detach().to(out.dtype))
        ctx.save_for_backward(kept)
        ctx.layer, ctx.weight_version, ctx.basis_version = layer, layer.version(), layer.basis_version(view)
        ctx.dtypes = input.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,), layer, (dtype, bias_dtype) = ctx.saved_tensors, ctx.layer, ctx.dtypes
        layer.check(ctx.weight_version)
        view = layer.seen()
        if ctx.projected:
            layer.check_basis(ctx.basis_version)
        back = input_grad(grad, layer.used_weight(), layer.transposed).to(dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.sum(0).to(bias_dtype) if ctx.needs_input_grad[2] else None
        return back, None, of_bias, layer.reduce(view, grad, kept, ctx.projected), None
