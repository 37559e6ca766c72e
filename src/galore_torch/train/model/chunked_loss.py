"""Cross-entropy of a linear head without its logits, forward and backward: a chunk of tokens and a slice of the vocabulary at a time.

The forward pass makes the gradient of the hidden states, and that of a weight in fp32, where a chunk's logits exist anyway. A weight of
16 bits gets its gradient in the backward pass: a sum over chunks would need all of it in fp32, so each slice of rows computes its logits
once more, of all tokens, and its product rounds once. That is a third more operations, and no slower (benchmarks/README.md, Loss).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galore_torch.ops.chunks import parts
from galore_torch.ops.int8_weight import Int8Weight, row_unit, rows_of
from galore_torch.ops.linalg import product_dtype

IGNORED = -100  # a target that counts for nothing: padding
_SLICE = {"cpu": 2**22}  # the fastest of 2^20, 2^22 and 2^24 at width 1024
_LAUNCHED = 2**25  # off the CPU, where launches cost; not measured


class Products(NamedTuple):
    """How matrices multiply: in which dtype, and about how many elements of the weight at a time."""

    dtype: torch.dtype
    elements: int


def products_on(device: str, dtype: torch.dtype) -> Products:
    """For a weight of ``dtype`` on this kind of device: in autocast's dtype where that is on, else in the weight's `product_dtype`."""
    autocast = dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return Products(torch.get_autocast_dtype(device) if autocast else product_dtype(dtype, device), _SLICE.get(device, _LAUNCHED))


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, products: Products | None = None) -> Tensor:
    """Sum over tokens of the cross-entropy in nats of softmax(hidden @ weight^T); targets that are `IGNORED` count for nothing.

    `hidden` (N, d), `weight` (V, d), INT8 or not, `targets` (N,) in [0, V) or `IGNORED`; at most chunk x V logits exist at once.
    Matrices multiply as `products` says, by default as `products_on` their device. Softmax and sums are in float32, or float64 where the
    weight is; so is the loss, 0-d. Differentiable once, in `hidden` and `weight`: each gradient has its tensor's dtype.
    """
    recorded = torch.is_grad_enabled()
    wanted = (recorded and hidden.requires_grad, recorded and weight.requires_grad)
    products = products or products_on(weight.device.type, weight.dtype)
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets, chunk, products, wanted)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, products: Products, wanted: tuple[bool, bool]
    ) -> Tensor:
        exact = _wide(weight)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        log_sums = torch.empty(len(hidden), dtype=exact, device=hidden.device)  # of the exponentials of a token's logits
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        later = wanted[1] and weight.dtype != exact
        of_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wanted[1] and not later else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            own = None if of_hidden is None else of_hidden[part]
            total += _one_chunk(hidden[part].to(products.dtype), weight, targets[part], log_sums[part], own, of_weight, products.elements)
        ctx.save_for_backward(of_hidden, of_weight, *((hidden, weight, targets, log_sums) if later else ()))
        ctx.chunk, ctx.products = chunk, products
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, *again = ctx.saved_tensors
        # In place, all three: a second backward pass over the same graph is refused by autograd, as its saved tensors have changed.
        if of_hidden is not None:
            of_hidden.mul_(scale)
        if of_weight is not None:
            of_weight.mul_(scale)
        if again:
            hidden, weight, targets, log_sums = again
            most = ctx.chunk * len(weight) // max(1, len(hidden))  # rows of which all tokens have as many logits as a chunk has of all
            elements = min(ctx.products.elements, most * weight.shape[1])
            of_weight = _by_weight(hidden.to(ctx.products.dtype), weight, targets, log_sums.neg_(), scale, elements)
        return of_hidden, of_weight, None, None, None, None


def _one_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    of_hidden: Tensor | None,
    of_weight: Tensor | None,
    elements: int,
) -> Tensor:
    """The loss of `hidden` (c, d), in the dtype of the products. Writes `log_sums` (c,) and, where there is a place for it, its gradient
    by `hidden` (c, d); adds that by `weight` (V, d)."""
    logits = torch.empty(len(hidden), len(weight), dtype=_wide(weight), device=hidden.device)
    for rows, part in _slices(weight, hidden.dtype, elements):
        _multiply(hidden, part.T, logits[:, rows])  # (c, d) @ (d, s) -> (c, s)
    counts = (targets != IGNORED)[:, None]
    places = targets[:, None].where(counts, 0)
    largest = logits.amax(1, keepdim=True)
    own = logits.gather(1, places) - largest
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    torch.add(sums.log(), largest, out=log_sums[:, None])
    loss = (sums.log() - own).where(counts, 0).sum()
    if of_hidden is None and of_weight is None:
        return loss
    grad = logits.mul_(counts / sums)  # softmax - one-hot, 0 where nothing counts: the derivative of the sum by the logits
    grad.scatter_add_(1, places, -counts.to(grad.dtype))
    by_hidden = torch.zeros(hidden.shape, dtype=grad.dtype, device=grad.device)
    for rows, part in _slices(weight, hidden.dtype, elements):
        of_logits = grad[:, rows].to(hidden.dtype)  # (c, s)
        if of_hidden is not None:
            by_hidden += of_logits @ part  # (c, s) @ (s, d)
        if of_weight is not None and of_weight.dtype == of_logits.dtype:
            of_weight[rows].addmm_(of_logits.T, hidden)  # (s, c) @ (c, d)
        elif of_weight is not None:
            of_weight[rows] += of_logits.T @ hidden
    if of_hidden is not None:
        of_hidden.copy_(by_hidden)
    return loss


def _by_weight(hidden: Tensor, weight: Tensor, targets: Tensor, shifts: Tensor, scale: Tensor, elements: int) -> Tensor:
    """The gradient by `weight` (V, d), in its dtype, of `scale` times the loss of `hidden` (N, d), in the dtype of the products.

    `shifts` (N,): minus the logarithm of the sum of the exponentials of each token's logits.
    """
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    factors = (targets != IGNORED) * scale
    for rows, part in _slices(weight, hidden.dtype, elements):
        grad = (hidden @ part.T).to(shifts.dtype).add_(shifts[:, None]).exp_()  # softmax, (N, s)
        places = targets - rows.start
        inside = (places >= 0) & (places < len(part))
        grad.scatter_add_(1, places.where(inside, 0)[:, None], -inside.to(grad.dtype)[:, None])
        grad = grad.mul_(factors[:, None]).to(hidden.dtype)
        _multiply(grad.T, hidden, out[rows])  # (s, N) @ (N, d), rounded to the weight's dtype once
    return out


def _slices(weight: Tensor, dtype: torch.dtype, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their weights in `dtype`), about `elements` at a time: no converted or decoded copy is larger."""
    unit, (V, d) = row_unit(weight), weight.shape
    for units in parts(-(-V // unit), elements // max(1, unit * d)):
        rows = slice(units.start * unit, min(units.stop * unit, V))
        part = rows_of(weight, rows)
        yield rows, part.dequantize(dtype) if isinstance(part, Int8Weight) else part.to(dtype)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b into `out`, which may be of another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
