"""Gradients that never exist all at once. Hooks over the same engine and one ordinary optimizer.

The optimizer holds its attachments; a hook holds its attachment weakly. So a model is freed when its last user lets go of it, a copy of a
model is not fused, and the hooks of an optimizer that is gone do nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from galore_torch.choices import one_of
from galore_torch.engine.recipe import check_kept
from galore_torch.optim.base import LowRankOptimizer


class FusedBackward:
    """The attachment of an optimizer to a model's backward pass; ``remove()`` undoes it, and so does leaving a ``with``."""

    def __init__(self, model: nn.Module, optimizer: LowRankOptimizer, params: list[nn.Parameter], mode: str):
        self.mode, self._params = mode, params
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[Any] = []
        self._checked = False
        self._quantised: list[Any] = [p for p in params if is_traceable_wrapper_subclass(p)]
        hook = _Hook(weakref.ref(self))
        self._handles += [p.register_post_accumulate_grad_hook(hook) for p in params]
        if self._quantised:
            self._handles.append(model.register_forward_pre_hook(hook))
        optimizer.attachments.append(self)

    def remove(self) -> None:
        """Detach: gradients are ordinary again from the next backward pass on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if (optimizer := self._optimizer()) is not None and self in optimizer.attachments:
            optimizer.attachments.remove(self)

    def __enter__(self) -> FusedBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def follow(self) -> None:
        """`Module.to` exchanges what a quantised weight is, and the hooks stay behind with the old one: give them to the new one."""
        for p in self._quantised:
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks  # what registering the first does

    def fire(self, p: Tensor) -> None:
        """Use the gradient that has just been made, and free it."""
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        if not self._checked:
            _refuse_data_parallel(self._params[0])
            self._checked = True
        act = optimizer.compress_gradient if self.mode == "project" else optimizer.update_parameter
        act(p, optimizer.group_of(p))


class _Hook:
    """What a parameter calls when its gradient has been made, and a quantised model before it computes.

    Saved with a model it belongs to no attachment, and a copy of a model has the attachment of no parameter.
    """

    def __init__(self, attachment: Callable[[], FusedBackward | None]):
        self.attachment = attachment

    def __call__(self, owner: Tensor | nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or (attachment := self.attachment()) is None:
            return
        if isinstance(owner, nn.Module):
            attachment.follow()
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


def fused_backward(model: nn.Module, optimizer: LowRankOptimizer, mode: str = "project") -> FusedBackward:
    """Free each gradient inside the backward pass, as soon as it is made.

    mode "project": the gradient is projected into its low-rank buffer and freed. ``optimizer.step()`` stays an ordinary
        call: gradient accumulation, one scheduler, `torch.nn.utils.clip_grad_norm_`, skipping a step and one state_dict work.
        Accumulating k micro-batches equals one k-fold batch, because projection is linear. When a refresh is due, the basis
        comes from the first micro-batch's gradient. Norms are those of the projected gradients.
    mode "update": the weight is updated inside the backward pass, which also frees the low-rank gradient and those of the
        unprojected parameters. ``optimizer.step()`` only ends the step. Accumulation and clipping raise an error.

    It lasts until ``remove()``, or as long as the optimizer. Another optimizer cannot step on these gradients: that is an error.

    Raises ValueError for another optimizer's class, a model that shares no parameter with it, a second attachment, in mode "project" a
    recovery or carry that reads the full gradient, and DistributedDataParallel, whose hooks would see gradients before they are averaged.
    """
    one_of("mode", mode, ("project", "update"))
    if not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}: fused_backward needs one of galore_torch, such as GaLoreAdamW")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(_DATA_PARALLEL)
    own = {p for group in optimizer.param_groups for p in group["params"]}
    mine = [p for p in model.parameters() if p in own and p.requires_grad]
    if not mine:
        raise ValueError("model and optimizer share no trainable parameter: pass the model the optimizer was built from")
    if any(attachment_of(p) is not None for p in mine):
        raise ValueError("model already has a fused backward pass: call remove() on it first")
    if mode == "project":
        for p in mine:
            check_kept(optimizer.group_of(p))
    return FusedBackward(model, optimizer, mine, mode)


_DATA_PARALLEL = (
    "model is in a DistributedDataParallel: its gradients would be used before they are averaged over ranks; train without fused_backward"
)


def _refuse_data_parallel(p: Tensor) -> None:
    """Raise ValueError where a model was wrapped after it was fused. DistributedDataParallel leaves no mark on a parameter."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        wrappers = [each for each in gc.get_objects() if type(each) is nn.parallel.DistributedDataParallel]
        if any(p is other for wrapper in wrappers for other in wrapper.parameters()):
            raise ValueError(_DATA_PARALLEL)
