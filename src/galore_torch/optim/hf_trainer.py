"""Layer-wise updates inside a Hugging Face Trainer: one optimizer and one schedule, weights updated in the backward pass.

A mixin of methods that Trainer offers for overriding, so that this file needs no transformers.
"""

from __future__ import annotations

from typing import Any

from galore_torch.engine.sharding import local
from galore_torch.optim.fused_backward import UPDATING, fused_backward
from galore_torch.optim.low_rank_grad import ConsumedGrad


class LayerwiseMixin:
    """Makes a Trainer's optimizer update each weight as soon as its gradient is there, and free the gradient.

    ``class LayerwiseTrainer(LayerwiseMixin, Trainer): pass`` is used as Trainer is, with ``optimizers=(optimizer, None)`` or
    ``optim="galore_adamw"``. It trains to the same bits as Trainer without clipping; the scheduler's rate is the rate in use, and
    checkpoints hold the optimizer's whole state.

    ``fused_mode``: a mode of `fused_backward`. "update" (default) and "direct_update" need ``max_grad_norm=0`` and no accumulation, and
        log no gradient norm, for no two gradients exist at a time. "project" and "direct" accumulate and clip.

    Raises ValueError, when training begins, for arguments that ask for gradients which are gone.
    """

    fused_mode = "update"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, and attach the optimizer to the model's backward pass."""
        trainer: Any = self
        _check(trainer.args, self.fused_mode)
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it when training begins, and may begin again
        if self.fused_mode not in [each.mode for each in getattr(plain, "attachments", ())]:
            fused_backward(trainer.model, plain, self.fused_mode)
        return optimizer

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, and clear the marks of gradients that were used: Trainer measures the norm of what is left."""
        loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        for p in model.parameters():
            if isinstance(local(p.grad), ConsumedGrad):
                p.grad = None
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, without the norm of gradients that no longer exist, which it takes for 0."""
        if self.fused_mode in UPDATING:
            logs.pop("grad_norm", None)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _check(args: Any, mode: str) -> None:
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.endswith("_layerwise"):
        raise ValueError(f"optim={optim!r} hooks the parameters itself; use {optim.removesuffix('_layerwise')!r}: it is layer-wise here")
    asked = {"gradient_accumulation_steps": args.gradient_accumulation_steps > 1, "fp16": args.fp16}
    asked["max_grad_norm"] = bool(args.max_grad_norm)
    for name, is_asked in asked.items():
        if mode in UPDATING and is_asked:
            cure = {"gradient_accumulation_steps": "set it to 1", "max_grad_norm": "set it to 0", "fp16": "use bf16"}[name]
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs all gradients at once, and fused_mode={mode!r} uses each inside the backward pass: "
                f"{cure}, or set fused_mode = 'project'"
            )
