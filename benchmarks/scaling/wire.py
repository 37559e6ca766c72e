"""What crosses the wire in a step, by the planner's own sizes, and how long that takes on links of a stated speed.

Bytes are those of what a collective is given, or of what it puts together; `Links` knows what its algorithm sends of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from galore_torch.train.model.sizes import Part
from galore_torch.train.plan.analytic import PlanRequest
from galore_torch.train.plan.methods import Cost

FP32 = 4
FLAG = 1  # whether any process has used the matrix: a number beside R
SEEN = 4  # two pairs of extremes, by which processes agree on whether a gradient may make a basis


@dataclass(frozen=True)
class Traffic:
    """Bytes in a step, of one process: ``reduced`` by all-reduces, ``gathered`` and ``scattered`` (reduce-scatter) as wholes."""

    reduced: float = 0.0
    gathered: float = 0.0
    scattered: float = 0.0


def matrices(request: PlanRequest) -> Iterator[tuple[int, Part, Cost]]:
    """(how many, one of them, what it costs) of the projected matrices."""
    for count, parts in ((request.sizes.layers, request.layer), (1, request.outer)):
        yield from ((count * part.count, part, each) for part, each in parts if part.projected and each.low)


def plain(request: PlanRequest) -> Traffic:
    """DistributedDataParallel alone: every gradient, in the weights' dtype."""
    return Traffic(reduced=request.total("weight"))


def low_rank(request: PlanRequest, itemsize: int = FP32) -> Traffic:
    """`fused_backward` in mode "project" or "direct": R of the projected matrices, ``itemsize`` bytes an element, the others whole."""
    low = sum(count * (each.low // FP32 + FLAG) * itemsize for count, _, each in matrices(request))
    projected = sum(count * each.weight for count, _, each in matrices(request))
    return Traffic(reduced=request.total("weight") - projected + low)


def refresh(request: PlanRequest, part: Part) -> int:
    """One refresh of one matrix by "power": thin products with the gradient, and whether it may make a basis."""
    m, n = part.shape
    if request.shards > 1:  # the basis lies on the columns: a sum of n x r, and of the r norms that find blind columns
        return FP32 * (request.rank * n + request.rank + SEEN)
    return FP32 * (request.rank * (m + n) + m + 1)


def refreshes(request: PlanRequest) -> float:
    """Of all matrices, each once in a gap, spread over its steps."""
    return sum(count * refresh(request, part) for count, part, _ in matrices(request)) / int(request.settings["update_proj_gap"])


def sharded(whole: PlanRequest) -> Traffic:
    """One forward and backward pass under `fully_shard`: a layer's weights are gathered in both, those outside of the layers once."""
    outer = sum(part.count * each.weight for part, each in whole.outer)
    weights = whole.total("weight")
    return Traffic(gathered=2 * weights - outer, scattered=weights)


def optimizer_flops(request: PlanRequest) -> float:
    """The products of projection and back: 2 m n r each."""
    return sum(count * 4.0 * part.elements / part.count * request.rank for count, part, _ in matrices(request))


@dataclass(frozen=True)
class Links:
    """``inner``: bytes a second that a device sends to others of its node, and as many that it receives; ``outer``: to other nodes."""

    devices: int
    inner: float
    outer: float
    node: int = 8

    @property
    def ways(self) -> tuple[int, int]:
        """(devices of one node, nodes)."""
        here = min(self.node, self.devices)
        return here, self.devices // here

    def sent(self, traffic: Traffic) -> tuple[float, float]:
        """Bytes that a device sends (in its node, to other nodes): of an all-reduce twice those of a gather or a reduce-scatter.

        Between nodes each device of a node sends its share of what the node has reduced, as rings with a network card for each device do.
        """
        here, nodes = self.ways
        total = 2 * traffic.reduced + traffic.gathered + traffic.scattered
        return total * (here - 1) / here, total * (nodes - 1) / nodes / here

    def seconds(self, *traffics: Traffic) -> float:
        inner, outer = (sum(bytes_) for bytes_ in zip(*map(self.sent, traffics), strict=True))
        return inner / self.inner + outer / self.outer


def hybrid_seconds(links: Links, whole: PlanRequest, passes: int, traffic: Traffic) -> float:
    """HSDP: each node shares the model and gathers in itself; between nodes a device reduces its part of the gradients once a step."""
    here, nodes = links.ways
    inside = Links(here, links.inner, links.outer, links.node)
    between = 2 * whole.total("weight") / here * (nodes - 1) / nodes
    return passes * inside.seconds(sharded(whole)) + inside.seconds(traffic) + between / links.outer
