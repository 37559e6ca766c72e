"""Cross-entropy of a linear head without its logits: a chunk of tokens at a time, forward and backward.

The gradients are made in the forward pass, where a chunk's logits exist anyway, so they are computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target that counts for nothing: padding


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Sum over tokens of the cross-entropy in nats of softmax(hidden @ weight^T); targets that are `IGNORED` count for nothing.

    `hidden` (N, d) and `weight` (V, d) of one dtype, `targets` (N,) in [0, V) or `IGNORED`; at most (chunk, V) logits exist at once.
    0-d, float32 for narrower dtypes, as the softmax and the sums are. Differentiable once, in `hidden` and `weight`.
    """
    recorded = torch.is_grad_enabled()
    wanted = (recorded and hidden.requires_grad, recorded and weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets, chunk, wanted)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, wanted: tuple[bool, bool]) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            total += _one_chunk(hidden[rows], weight, targets[rows], None if of_hidden is None else of_hidden[rows], of_weight)
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        of_hidden, of_weight = ctx.saved_tensors
        # In place: a second backward pass over the same graph is refused by autograd, as its saved tensors have changed.
        return (
            None if of_hidden is None else of_hidden.mul_(scale),
            None if of_weight is None else of_weight.mul_(scale).to(ctx.dtype),
            *(None, None, None),
        )


def _one_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, of_hidden: Tensor | None, of_weight: Tensor | None) -> Tensor:
    """The loss of `hidden` (c, d); writes its gradient by `hidden`, and adds that by `weight`, where there is a place for them."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    logp = torch.log_softmax((hidden @ weight.T).to(exact), dim=1)  # (c, d) @ (d, V) -> (c, V)
    loss = torch.nn.functional.nll_loss(logp, targets, ignore_index=IGNORED, reduction="sum")
    if of_hidden is None and of_weight is None:
        return loss
    counts = targets != IGNORED
    grad = logp.exp_()  # softmax - one-hot, 0 where nothing counts: the derivative of the sum by the logits
    grad.scatter_add_(1, targets.where(counts, 0)[:, None], grad.new_full((len(targets), 1), -1.0))
    grad = grad.mul_(counts[:, None]).to(weight.dtype)
    if of_hidden is not None:
        torch.mm(grad, weight, out=of_hidden)  # (c, V) @ (V, d)
    if of_weight is not None and of_weight.dtype == grad.dtype:
        of_weight.addmm_(grad.T, hidden)  # (V, c) @ (c, d)
    elif of_weight is not None:
        of_weight += grad.T @ hidden  # 16-bit products, summed over chunks in float32
    return loss
