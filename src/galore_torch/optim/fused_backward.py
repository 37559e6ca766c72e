"""Gradients that never exist all at once. Hooks over the same engine and one ordinary optimizer.

The optimizer holds its attachments; a hook holds its attachment weakly. So a model is freed when its last user lets go of it, a copy of a
model is not fused, and the hooks of an optimizer that is gone do nothing.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from galore_torch.choices import one_of
from galore_torch.engine.layout import layout_of
from galore_torch.engine.processes import Processes
from galore_torch.engine.recipe import check_kept
from galore_torch.engine.sharding import local, place_of
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.averaging import Averaging
from galore_torch.optim.base import LowRankOptimizer, callers_level
from galore_torch.optim.direct_backward import DirectLayer, is_alike, is_linear
from galore_torch.optim.direct_experts import DirectExperts
from galore_torch.optim.direct_sharded import ShardedLayer
from galore_torch.optim.in_model import Held, places_of
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad
from galore_torch.optim.wrapped import active_wrapper, check_join, holds, refuse_join, wrappers
from galore_torch.slots.projectors import PROJECTORS

MODES = ("project", "update", "direct", "direct_update")
_DIRECT, UPDATING = ("direct", "direct_update"), ("update", "direct_update")


class FusedBackward:
    """The attachment of an optimizer to a model's backward pass; ``remove()`` undoes it, and so does leaving a ``with``."""

    def __init__(
        self, model: nn.Module, optimizer: LowRankOptimizer, params: list[Tensor], mode: str, reduce_dtype: torch.dtype | None = None
    ):
        self.mode, self._reduce_dtype, self._held = mode, reduce_dtype, Held(model)
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)
        self._params: list[Tensor] = []
        self._seen: set[Tensor] = set()  # those, and others of the optimizer that are not in the model
        self._handles: list[Any] = []
        self._checked = False
        self._averaging: Averaging | None = None  # where a DistributedDataParallel has left the gradients of projected weights to us
        self._is_stale = False  # whether it averages others than the projected weights
        self._direct: dict[Tensor, DirectLayer | DirectExperts] = {}  # by weight
        self._left: dict[Tensor, str] = {}
        # Called with each R of a linear layer, and with each part of a gradient, before it is used up.
        self.look: Callable[[Tensor], None] | None = None
        self._quantised: list[Any] = []
        self._take(model, params)
        if _has_processes():
            hook = _Hook(weakref.ref(self))
            self._handles += [model.register_forward_pre_hook(hook), model.register_forward_hook(hook)]
        optimizer.attachments.append(self)

    @property
    def left(self) -> list[str]:
        """In a direct mode: projected matrices whose gradients are made in full, as warned of."""
        return list(self._left.values())

    def _take(self, model: nn.Module, params: list[Tensor]) -> None:
        """Attach to some of the model's parameters."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if self.mode != "update":
            for p in params:
                check_kept(optimizer.group_of(p))
        hook = _Hook(weakref.ref(self))
        self._params += params
        self._seen.update(params)
        self._held.add(model, params)
        self._handles += [p.register_post_accumulate_grad_hook(hook) for p in params]
        if quantised := [p for p in params if is_traceable_wrapper_subclass(p)]:
            self._quantised += quantised
            self._handles.append(model.register_forward_pre_hook(hook))
        if self.mode in _DIRECT:
            self._attach_layers(model)

    def remove(self) -> None:
        """Detach: gradients are ordinary again from the next backward pass on."""
        for handle in (*self._handles, *self._direct.values()):
            handle.remove()
        self._handles.clear()
        self._direct.clear()
        if self._averaging is not None:
            self._averaging.close()
            self._averaging = None
        if (optimizer := self._optimizer()) is not None and self in optimizer.attachments:
            optimizer.attachments.remove(self)

    def __enter__(self) -> FusedBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def check(self) -> None:
        """Raise ValueError where the model has exchanged parameters since: the optimizer would be left behind.

        Take in parameters that were frozen until now, or came with a later group: this step has their gradients in full.
        """
        self._held.check()
        optimizer, model = self._optimizer(), self._model()
        assert optimizer is not None
        new = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and p not in self._seen]
        if new and model is not None:
            held = set(model.parameters())
            self._take(model, [p for p in new if p in held and attachment_of(p) is None])
            self._seen.update(new)
            self._is_stale = self._averaging is not None and not self._averaging.is_of(self._projected())

    def follow_groups(self) -> None:
        """A checkpoint has brought other groups: make the layers anew whose weights have another rank or side."""
        optimizer, model = self._optimizer(), self._model()
        assert optimizer is not None
        self._is_stale = self._averaging is not None and not self._averaging.is_of(self._projected())
        if self.mode not in _DIRECT or model is None:
            return
        for p, layer in list(self._direct.items()):
            if not is_alike(layer.layout, layout_of(p, optimizer.group_of(p))):
                layer.remove()
                del self._direct[p]
        self._attach_layers(model)

    def _projected(self) -> list[Tensor]:
        optimizer = self._optimizer()
        assert optimizer is not None
        return [p for p in self._params if layout_of(p, optimizer.group_of(p)).ranks]

    def follow(self) -> None:
        """`Module.to` exchanges what a quantised weight is, and the hooks stay behind with the old one: give them to the new one."""
        for p in self._quantised:
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks  # what registering the first does

    def begins(self) -> None:
        """The forward pass of the model begins, maybe inside of a wrapper that has been put around it."""
        self.follow()
        if _has_processes() and (wrapper := active_wrapper()) is not None:
            self.meet(wrapper)

    def meet(self, wrapper: nn.parallel.DistributedDataParallel) -> None:
        """Take the projected weights from this wrapper, where it holds them: their gradients are averaged as R."""
        if self._averaging is not None and self._is_stale:
            self._averaging.close()
            self._averaging = None
        self._is_stale = False
        if self._averaging is not None and self._averaging.serves(wrapper):
            check_join(wrapper)
            return
        optimizer = self._optimizer()
        if optimizer is None or not holds(wrapper, self._params):
            return
        refuse_join(wrapper, "a model that was fused before it was wrapped")
        if self._averaging is not None:
            self._averaging.close()
        self._averaging = Averaging(optimizer, self._projected(), wrapper, self._reduce_dtype)
        if self.mode in UPDATING:
            self._averaging.averaged = _Update(weakref.ref(self))

    def watch(self, output: Any) -> None:
        """The forward pass of the model has ended."""
        if self._averaging is not None:
            self._averaging.watch(output)

    def fire(self, p: Tensor) -> None:
        """Use the gradient that has just been made, and free it."""
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        self._check_parallel()
        held = local(p.grad)
        if p in self._direct and (isinstance(held, ConsumedGrad) or (isinstance(held, LowRankGrad) and not held.has_dense)):
            return  # weights of layers come here for no gradient at all
        if isinstance(held, LowRankGrad):
            held.has_dense = False
        layer = self._direct.get(p)
        waits = self._averaging is not None and layer is not None and layer.is_wanted() and not self._averaging.has(p, "direct")
        if layer is not None and not layer.takes_plain():
            self._give_up(p, layer)
        if self._averaging is not None:
            if p in self._averaging:
                grad, p.grad = p.grad, None
                self._averaging.arrived(p, "plain", (None, grad), waits)
            return  # the wrapper's own stay until the step: their mean comes at the end of the backward pass
        updates = self.mode in UPDATING and layer is None  # the rest of its gradient may still be on its way
        if updates and self.look is not None and place_of(p) is not None:  # which no tensor hook sees
            self.look(local(p.grad))
        act = optimizer.update_parameter if updates else optimizer.compress_gradient
        act(p, optimizer.group_of(p))

    def _check_parallel(self) -> None:
        """Refuse a wrapper whose forward pass did not go through the model that was fused, once."""
        if not self._checked and self._averaging is None:
            _refuse_unseen_wrapper(self._params[0])
            self._checked = True

    def _attach_layers(self, model: nn.Module) -> None:
        """Give the linear layers of projected matrices a backward pass that makes no full gradient; say which matrices have none."""
        optimizer, names, left = self._optimizer(), places_of(model), {}
        assert optimizer is not None
        finish = _Finish(weakref.ref(self), weakref.ref(optimizer))
        for p in self._projected():
            if p in self._direct or p in self._left or p not in names:
                continue
            layout, place = layout_of(p, optimizer.group_of(p)), place_of(p)
            name, module = names[p][0]
            whole = len(names[p]) == 1 and tuple(p.shape) == layout.whole and name.rpartition(".")[2] == "weight"
            whole = whole and not p.is_complex()  # whose products have conjugates
            if whole and is_linear(module) and not PROJECTORS[layout.projector].elements:
                of_layer = name, module, optimizer, finish
                self._direct[p] = DirectLayer(*of_layer) if place is None else ShardedLayer(Processes(place.ranks), *of_layer)
            elif len(names[p]) == 1 and layout.batch and place is None and tuple(p.shape) == layout.view:
                self._direct[p] = DirectExperts(name, module, p, optimizer, finish)
            else:
                left[p] = name if len(names[p]) == 1 else " = ".join(name for name, _ in names[p])
        self._left |= left
        if said := list(left.values()):
            warnings.warn(
                f"the gradients of {len(said)} matrices are made in full and then projected, for each is not the weight of one linear "
                f"layer alone, is complex, or keeps single elements (sparse): {', '.join(said[:8])}{', ...' if len(said) > 8 else ''}",
                stacklevel=callers_level(),
            )

    def _give_up(self, p: Tensor, layer: DirectLayer | DirectExperts) -> None:
        layer.remove()
        del self._direct[p]
        self._left[p] = layer.name
        warnings.warn(
            f"{layer.name} is used otherwise than in its layer's product too, or holds experts in a compiled module: from now on its "
            "gradient is made in full and then projected",
            stacklevel=2,
        )

    def finish(self, p: Tensor, low: Tensor | None, factors: OuterProduct | SharedGradient | None) -> None:
        """What a layer's backward pass has made: R, or the factors of a part whose basis is due."""
        self._check_parallel()
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._averaging is not None and p in self._averaging:
            assert not isinstance(factors, SharedGradient), "a wrapper averages what is whole"
            waits = torch._C._will_engine_execute_node(get_gradient_edge(p).node) and not self._averaging.has(p, "plain")
            self._averaging.arrived(p, "direct", (low, factors), waits)
            return
        optimizer.add_low_rank(p, low, factors)
        if self.mode in UPDATING and not isinstance(self._direct.get(p), DirectExperts):  # a part of theirs may come the ordinary way
            self.update(p)

    def update(self, p: Tensor) -> None:
        """The gradient of one weight is whole: use it up."""
        optimizer = self._optimizer()
        if optimizer is not None:
            if self.look is not None and isinstance(held := local(p.grad), LowRankGrad):
                self.look(held.low)
            optimizer.update_parameter(p, optimizer.group_of(p))


class _Finish:
    """What a layer calls when its low-rank gradient is made. It holds the attachment and its optimizer weakly, as `_Hook` does."""

    def __init__(self, attachment: Callable[[], FusedBackward | None], optimizer: Callable[[], LowRankOptimizer | None]):
        self.attachment, self.optimizer = attachment, optimizer

    def __call__(self, p: Tensor, low: Tensor | None, factors: OuterProduct | SharedGradient | None) -> None:
        if (attachment := self.attachment()) is not None:
            attachment.finish(p, low, factors)
        elif (optimizer := self.optimizer()) is not None:  # removed since the forward pass
            optimizer.add_low_rank(p, low, factors)


class _Update:
    """What averaged gradients are handed to. It holds the attachment weakly."""

    def __init__(self, attachment: Callable[[], FusedBackward | None]):
        self.attachment = attachment

    def __call__(self, p: Tensor) -> None:
        if (attachment := self.attachment()) is not None:
            attachment.update(p)


class _Hook:
    """What a parameter calls when its gradient has been made, and a quantised or data-parallel model before and after it computes.

    Saved with a model it belongs to no attachment, and a copy of a model has the attachment of no parameter.
    """

    def __init__(self, attachment: Callable[[], FusedBackward | None]):
        self.attachment = attachment

    def __call__(self, owner: Tensor | nn.Module, *seen: Any) -> None:
        if torch.compiler.is_compiling() or (attachment := self.attachment()) is None:
            return
        if isinstance(owner, nn.Module):
            if len(seen) == 1:  # its inputs
                attachment.begins()
            else:
                attachment.watch(seen[-1])
        else:
            attachment.fire(owner)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> _Hook:
    return _Hook(lambda: None)


def attachment_of(p: Tensor) -> FusedBackward | None:
    """The live attachment whose hook this parameter has, of an optimizer that is still there."""
    hooks: Any = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    for hook in hooks.values():
        found = hook.attachment() if isinstance(hook, _Hook) else None
        if found is not None and found._optimizer() is not None:
            return found
    return None


def fused_backward(
    model: nn.Module, optimizer: LowRankOptimizer, mode: str = "project", reduce_dtype: torch.dtype | None = None
) -> FusedBackward:
    """Free each gradient inside the backward pass, as soon as it is made.

    mode "project": the gradient is projected into its low-rank buffer and freed. ``optimizer.step()`` stays an ordinary
        call: gradient accumulation, one scheduler, `torch.nn.utils.clip_grad_norm_`, skipping a step and one state_dict work.
        Accumulating k micro-batches equals one k-fold batch, because projection is linear. When a refresh is due, the basis
        comes from the first micro-batch's gradient. Norms are those of the projected gradients.
    mode "update": the weight is updated inside the backward pass, which also frees the low-rank gradient and those of the
        unprojected parameters. ``optimizer.step()`` only ends the step. Accumulation and clipping raise an error.

    mode "direct": as "project", and for linear layers the full gradient is not even made: R comes from the layer's output gradient and its
        input, of which only the projection is kept for the backward pass where the basis is on its side (``proj_type="right"``). The basis
        comes from the same two; ``projector="svd"`` and "gram" need the gradient as a matrix, and make it for the layer whose turn it is.
        No hook on such a weight's gradient fires. Matrices that are not the weight of one linear layer alone are listed in a warning, and
        go on as in "project".
    mode "direct_update": as "direct", and the weight is updated inside the backward pass, as in "update".

    Under DistributedDataParallel, whether ``model`` is the wrapper or is put into one later: processes average the low-rank gradients of
    projected weights, in ``reduce_dtype`` (torch.float32 or torch.bfloat16; None: in that of R), and the bases stay the same in all. The
    wrapper averages the others, which are then updated by ``optimizer.step()`` in every mode. `no_sync` adds up micro-batches as always.

    Under `fully_shard` modes "project" and "update" take each shard of a gradient as soon as FSDP2 has made it; in the direct modes the
    processes average R of linear layers in its place, in every backward pass. Call `fully_shard` first, and load with `assign=True` first:
    ``optimizer.step()`` raises ValueError where the model has exchanged its parameters since.

    Parameters that are thawed later, or come with a later group, are taken in by the first step in which they have a gradient, which has
    it in full. Where ``load_state_dict`` brings other ranks or sides, the layers follow.

    It lasts until ``remove()``, or as long as the optimizer. Another optimizer cannot step on these gradients: that is an error.

    Raises ValueError for another optimizer's class, a model that shares no parameter with it, a second attachment, and but in mode "update"
    a recovery or carry that reads the full gradient.
    """
    one_of("mode", mode, MODES)
    if not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}: fused_backward needs one of galore_torch, such as GaLoreAdamW")
    if reduce_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"reduce_dtype={reduce_dtype!r} is not torch.float32, torch.bfloat16 or None, which is the dtype of R")
    if reduce_dtype is not None and not _has_processes():
        raise ValueError(f"reduce_dtype={reduce_dtype} has no effect in one process: leave it None, or call init_process_group() first")
    wrapper = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    model = model if wrapper is None else wrapper.module
    own = {p for group in optimizer.param_groups for p in group["params"]}
    mine: list[Tensor] = [p for p in model.parameters() if p in own and p.requires_grad]
    if reduce_dtype is not None and any(place_of(p) is not None for p in mine):
        raise ValueError(
            f"reduce_dtype={reduce_dtype} is of DistributedDataParallel, and fully_shard has its own MixedPrecisionPolicy: leave it None"
        )
    if not mine:
        raise ValueError("model and optimizer share no trainable parameter: pass the model the optimizer was built from")
    if any(attachment_of(p) is not None for p in mine):
        raise ValueError("model already has a fused backward pass: call remove() on it first")
    attachment = FusedBackward(model, optimizer, mine, mode, reduce_dtype)
    if wrapper is not None:
        attachment.meet(wrapper)
    return attachment


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _refuse_unseen_wrapper(p: Tensor) -> None:
    """Raise ValueError where the model is in a wrapper that has not been met. DistributedDataParallel leaves no mark on a parameter."""
    if _has_processes() and any(p is other for wrapper in wrappers() for other in wrapper.parameters()):
        raise ValueError(
            "the model is in a DistributedDataParallel that fused_backward has not seen, so its gradients would be used before they "
            "are averaged: call init_process_group() before fused_backward, or give fused_backward the wrapped model"
        )
