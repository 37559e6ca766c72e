"""Low-rank gradients under DistributedDataParallel: what crosses the wire is R, made by each process in a basis that all have.

Projection is linear, so the mean of the processes' R is the R of the mean gradient. A weight has its turn when all of its gradient of
this backward pass is there, and the weights take their turns in one order in all processes: first its basis, where that is due, is found
by all together (`engine.shared_gradient`), then its R joins a bucket, which is sent while the backward pass goes on.
A process that has not used a weight takes its turn too, at the end of the pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from galore_torch.engine.processes import MeanBucket, Processes
from galore_torch.engine.recipe import needs_gradient
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.ops.linalg import as_real
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.base import LowRankOptimizer, without_autocast
from galore_torch.optim.joined import agree, hand_on
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad
from galore_torch.optim.wrapped import give_back, is_joining, joins, leave_out

Found = tuple["Tensor | None", "Tensor | OuterProduct | None"]  # R, and a part that is not projected


@dataclass
class _Part:
    """What this pass has made of one weight's gradient: R, and what is not projected yet."""

    low: Tensor | None = None
    terms: list[Tensor | OuterProduct] = field(default_factory=list)


class Averaging:
    """The projected weights of one attachment, whose gradients a wrapper has left to it.

    ``averaged(p)`` is called when the mean is in ``p.grad``: inside the backward pass where ``updates``, else not at all.
    """

    def __init__(
        self, optimizer: LowRankOptimizer, weights: Sequence[Tensor], wrapper: DistributedDataParallel, dtype: torch.dtype | None
    ) -> None:
        self.averaged: Callable[[Tensor], None] | None = None
        self._optimizer, self._wrapper = weakref.ref(optimizer), weakref.ref(wrapper)
        self._dtype, self._most = dtype, wrapper.bucket_bytes_cap
        self._processes = Processes(wrapper.process_group)
        self._order = list(weights)[::-1]  # about that of the backward pass, until the first one has shown it
        self._is_shown = False
        self._gives_back = weakref.finalize(optimizer, give_back, self._wrapper, leave_out(wrapper, weights))
        self._gives_back.atexit = False
        own = weakref.ref(self)
        before = _Weakly(own, Averaging.before)
        self._handles = [p.register_hook(before) for p in weights]
        self._weights = set(weights)
        self._idle: set[Tensor] = set()  # not used by this process in this step, whose gradient of zeros took part in a refresh
        self._is_away = False  # inside of `join()`, without batches
        self._leaves_join = joins(wrapper, _Weakly(own, Averaging.shadow), _Weakly(own, Averaging.end_join))
        self._reset()

    def _reset(self) -> None:
        self._is_open, self._sends, self._next = False, False, 0
        self._parts: dict[Tensor, _Part] = {}
        self._held: dict[Tensor, LowRankGrad] = {}  # of earlier micro-batches
        self._ready: dict[Tensor, None] = {}  # as they came
        self._settled: set[Tensor] = set()
        self._seen: set[tuple[Tensor, str]] = set()
        self._waiting: list[Tensor] = []  # for the next bucket
        self._sent: list[tuple[list[Tensor], MeanBucket]] = []

    def __contains__(self, p: Tensor) -> bool:
        return p in self._weights

    def is_of(self, weights: Iterable[Tensor]) -> bool:
        return self._weights == set(weights)

    def serves(self, wrapper: DistributedDataParallel) -> bool:
        return self._wrapper() is wrapper

    def close(self) -> None:
        """The wrapper averages full gradients again, from its next forward pass on. So it does when the optimizer is gone."""
        for handle in self._handles:
            handle.remove()
        self._gives_back()
        self._leaves_join()

    # --- one backward pass ------------------------------------------------------------------------------------------------

    def watch(self, output: Any) -> None:
        """Begin with the backward pass of this output: before any gradient is made, and in the outermost pass of nested ones."""
        wrapper = self._wrapper()
        if wrapper is None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:  # recomputed by a checkpoint
            return
        if self._is_open:  # the last pass has failed
            self._give_back()
        sends = wrapper.require_backward_grad_sync
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.begin(sends))

    def begin(self, sends: bool | None = None) -> None:
        """Open a pass, once. ``sends``: whether it ends in the mean, which passes under ``no_sync`` do not."""
        if self._is_open or self._optimizer() is None or (wrapper := self._wrapper()) is None:
            return
        self._is_open = True
        self._sends = wrapper.require_backward_grad_sync if sends is None else sends
        if self.averaged is not None and not self._sends:
            raise RuntimeError(
                "a backward pass under no_sync() leaves gradients to be added up, and fused_backward in mode='update' or 'direct_update' "
                "uses each one up: use mode='project' or 'direct', or leave no_sync out"
            )
        for p in self._order:
            if isinstance(p.grad, LowRankGrad):
                self._held[p], p.grad = p.grad, None
            elif p.grad is not None and not isinstance(p.grad, ConsumedGrad) and not self._is_away:  # made before there was an attachment
                self._parts[p], p.grad = _Part(terms=[p.grad]), None
        if is_joining(wrapper):
            self._agree()
        if not self._is_away:
            engine_of_autograd: Any = torch.autograd.Variable._execution_engine
            engine_of_autograd.queue_callback(self._end)

    def _agree(self) -> None:
        """What has to be known in a process that is away: how far the others are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        begins = [p not in self._held or self._held[p].empty for p in self._order]
        begins = agree(optimizer, self._order, begins, self._processes, self._is_away)
        if self._is_away:
            for p, begins_step in zip(self._order, begins, strict=True):
                p.grad = None
                if begins_step:
                    self._held.pop(p, None)

    def shadow(self) -> None:
        """A backward pass of the others inside of `join()`: this process, which has no batch, takes all turns without gradients."""
        if self._optimizer() is None:
            return
        self._is_away = True
        self.begin(True)
        self._end()

    def end_join(self, source: int) -> None:
        """All processes have joined, and go on from what the ``source`` process has."""
        if (optimizer := self._optimizer()) is None:
            return
        if self._is_away:
            for p in self._weights:
                p.grad = None
        self._is_away = False
        with torch.no_grad():
            hand_on(optimizer, self._order, self._processes, source)

    def before(self, _: Tensor) -> None:
        """A weight's gradient is about to be added to what it has."""
        self.begin()

    def has(self, p: Tensor, kind: str) -> bool:
        return (p, kind) in self._seen

    @torch.no_grad()
    def arrived(self, p: Tensor, kind: str, found: Found, waits: bool) -> None:
        """A part of one weight's gradient. ``kind``: "plain", a gradient as it was made, or "direct"; ``waits``: the other is to come."""
        self.begin()
        if p in self._settled or self.has(p, kind):
            raise RuntimeError(
                f"two gradients of one weight of shape {tuple(p.shape)} were made in one backward pass, after the first was sent to the "
                "other processes: reentrant checkpoints of a layer that is used twice do so; give checkpoint(use_reentrant=False)"
            )
        self._seen.add((p, kind))
        part = self._parts.setdefault(p, _Part())
        low, term = found
        if low is not None:
            part.low = low if part.low is None else part.low + low
        if term is not None:
            part.terms.append(term)
        if not waits:
            self._ready[p] = None
        self._advance()

    def _advance(self, to_the_end: bool = False) -> None:
        """Let the weights that are ready take their turns."""
        while self._next < len(self._order) and (to_the_end or self._order[self._next] in self._ready):
            p = self._order[self._next]
            self._next += 1
            self._settled.add(p)
            with without_autocast([p]):
                self._settle(p)
            if self._sends:
                self._send(p)

    def _settle(self, p: Tensor) -> None:
        """What this process has of the gradient is in ``p.grad``, in a basis that all processes have."""
        optimizer, part, held = self._optimizer(), self._parts.pop(p, None) or _Part(), self._held.pop(p, None)
        if optimizer is None:
            return
        if held is not None:
            p.grad = held
        if isinstance(p.grad, ConsumedGrad):
            p.grad.refuse()
        view = optimizer.view_of(p)
        is_used = bool(part.terms) or part.low is not None
        if needs_gradient(view.group):
            p.grad = _sum(part.terms)
            return
        due = refresh_is_due(view.state, view.group, part.low is None and (held is None or held.empty))
        if due or part.terms:
            terms = tuple(term if isinstance(term, OuterProduct) else term.reshape(view.layout.view) for term in part.terms)
            dtype = terms[0].dtype if terms else view.layout.compute_dtype
            size = torch.Size(view.layout.view)
            shared = SharedGradient(tuple(term.to(dtype) for term in terms), size, dtype, p.device, self._processes)
            optimizer.add_low_rank(p, part.low, shared)
        elif part.low is not None:
            optimizer.add_low_rank(p, part.low, None)
        if is_used:
            self._idle.discard(p)
        elif due and held is None:
            self._idle.add(p)

    def _send(self, p: Tensor) -> None:
        self._waiting.append(p)
        kinds = {self._payload(other).dtype for other in self._waiting[-2:]}
        if len(kinds) > 1:
            self._flush(self._waiting[:-1])
            self._waiting = self._waiting[-1:]
        if sum(self._payload(other).nbytes for other in self._waiting) >= self._most:
            self._flush(self._waiting)
            self._waiting = []

    def _payload(self, p: Tensor) -> Tensor:
        """What the processes average: R, or the gradient where a row reads it; zeros, which own no memory, where there is none here."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if isinstance(p.grad, LowRankGrad):
            return p.grad.low
        if p.grad is not None:
            return p.grad
        view = optimizer.view_of(p)
        zero = torch.zeros((), dtype=p.dtype if needs_gradient(view.group) else view.layout.compute_dtype, device=p.device)
        return zero.expand(p.shape if needs_gradient(view.group) else view.layout.low_shape)

    def _flush(self, weights: list[Tensor]) -> None:
        if weights:
            payloads = [as_real(self._payload(p)) for p in weights]
            used = [p.grad is not None and p not in self._idle for p in weights]
            self._sent.append((weights, MeanBucket(payloads, used, self._processes, self._dtype or payloads[0].dtype)))
        if self.averaged is not None:  # the one before has had the time of a bucket
            while len(self._sent) > 1:
                self._receive(*self._sent.pop(0))

    def _receive(self, weights: list[Tensor], bucket: MeanBucket) -> None:
        optimizer = self._optimizer()
        for p, mean in zip(weights, bucket.means(), strict=True):
            self._idle.discard(p)
            if mean is None:
                p.grad = None
                continue
            if p.grad is None and optimizer is not None:
                if needs_gradient(optimizer.group_of(p)):
                    p.grad = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                else:
                    optimizer.add_low_rank(p, torch.zeros_like(self._payload(p)), None)
            payload = self._payload(p)
            assert not payload.is_conj(), "its real view would be a copy"
            to = as_real(payload)
            to.copy_(mean.view(to.shape))
            if self.averaged is not None and not self._is_away:
                self.averaged(p)

    @torch.no_grad()
    def _end(self) -> None:
        """After all of the backward pass: the weights that it has not reached take their turns, and the means are waited for."""
        if self._optimizer() is None:
            return self._reset()
        sends, ready = self._sends, self._ready
        self._advance(to_the_end=True)
        self._flush(self._waiting)
        for sent in self._sent:
            self._receive(*sent)
        self._reset()
        if sends and not self._is_shown and self._order:
            self._follow(ready)

    def _give_back(self) -> None:
        for p, held in self._held.items():
            p.grad = held
        self._reset()

    def _follow(self, ready: Iterable[Tensor]) -> None:
        """From now on the weights take their turns in the order in which the first process's first backward pass reached them."""
        self._is_shown = True
        place = {p: i for i, p in enumerate(self._order)}
        order = list(dict.fromkeys([*ready, *self._order]))
        places = torch.tensor([place[p] for p in order], device=order[0].device)
        self._processes.from_one([places])
        self._order = [self._order[int(i)] for i in places]


class _Weakly:
    """A method of what it holds weakly."""

    def __init__(self, averaging: Callable[[], Averaging | None], method: Callable[..., None]) -> None:
        self.averaging, self.method = averaging, method

    def __call__(self, *arguments: Any) -> None:
        if (averaging := self.averaging()) is not None:
            self.method(averaging, *arguments)


def _sum(terms: Sequence[Any]) -> Tensor | None:
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model returns: nests of lists, mappings and objects with attributes such as dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dict__") and not isinstance(output, torch.nn.Module | type):
        yield from _tensors(vars(output))
