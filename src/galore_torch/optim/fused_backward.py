"""Gradients that never exist all at once. Hooks over the same engine and one ordinary optimizer.

The optimizer holds its attachments; a hook holds its attachment weakly. So a model is freed when its last user lets go of it, a copy of a
model is not fused, and the hooks of an optimizer that is gone do nothing.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from galore_torch.choices import one_of
from galore_torch.engine.recipe import check_kept
from galore_torch.optim.base import LowRankOptimizer
from galore_torch.optim.direct_backward import DirectLayer, is_linear
from galore_torch.optim.direct_experts import DirectExperts
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad

MODES = ("project", "update", "direct", "direct_update")
_DIRECT, _UPDATING = ("direct", "direct_update"), ("update", "direct_update")


class FusedBackward:
    """The attachment of an optimizer to a model's backward pass; ``remove()`` undoes it, and so does leaving a ``with``."""

    def __init__(self, model: nn.Module, optimizer: LowRankOptimizer, params: list[nn.Parameter], mode: str):
        self.mode, self._params = mode, params
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[Any] = []
        self._checked = False
        self._direct: dict[Tensor, DirectLayer | DirectExperts] = {}  # by weight
        self.left: list[str] = []  # in a direct mode: projected matrices whose gradients are made in full, as warned of
        self.look: Callable[[Tensor], None] | None = None  # called with each R of a linear layer before it updates its weight
        self._quantised: list[Any] = [p for p in params if is_traceable_wrapper_subclass(p)]
        hook = _Hook(weakref.ref(self))
        self._handles += [p.register_post_accumulate_grad_hook(hook) for p in params]
        if self._quantised:
            self._handles.append(model.register_forward_pre_hook(hook))
        optimizer.attachments.append(self)

    def remove(self) -> None:
        """Detach: gradients are ordinary again from the next backward pass on."""
        for handle in (*self._handles, *self._direct.values()):
            handle.remove()
        self._handles.clear()
        self._direct.clear()
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
        self._check_parallel()
        if p in self._direct and (isinstance(p.grad, ConsumedGrad) or (isinstance(p.grad, LowRankGrad) and not p.grad.has_dense)):
            return  # compiled layers call it for no gradient at all
        layer = self._direct.get(p)
        if layer is not None and not layer.takes_plain():
            self._give_up(p, layer)
        updates = self.mode in _UPDATING and layer is None  # the rest of its gradient may still be on its way
        act = optimizer.update_parameter if updates else optimizer.compress_gradient
        act(p, optimizer.group_of(p))

    def _check_parallel(self) -> None:
        """Refuse a wrapper that came after the attachment, once."""
        if not self._checked:
            _refuse_data_parallel(self._params[0])
            self._checked = True

    def attach_layers(self, model: nn.Module) -> None:
        """Give the linear layers of projected matrices a backward pass that makes no full gradient; say which matrices have none."""
        optimizer, names, left = self._optimizer(), _places_of(model), self.left
        assert optimizer is not None
        finish = _Finish(weakref.ref(self))
        for p in self._params:
            if not (layout := optimizer.view_of(p).layout).ranks:
                continue
            name, module = names[p][0]
            whole = len(names[p]) == 1 and tuple(p.shape) == layout.view and name.rpartition(".")[2] == "weight"
            if whole and is_linear(module):
                self._direct[p] = DirectLayer(name, module, optimizer, finish)
            elif len(names[p]) == 1 and layout.batch and tuple(p.shape) == layout.view:
                self._direct[p] = DirectExperts(name, module, p, optimizer, finish)
            else:
                left.append(name if len(names[p]) == 1 else " = ".join(name for name, _ in names[p]))
        if left:
            warnings.warn(
                f"the gradients of {len(left)} matrices are made in full and then projected, for each is not the weight of one linear "
                f"layer alone: {', '.join(left[:8])}{', ...' if len(left) > 8 else ''}",
                stacklevel=3,
            )

    def _give_up(self, p: Tensor, layer: DirectLayer | DirectExperts) -> None:
        layer.remove()
        del self._direct[p]
        self.left.append(layer.name)
        warnings.warn(
            f"{layer.name} is used otherwise than in its layer's product too: from now on its gradient is made in full and then projected",
            stacklevel=2,
        )

    def finish(self, p: Tensor) -> None:
        """The low-rank gradient of a layer is in ``p.grad``. That of experts waits for `step`: a part of it may come the ordinary way."""
        self._check_parallel()
        optimizer = self._optimizer()
        if optimizer is not None and self.mode in _UPDATING and not isinstance(self._direct.get(p), DirectExperts):
            if self.look is not None and isinstance(p.grad, LowRankGrad):
                self.look(p.grad.low)
            optimizer.update_parameter(p, optimizer.group_of(p))


class _Finish:
    """What a layer calls when its low-rank gradient is made. It holds the attachment weakly, as `_Hook` does."""

    def __init__(self, attachment: Callable[[], FusedBackward | None]):
        self.attachment = attachment

    def __call__(self, p: Tensor) -> None:
        if (attachment := self.attachment()) is not None:
            attachment.finish(p)


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

    mode "direct": as "project", and for linear layers the full gradient is not even made: R comes from the layer's output gradient and its
        input, of which only the projection is kept for the backward pass where the basis is on its side (``proj_type="right"``). The basis
        comes from the same two; ``projector="svd"`` and "gram" need the gradient as a matrix, and make it for the layer whose turn it is.
        No hook on such a weight's gradient fires. Matrices that are not the weight of one linear layer alone are listed in a warning, and
        go on as in "project".
    mode "direct_update": as "direct", and the weight is updated inside the backward pass, as in "update".

    It lasts until ``remove()``, or as long as the optimizer. Another optimizer cannot step on these gradients: that is an error.

    Raises ValueError for another optimizer's class, a model that shares no parameter with it, a second attachment, but in mode "update" a
    recovery or carry that reads the full gradient, and DistributedDataParallel, whose hooks would see gradients before they are averaged.
    """
    one_of("mode", mode, MODES)
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
    if mode != "update":
        for p in mine:
            check_kept(optimizer.group_of(p))
    attachment = FusedBackward(model, optimizer, mine, mode)
    if mode in _DIRECT:
        attachment.attach_layers(model)
    return attachment


def _places_of(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """parameter -> the name and the module of every place it has in the model."""
    places: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(p, []).append((f"{prefix}.{name}" if prefix else name, module))
    return places


_DATA_PARALLEL = (
    "model is in a DistributedDataParallel: its gradients would be used before they are averaged over ranks; train without fused_backward"
)


def _refuse_data_parallel(p: Tensor) -> None:
    """Raise ValueError where a model was wrapped after it was fused. DistributedDataParallel leaves no mark on a parameter."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        wrappers = [each for each in gc.get_objects() if type(each) is nn.parallel.DistributedDataParallel]
        if any(p is other for wrapper in wrappers for other in wrapper.parameters()):
            raise ValueError(_DATA_PARALLEL)
