"""A communication hook for DistributedDataParallel: between refreshes R crosses the wire in the place of the gradient.

For training without `fused_backward`: gradients stay whole in ``p.grad``, as basis R or R basis^T, of which the optimizer's projection is R
again. What the optimizer would drop is not sent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from galore_torch.engine import step as engine
from galore_torch.engine.layout import ParamView
from galore_torch.engine.recipe import needs_gradient
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.ops.linalg import as_real
from galore_torch.optim.base import LowRankOptimizer, without_autocast
from galore_torch.optim.wrapped import refuse_join, wrappers


class LowRankHookState:
    """What `low_rank_hook` knows: the optimizer, whose bases and schedule all processes share, and how R travels.

    process_group: that of the wrapper; None: all processes. reduce_dtype: torch.float32, torch.bfloat16, or None, that of the gradients; it
    holds for all that is averaged. Norms of ``p.grad``, such as those that clipping measures, are those of R.

    Raises ValueError for another optimizer's class, and for another dtype.
    """

    def __init__(self, optimizer: LowRankOptimizer, process_group: Any = None, reduce_dtype: torch.dtype | None = None) -> None:
        if not isinstance(optimizer, LowRankOptimizer):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}: low_rank_hook needs one of galore_torch, such as GaLoreAdamW")
        if reduce_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"reduce_dtype={reduce_dtype!r} is not torch.float32, torch.bfloat16 or None, which is the gradients' dtype")
        self.process_group, self.reduce_dtype = process_group, reduce_dtype
        self._optimizer = weakref.ref(optimizer)
        self._wrapper: Callable[[], Any] = lambda: None

    def check_join(self, p: Tensor) -> None:
        """Raise ValueError inside of the wrapper's `join()`: a process without batches does not know which bases are due."""
        wrapper = self._wrapper()
        if wrapper is None:
            wrapper = next(each for each in wrappers() if any(p is other for other in each.parameters()))
            self._wrapper = weakref.ref(wrapper)
        refuse_join(wrapper, "low_rank_hook")

    def projected(self, p: Tensor) -> ParamView | None:
        """The parameter as a step sees it, where R of its gradient is all that the step will use; else None."""
        optimizer = self._optimizer()
        if optimizer is None or not optimizer.knows(p):
            return None
        view = optimizer.view_of(p)
        whole = not view.layout.ranks or view.projector.elements or needs_gradient(view.group)
        return None if whole or refresh_is_due(view.state, view.group) else view


def low_rank_hook(state: LowRankHookState, bucket):  # type: ignore[no-untyped-def]  # the wrapper refuses annotations that are strings
    """The mean over processes of a bucket's gradients, each projected weight's within its basis, and whole where its basis is due.

    Register it with ``wrapped.register_comm_hook(LowRankHookState(optimizer), low_rank_hook)``.
    """
    state.check_join(bucket.parameters()[0])
    buffer, grads = bucket.buffer(), _gradients(bucket)
    views = [state.projected(p) for p in bucket.parameters()]
    with torch.no_grad(), without_autocast([buffer]):
        payloads = [as_real(grad if view is None else engine.project(view, grad)) for view, grad in zip(views, grads, strict=True)]
        size = distributed.get_world_size(state.process_group)
        dtype = state.reduce_dtype or buffer.dtype
        flat = torch.cat([payload.reshape(-1).to(dtype) for payload in payloads]).div_(size)
    sizes = [payload.numel() for payload in payloads]

    def unpack(_: Any) -> Tensor:
        with torch.no_grad():
            for view, grad, mean in zip(views, grads, flat.split(sizes), strict=True):
                layout = None if view is None else view.layout
                low = grad if layout is None else grad.new_empty(layout.low_shape, dtype=layout.compute_dtype)
                as_real(low).copy_(mean.view(as_real(low).shape))
                if view is not None:
                    engine.unproject(view, low, grad)
        return buffer

    future: Any = distributed.all_reduce(flat, group=state.process_group, async_op=True).get_future()
    answer: torch.futures.Future[torch.Tensor] = future.then(unpack)
    return answer


def _gradients(bucket: Any) -> list[Tensor]:
    """Views of the bucket's buffer in the shapes of its parameters. ``bucket.gradients()`` shows half of the numbers of a complex one."""
    grads, place = [], 0
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        numbers = as_real(p).numel()
        part = bucket.buffer()[place : place + numbers]
        grads.append(torch.view_as_complex(part.view(*p.shape, 2)) if p.is_complex() else grad)
        place += numbers
    return grads
