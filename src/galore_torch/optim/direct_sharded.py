"""Direct backward passes under FSDP2: R of a whole weight, made by each process from its own batch, and shared out as rows.

`fully_shard` puts a weight together for the time of a pass, under the name of its shard. It shares out the gradients that autograd has
made of it, and there is none: what crosses the wire is R, r / n of the gradient's bytes, and thin products where a basis is due.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from galore_torch.engine import step as engine
from galore_torch.engine.processes import Processes
from galore_torch.engine.sharding import place_of
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.direct_backward import DirectLayer


class ShardedLayer(DirectLayer):
    """A linear layer whose weight is cut between ``processes``; all of them use it in every backward pass."""

    def __init__(self, processes: Processes, *arguments: Any) -> None:
        self.processes = processes
        super().__init__(*arguments)

    def is_own(self, weight: Tensor) -> bool:
        """Whether it is what the shard has been put together to."""
        return place_of(weight) is None and weight.shape == self.weight.shape

    def used_weight(self) -> Tensor:
        module: Any = self._module()
        held = self.weight if module is None else module.weight
        return cast(Tensor, held if self.is_own(held) else self.weight)

    def in_graph(self) -> Tensor:
        return self.used_weight().detach()

    def check(self, version: int) -> None:
        super().check(version)
        if not self.is_own(self.used_weight()):
            raise RuntimeError(
                f"the weight of layer {self.name} is not put together in its backward pass: call backward() on the whole model's loss"
            )

    def deliver(self, low: Tensor | None, factors: OuterProduct | None) -> None:
        """The mean over processes, and of that this process' rows."""
        shared = None
        if factors is not None:
            shared = SharedGradient((factors,), self.weight.shape, factors.dtype, factors.device, self.processes)
        self.finish(self.weight, None if low is None else engine.share_out(self.seen(), low), shared)
