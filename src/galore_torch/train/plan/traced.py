"""The same phases traced: forward and backward of the model with two and with three layers, on tensors without memory.

torch's own MemTracker counts; what a third layer adds goes on for all others. What uses gradients in the backward pass is traced as the
memory that its hooks, and linear layers that make no gradient, take and leave. MemTracker is private to torch: where it is missing there is
no trace, and the formulas stand alone.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from galore_torch.ops.linear import input_grad, linear
from galore_torch.optim.direct_backward import is_linear
from galore_torch.optim.param_groups import chosen_weights
from galore_torch.train.model.chunked_loss import head_loss, products_on
from galore_torch.train.plan.analytic import Phase, PlanRequest, input_ranks, kept_whole, passing_bytes, phases
from galore_torch.train.plan.methods import Cost

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
except ImportError:  # another torch
    MemTracker = None  # type: ignore[assignment,misc]

FEW, MORE = 2, 3  # layers
_SLICES = 16  # of the head's weight, at most
_STAGES = ("the loss", "head", "last", "first", "embedding")  # of a backward pass; a phase falls in the one whose word is in its name
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
Build = Callable[[int], nn.Module]  # layers -> the model on the meta device, as the optimizer finds it


def can_trace() -> bool:
    return MemTracker is not None


def traced_phases(request: PlanRequest, build: Build) -> list[Phase]:
    """`analytic.phases`, each stage's largest with the traced total; what the formulas do not see is `transient`."""
    by_formulas = list(phases(request))  # before anything is fake: the tables of 8-bit codes are made once and kept
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True  # where a trace fails the caller says so
    try:
        few, more = _trace(request, build(FEW)), _trace(request, build(MORE))
    finally:
        log.disabled = silent
    further, whole = request.sizes.layers - FEW, kept_whole(request)
    found = []
    for stage, group in by_stage(by_formulas).items():
        largest = max(group, key=lambda phase: phase.total)
        if stage in few:
            total = few[stage] + further * (more[stage] - few[stage]) + largest.unpacked + whole * (stage != "embedding")
            known = largest.gradients + largest.logits
            activations = max(0, min(largest.activations, total - known))
            largest = replace(largest, activations=activations, transient=total - known - activations)
        found.append(largest)
    return found


def by_stage(phases: Iterable[Phase]) -> dict[str, list[Phase]]:
    groups: dict[str, list[Phase]] = {}
    for phase in phases:
        stage = next((word for word in _STAGES if word in phase.name), phase.name)
        groups.setdefault("head" if stage == "the loss" else stage, []).append(phase)
    return groups


def _trace(request: PlanRequest, model: nn.Module) -> dict[str, int]:
    """The most bytes in each stage of one forward and backward pass, beyond the weights."""
    with FakeTensorMode():
        _materialise(model)
        tokens = torch.zeros(request.batch, request.length, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        peaks = _Peaks(tracker)
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # the tracker's, of gradients that a hook has consumed
            stack.enter_context(tracker)
            if request.widened:
                stack.enter_context(_ThroughFp32())
            peaks.begin()
            kept = _attach(request, model)
            _watch(model, peaks)
            loss = _loss(model, tokens, request)
            loss.backward()
            peaks.end("embedding")
            del kept
    return peaks.found


class _Peaks:
    """The tracker's peak, read and begun anew at the end of each stage."""

    def __init__(self, tracker: Any):
        self.tracker, self.found, self.start = tracker, {}, 0  # type: tuple[Any, dict[str, int], int]

    def begin(self) -> None:
        self.start = self._now()
        self._reset()

    def end(self, stage: str) -> None:
        self.found[stage] = max(peak for peak in self.tracker._peak_mem.values()) - self.start
        self._reset()

    def _now(self) -> int:
        return sum(int(kinds["Total"]) for kinds in self.tracker.get_tracker_snapshot("current").values())

    def _reset(self) -> None:
        """As the tracker does it when it is entered."""
        snapshot = self.tracker.get_tracker_snapshot("current")
        self.tracker._peak_mem_snap = snapshot
        self.tracker._peak_mem = {device: kinds["Total"] for device, kinds in snapshot.items()}


class _ThroughFp32(TorchDispatchMode):
    """Products of 16-bit matrices as a CPU without bf16 arithmetic makes them: in fp32 first."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = func in _PRODUCTS and args[-1].dtype.itemsize == 2
        wide = torch.empty(args[-2].shape[0], args[-1].shape[1]) if narrow else None
        out = func(*args, **(kwargs or {}))
        del wide
        return out


def _materialise(model: nn.Module) -> None:
    """Tensors of the active fake mode in place of those on the meta device; tied ones stay tied.

    Frozen weights become buffers: the tracker asks every parameter for its gradient.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            if not p.requires_grad:
                del module._parameters[name]
                module._buffers[name] = p
            else:
                made.setdefault(p, nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
                module._parameters[name] = made[p]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _attach(request: PlanRequest, model: nn.Module) -> dict[Tensor, Tensor]:
    """Gradients that are there before, and what takes and leaves what `fused_backward` would; returns what that leaves."""
    again, kept = request.accumulation > 1, dict[Tensor, Tensor]()
    if request.mode is None:
        for p in model.parameters():
            p.grad = torch.empty_like(p) if again and p.requires_grad else None
        return kept
    costs = {(part.shape, part.projected): each for part, each in [*request.outer, *request.layer]}
    projected = {weight.parameter for weight in chosen_weights(model)}
    mine: dict[Tensor, Cost] = {p: costs[tuple(p.shape), p in projected] for p in model.parameters()}

    def hook(p: Tensor) -> None:
        if not request.updates and not mine[p].low:
            return
        passing = torch.empty(passing_bytes(request, mine[p]), dtype=torch.uint8)
        p.grad = None
        del passing
        if not request.updates and p not in kept:
            kept[p] = torch.empty(mine[p].low, dtype=torch.uint8)

    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if weight in mine and not mine[weight].gradient and is_linear(module):
            rank = 0 if request.refreshing else input_ranks(request).get(tuple(weight.shape), 0)
            module.forward = partial(_thin_linear, module, not isinstance(module, nn.Linear), rank, hook)
    for weight, each in mine.items():
        weight.register_post_accumulate_grad_hook(hook)
        if again and each.low:
            kept[weight] = torch.empty(each.low, dtype=torch.uint8)
        elif again:
            weight.grad = torch.empty_like(weight)
    return kept


def _thin_linear(module: Any, transposed: bool, rank: int, hook: Callable[[Tensor], None], input: Tensor) -> Tensor:
    out: Tensor = _Thin.apply(input, module.weight, module.bias, transposed, rank, hook)
    return out


class _Thin(torch.autograd.Function):
    """A linear layer that keeps of its input (T x n) as many columns as ``rank``, 0: all, and calls ``hook`` in place of a gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, rank: int, hook: Callable[[Tensor], None]
    ) -> Tensor:
        flat = input.reshape(-1, input.shape[-1])
        ctx.save_for_backward(flat.new_empty(len(flat), rank) if rank else flat)
        ctx.weight, ctx.bias, ctx.transposed, ctx.hook = weight, bias is not None, transposed, hook
        return linear(input, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = input_grad(grad, ctx.weight, ctx.transposed)
        ctx.hook(ctx.weight)
        return back, None, grad.flatten(0, -2).sum(0) if ctx.bias else None, None, None, None


def _watch(model: Any, peaks: _Peaks) -> None:
    """End a stage where a gradient leaves the head, the last layer, all but the first, and the first."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    if len(layers) not in (FEW, MORE):
        raise ValueError(f"its first list of modules has {len(layers)} members where {FEW} or {MORE} layers were asked for")

    def at(stage: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if torch._C._current_graph_task_id() == -1:  # not where a checkpoint computes it again
                tensor.register_hook(lambda _: peaks.end(stage))

        return hook

    layers[-1].register_forward_hook(at("head"))
    layers[-2].register_forward_hook(at("last"))
    layers[0].register_forward_hook(at("middle"))  # after "last": with two layers both end here
    model.get_input_embeddings().register_forward_hook(at("first"))
    for layer in layers:
        layer.register_forward_pre_hook(_without_mask, with_kwargs=True)


def _without_mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """transformers makes a mask for tensors that it cannot look into, and none for real ones; some layers get it by position."""
    names = list(inspect.signature(layer.forward).parameters)
    unmasked = tuple(None if name == "attention_mask" else value for name, value in zip(names, args, strict=False))
    return unmasked + args[len(names) :], {name: None if name == "attention_mask" else value for name, value in kwargs.items()}


def _loss(model: Any, tokens: Tensor, request: PlanRequest) -> Tensor:
    """As `TokenLoss`, which looks into a model that has values: logits are let go when their loss is known."""
    if request.chunk:
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        weight = model.get_output_embeddings().weight
        products = products_on(request.device, weight.dtype)
        few = max(products.elements, weight.numel() // _SLICES)  # a slice takes as long to trace as it is small
        return head_loss(hidden.flatten(0, 1), weight, tokens.flatten(), request.chunk, products._replace(elements=few))
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
