"""Faces: gradients that never exist all at once. Hooks over the same engine and one ordinary optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from galore_torch.choices import one_of
from galore_torch.optim.base import LowRankOptimizer


class FusedBackward:
    """The attachment of an optimizer to a model's backward pass; ``remove()`` undoes it, and so does leaving a ``with``."""

    def __init__(self, handles: list[Any]):
        self._handles = handles

    def remove(self) -> None:
        """Detach: gradients are ordinary again from the next backward pass on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> FusedBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def fused_backward(model: nn.Module, optimizer: LowRankOptimizer, mode: str = "project") -> FusedBackward:
    """Free each gradient inside the backward pass, as soon as it is made.

    mode "project": the gradient is projected into its low-rank buffer and freed. ``optimizer.step()`` stays an ordinary
        call: gradient accumulation, one scheduler, `torch.nn.utils.clip_grad_norm_`, skipping a step and one state_dict work.
        Accumulating k micro-batches equals one k-fold batch, because projection is linear. When a refresh is due, the basis
        comes from the first micro-batch's gradient. Norms are those of the projected gradients.
    mode "update": the weight is updated inside the backward pass, which also frees the low-rank gradient and those of the
        unprojected parameters. ``optimizer.step()`` only ends the step. Accumulation and clipping raise an error.

    Raises ValueError for another optimizer's class, a model that shares no parameter with it, a second attachment, and
    DistributedDataParallel, whose hooks would see gradients before they are averaged.
    """
    one_of("mode", mode, ("project", "update"))
    if not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}: fused_backward needs one of galore_torch, such as GaLoreAdamW")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is a DistributedDataParallel: its gradients would be used before they are averaged over ranks; "
            "train without fused_backward"
        )
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    mine = [p for p in model.parameters() if p in groups and p.requires_grad]
    if not mine:
        raise ValueError("model and optimizer share no trainable parameter: pass the model the optimizer was built from")
    if any(getattr(p, "_galore_fused", False) for p in mine):
        raise ValueError("model already has a fused backward pass: call remove() on it first")
    act = optimizer.compress_gradient if mode == "project" else optimizer.update_parameter

    def hook(p: Tensor) -> None:
        if p.grad is not None:
            act(p, groups[p])

    def reread(_: Any) -> None:  # load_state_dict replaces the groups
        groups.update((p, group) for group in optimizer.param_groups for p in group["params"])

    attached = [_Attachment(p, p.register_post_accumulate_grad_hook(hook)) for p in mine]
    return FusedBackward([*attached, optimizer.register_load_state_dict_post_hook(reread)])


class _Attachment:
    """One hook, and the mark on its parameter that refuses a second one."""

    def __init__(self, p: Tensor, handle: Any):
        self.p, self.handle = p, handle
        p._galore_fused = True  # type: ignore[attr-defined]

    def remove(self) -> None:
        self.handle.remove()
        del self.p._galore_fused  # type: ignore[attr-defined]
