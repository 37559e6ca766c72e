"""What a step costs, measured from outside: gradient norm, time, refreshes, memory, and how far each subspace turned.

Reads the optimizer's state and changes nothing in it: a run is bit-equal with and without. Imports torch only inside functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_torch.train.optimizers.registry import state_bytes, stored_parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from galore_torch.slots.subspace import Bases

_MB = 1e6


class Probe:
    """Measures one step after the other: begin, saving, gradient_norm, stepping, finish, in this order."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str, *, track_subspace: bool) -> None:
        from galore_torch.optim.fused_backward import attachment_of

        self.model, self.optimizer, self.device, self.track_subspace = model, optimizer, device, track_subspace
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._first = True  # sizes do not change from step to step: they are measured in the first
        self._memory: dict[str, int] = {}
        self._due: list[_Matrix] = []
        self._old: dict[str, Bases] = {}
        self._optimizer_s: float | None = None
        self._finite: Tensor | None = None  # of the gradients that updates inside the backward pass consume, a 0-d bool
        for parameter in self._names:
            if (attachment := attachment_of(parameter)) is not None:
                parameter.register_hook(self._look_at)
                attachment.look = self._look_at  # of layers that make no such gradient, and of parts of weights

    def begin(self) -> None:
        """Which refreshes are due. Before the first forward pass, for per-layer updates refresh inside the backward pass."""
        self._finite = None
        self._due = [matrix for matrix in self._matrices() if matrix.is_due()]
        if self.track_subspace:
            self._old = {matrix.name: matrix.bases(copy=True) for matrix in self._due if matrix.ready()}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a forward pass: the first of all measures what is kept for the backward pass."""
        if "activations" in self._memory or not self._first:
            yield
            return
        from torch.autograd.graph import saved_tensors_hooks

        kept: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            for part in stored_parts(tensor):
                storage = part.untyped_storage()
                kept[storage.data_ptr()] = storage
            return tensor.detach()  # a node that held its own output would never be freed

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        # Of a model that is cut: its layers' whole weights are gone by now, and those outside of them are weights as long as they stay.
        own = {tensor.untyped_storage().data_ptr() for tensor in self._weights()}
        self._memory["activations"] = sum(storage.nbytes() for place, storage in kept.items() if place not in own)

    def gradient_norm(self) -> dict[str, float]:
        """{"grad_norm": the 2-norm of all gradients}; {} where updates inside the backward pass have consumed them, NaN if one was bad."""
        from torch.nn.utils import get_total_norm

        from galore_torch.engine.sharding import local
        from galore_torch.optim.low_rank_grad import ConsumedGrad

        gradients = self._gradients()
        if any(isinstance(local(grad), ConsumedGrad) for grad in gradients):
            return {} if self._finite is None or bool(self._finite) else {"grad_norm": math.nan}
        return {"grad_norm": as_number(get_total_norm(gradients))}

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around `optimizer.step()`: its seconds, where all of the optimizer's work happens there."""
        gradients = self._gradients()
        if self._first:
            self._memory["gradients"] = sum(_held_bytes(grad) for grad in gradients)
        whole = not any(_is_stand_in(grad) for grad in gradients)
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._optimizer_s = time.perf_counter() - start if whole else None

    def finish(self) -> dict[str, Any]:
        """Fields of this step's row: optimizer_s, refreshes, overlap, and once memory_mb; left out where not known."""
        from galore_torch.optim.base import LowRankOptimizer

        row: dict[str, Any] = {}
        if self._optimizer_s is not None:
            row["optimizer_s"] = round(self._optimizer_s, 6)
        if isinstance(self.optimizer, LowRankOptimizer):
            row["refreshes"] = len(self._due)
        # A basis that is not ready now met an unusable gradient, and is still the old one.
        turned = [matrix for matrix in self._due if matrix.name in self._old and matrix.ready() and matrix.compares()]
        if turned:
            row["overlap"] = {matrix.name: matrix.overlap(self._old[matrix.name]) for matrix in turned}
        if self._first:
            self._memory |= {"weights": sum(tensor.nbytes for tensor in self._weights()), "optimizer": state_bytes(self.optimizer)}
            row["memory_mb"] = {name: self._memory[name] / _MB for name in ("weights", "gradients", "optimizer", "activations")}
            self._first = False
        return row

    def _look_at(self, gradient: Tensor | None) -> None:
        from galore_torch.ops.linalg import finite

        if gradient is None:  # a compiled graph calls the hooks of every weight
            return
        good = finite(gradient)
        self._finite = good if self._finite is None else self._finite & good

    def _weights(self) -> list[Tensor]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [part for tensor in tensors for part in stored_parts(tensor)]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._names if p.grad is not None]

    def _matrices(self) -> Iterator[_Matrix]:
        """The matrices that hold a low-rank state."""
        from galore_torch.engine import step as engine
        from galore_torch.optim.base import LowRankOptimizer

        if isinstance(self.optimizer, LowRankOptimizer):
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    state = self.optimizer.state.get(p)
                    if state and engine.layout_of(p, group).ranks:
                        yield _Matrix(self._names[p], p, state, group)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


class _Matrix(NamedTuple):
    """One projected parameter, as the optimizer holds it."""

    name: str
    parameter: Tensor
    state: dict[str, Any]
    group: dict[str, Any]

    def is_due(self) -> bool:
        from galore_torch.engine.refresh import refresh_is_due

        return refresh_is_due(self.state, self.group)

    def ready(self) -> bool:
        from galore_torch.engine.refresh import has_basis

        return has_basis(self.state)

    def bases(self, copy: bool = False) -> Bases:
        from galore_torch.engine import step as engine

        found = {axis: stored.decode(self.state) for axis, stored in engine.layout_of(self.parameter, self.group).bases.items()}
        return {axis: basis.clone() for axis, basis in found.items()} if copy else found

    def compares(self) -> bool:
        """Whether two of its bases have an overlap."""
        from galore_torch.slots.projectors import PROJECTORS

        return PROJECTORS[self.group["projector"]].overlap is not None

    def overlap(self, old: Bases) -> float:
        """The share of the old subspace that the new one kept: 1 the same, about r / m unrelated. The mean over axes and matrices."""
        from galore_torch.slots.projectors import PROJECTORS
        from galore_torch.slots.subspace import kept_share

        overlap = PROJECTORS[self.group["projector"]].overlap
        assert overlap is not None
        share = kept_share(overlap(self.bases(), old))
        return round(share.mean().item(), 6)


def as_number(norm: Tensor) -> float:
    """A norm, which is a sum over processes where gradients are parts: all of them ask for it."""
    whole: Any = norm
    return float(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)


def _is_stand_in(grad: Tensor) -> bool:
    from galore_torch.engine.sharding import local
    from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad

    return isinstance(local(grad), (ConsumedGrad, LowRankGrad))


def _held_bytes(grad: Tensor) -> int:
    """Bytes behind a gradient: of its low-rank part where that is all there is, none where it was consumed."""
    from galore_torch.engine.sharding import local
    from galore_torch.optim.low_rank_grad import LowRankGrad

    if isinstance(own := local(grad), LowRankGrad):
        return own.low.nbytes
    return 0 if _is_stand_in(grad) else sum(part.nbytes for part in stored_parts(grad))
