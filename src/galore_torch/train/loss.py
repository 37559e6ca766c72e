"""The training loss as one module, so that what wraps a forward pass (compile, data parallel) wraps all of it."""

from __future__ import annotations

from torch import Tensor, nn

IGNORED = -100  # a target that counts for nothing: padding


class TokenLoss(nn.Module):
    """The next-token loss of a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over the targets of their cross-entropy in nats, float32 whatever the weights' dtype; `IGNORED` ones count for nothing.

        `inputs` and `targets` are (B, L) token ids on the model's device.
        """
        logits = self.model(input_ids=inputs).logits  # (B, L, vocabulary)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def counted(targets: Tensor) -> int:
    """How many targets count."""
    return int((targets != IGNORED).sum())
