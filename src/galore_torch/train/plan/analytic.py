"""The memory of a step, phase by phase, by arithmetic: when is most held, and of what?

For transformers' LLaMA on torch's flash attention. N tokens in a forward pass, D the width, I the MLP's, V the vocabulary;
b bytes an element. The loss is the trainer's: cross-entropy in fp32 over all logits at once, or over a chunk of tokens' (chunked_loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from galore_torch.train.model.sizes import Part, Sizes, Targets
from galore_torch.train.optimizers.registry import backward_mode
from galore_torch.train.plan.methods import FACTORED, Cost, cost, thin_input, trained_parts

STEP = "the optimizer's step"
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PlanRequest:
    """One run, as far as its memory goes. ``settings``: what `build_optimizer` takes; ``deferred``: accumulation or clipping is on.

    ``refreshing``: whether every basis is made in the step, as in the first of a run; else a few matrices have their turn.
    """

    sizes: Sizes
    optimizer: str
    dtype: str
    length: int
    batch: int
    accumulation: int = 1
    deferred: bool = False
    checkpointing: bool = False
    chunk: int = 0  # tokens that have logits at once, 0: all
    device: str = "cuda"
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""  # name or path, for a trace
    pretrained: bool = False  # whether `model` is transformers' own, not a LLaMA's sizes
    targets: Targets = None  # what `sizes` has as projected
    gradients: str = "full"  # --gradients, settled
    refreshing: bool = True
    shards: int = 1  # processes that share every parameter, as under `fully_shard`

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def rank(self) -> int:
        return int(self.settings["rank"])

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @cached_property
    def widened(self) -> int:
        """Bytes an element that a product of 16-bit matrices needs for its result in fp32: on CPUs without bf16 arithmetic."""
        import torch

        from galore_torch.ops.linalg import product_dtype

        slow = self.device == "cpu" and self.itemsize == 2 and product_dtype(torch.bfloat16, "cpu") == torch.float32
        return 4 if slow else 0

    @cached_property
    def layer(self) -> list[tuple[Part, Cost]]:
        return self._costs(self.sizes.layer)

    @cached_property
    def outer(self) -> list[tuple[Part, Cost]]:
        return self._costs(self.sizes.outer)

    def _costs(self, parts: tuple[Part, ...]) -> list[tuple[Part, Cost]]:
        return [
            (part, cost(part, trained, self.optimizer, self.dtype, self.device, self.settings, self.tokens * self.direct, self.shards))
            for part, trained in trained_parts(self.optimizer, parts, self.rank, self.settings.get("lora_alone", False))
        ]

    @property
    def mode(self) -> str | None:
        """Of `fused_backward`; None: an ordinary backward pass."""
        return backward_mode(self.optimizer, self.gradients, deferred=self.deferred)

    @property
    def direct(self) -> bool:
        """Whether linear layers make their low-rank gradients themselves."""
        return self.gradients == "direct"

    @property
    def updates(self) -> bool:
        """Whether weights are updated inside the backward pass."""
        return self.mode in ("update", "direct_update")

    def total(self, field: str) -> int:
        """Of the whole model: a field of Cost, added up."""
        inner = sum(part.count * getattr(each, field) for part, each in self.layer)
        return self.sizes.layers * inner + sum(part.count * getattr(each, field) for part, each in self.outer)

    def kept(self, each: Cost) -> int:
        """Bytes of a parameter's gradient from its backward pass to the step."""
        if self.mode is None:
            return each.gradient
        if self.updates:
            return 0
        return each.low or each.gradient

    def kept_of(self, costs: list[tuple[Part, Cost]]) -> int:
        return sum(part.count * self.kept(each) for part, each in costs)


@dataclass(frozen=True)
class Phase:
    """What is held at one point of a step, in bytes, beside weights and state."""

    name: str
    gradients: int
    activations: int
    logits: int
    transient: int
    unpacked: int = 0  # the part of `transient` that no trace of an ordinary model sees: a quantised weight, unpacked
    gathered: int = 0  # what shards are put together to: whole weights, and gradients before they are shared out

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.transient + self.gathered


def phases(request: PlanRequest) -> Iterator[Phase]:
    """The points of a step at which most can be held, in order."""
    whole = gathered(request)
    for phase in _phases(request):
        yield phase if phase.name == STEP else replace(phase, gathered=whole)


def gathered(q: PlanRequest) -> int:
    """Bytes that `fully_shard`, called on each layer and on the model, puts together for a while, at most.

    Whole weights of the model's own unit (embedding, head, last norm), of a layer and of the next, which is fetched ahead; whole gradients
    of that unit, and of a layer twice: as it is made and as it is shared out.
    """
    if q.shards == 1:
        return 0
    outer, layer = (sum(part.count * prod(part.shape) for part in parts) * q.itemsize for parts in (q.sizes.outer, q.sizes.layer))
    return 2 * outer + 4 * layer


def _phases(request: PlanRequest) -> Iterator[Phase]:
    q, layers = request, request.sizes.layers
    tokens, b, D, I = q.tokens, q.itemsize, q.sizes.hidden, q.sizes.intermediate
    own, rows = layer_activations(q), tokens * D * b
    saved = rows if q.checkpointing else own  # of a layer, from the forward pass
    whole = kept_whole(q)
    end = final_activations(q) + whole
    outer = q.kept_of(q.outer)
    inner = q.kept_of(q.layer)
    embedding = next(each for part, each in q.outer if part.role == "embedding")
    head = next((each for part, each in q.outer if part.role == "head"), embedding)
    again = q.accumulation > 1  # the gradients of earlier forward passes are there from the start
    before = outer + layers * inner if again else 0

    yield from _loss_phases(q, before, layers * saved + end, head)
    if q.mode:
        yield Phase("the head's update", before + head.gradient, layers * saved + end, 0, rows + passing_bytes(q, head))
    for index, name in ((layers - 1, "the last layer's backward pass"), (0, "the first layer's backward pass")):
        done = before or q.kept(head) + (layers - 1 - index) * inner
        pending = max(each.gradient for _, each in q.layer)
        held = index * saved + own + whole + (rows if q.checkpointing and b == 2 else 0)
        unpacked = max(each.unpacked for _, each in q.layer)  # and not while a gradient is widened
        pair = tokens * I * b  # the gradient of one of the MLP's products
        widest = max(prod(part.shape) for part, _ in q.layer) * q.widened
        yield Phase(name, done + pending, held, 0, rows + max(2 * pair, pair + max(widest, unpacked)), max(0, unpacked - widest))
        if q.mode:
            worst = max((each for _, each in q.layer), key=lambda each: each.gradient + passing_bytes(q, each))
            passing = rows + pair * q.direct + passing_bytes(q, worst)  # a layer's own R is made when both of its gradients are there
            yield Phase(name.replace("backward pass", "updates"), done + worst.gradient, held, 0, passing)
    everything = outer + layers * inner
    done = everything if again else everything - q.kept(embedding)
    yield Phase("the embedding's backward pass", done + embedding.gradient, 0, 0, rows + (passing_bytes(q, embedding) if q.mode else 0))
    yield Phase(STEP, everything, 0, 0, step_transient(q))


def _loss_phases(q: PlanRequest, before: int, activations: int, head: Cost) -> Iterator[Phase]:
    """Of the loss and the head's gradient. A loss in chunks makes one in fp32 in the forward pass, and one of 16 bits a slice of the
    vocabulary at a time in the backward pass."""
    import torch

    from galore_torch.train.model.chunked_loss import products_on

    b, D, V, C, N = q.itemsize, q.sizes.hidden, q.sizes.vocabulary, q.chunk, q.tokens
    rows, matrix = N * D * b, V * D
    if not C:
        yield Phase("the loss", before, activations, 12 * N * V, 0)
        yield Phase("the head's backward pass", before + head.gradient, activations, N * V * b, rows + matrix * q.widened)
        return
    part = min(V, max(1, products_on(q.device, getattr(torch, q.dtype)).elements // D))  # rows of the weight, a slice
    narrow = 0 if q.widened or b == 4 else b  # an element of a slice's products before they are wide
    sums = 4 * matrix if head.gradient and b == 4 else 0
    logits = 4 * C * V + narrow * C * part
    yield Phase("the loss", before, activations, logits, rows + sums + part * D * q.widened)
    yield Phase("the loss's gradient", before, activations, logits, rows + sums + C * D * (4 + (narrow or 4)) + part * D * q.widened)
    again, copies = 0, 0
    if head.gradient and b == 2:
        part = min(part, max(1, C * V // N))
        again, copies = (4 + narrow) * N * part, (2 * part + N) * D * q.widened
    yield Phase("the head's backward pass", before + head.gradient, activations, again, rows + copies)


def passing_bytes(q: PlanRequest, each: Cost) -> int:
    """What a hook on this gradient needs: the whole update, or where R is kept for the step a projection and perhaps a refresh."""
    if q.updates:
        return max(each.transient, each.step)
    return each.transient if each.low else 0


def step_transient(q: PlanRequest) -> int:
    """Of `optimizer.step()`: one parameter after the other; torch's Adagrad handles all at once on a GPU (foreach)."""
    if q.updates:
        return 0
    costs = [*q.outer, *q.layer]
    if q.device == "cuda" and q.optimizer == "adagrad":  # a root of every second moment
        return q.total("gradient")
    return max(each.step if q.mode else each.transient for _, each in costs)


def layer_activations(q: PlanRequest) -> int:
    """Bytes that a layer's forward pass keeps for its backward pass.

    A norm keeps its input, the normalised rows and its output, and in bf16 an fp32 copy of the input; attention keeps q, k, v, its
    output and a logarithm a head; the MLP its two products, the activation and their product.
    """
    s, b = q.sizes, q.itemsize
    norms = 2 * (s.hidden * (4 if b == 2 else b) + 2 * s.hidden * b)
    attention = 2 * (s.attention + s.key_value) * b + 4 * s.heads
    mlp = 4 * s.intermediate * b
    return q.tokens * (norms + attention + mlp + 8 + _adapters(q) + _thinner(q) * b)


def _thinner(q: PlanRequest) -> int:
    """Elements a token by which a layer's linear layers keep more (less: below 0) where their inputs are kept projected.

    Those of q, k, v and of gate, up are shared: one that needs the whole keeps it for all. Attention keeps its output itself.
    """
    if not q.direct or q.refreshing:
        return 0
    s = q.sizes
    D, I, A, KV = s.hidden, s.intermediate, s.attention, s.key_value
    ranks = input_ranks(q)
    change = ranks.get((D, A), 0)
    for shapes, width in (((A, D), (KV, D), (KV, D)), D), (((I, D), (I, D)), D), (((D, I),), I):
        thin = [ranks.get(shape, 0) for shape in shapes]
        change += sum(thin) - (width if all(thin) else 0)
    return change


def input_ranks(q: PlanRequest) -> dict[tuple[int, ...], int]:
    """shape of a layer's linear layers -> the rank of their inputs, where those are kept projected between refreshes."""
    return {part.shape: q.rank for part, each in q.layer if each.low and not each.gradient and thin_input(part, q.optimizer, q.settings)}


def kept_whole(q: PlanRequest) -> int:
    """Bytes of the inputs that a step between the first and the last keeps whole, at most: of the matrices whose turn it is."""
    if not q.direct or q.refreshing:
        return 0
    thin = [(part.shape[1], q.sizes.layers * part.count) for part, _ in q.layer if part.shape in input_ranks(q)]
    turns = -(-sum(count for _, count in thin) // q.settings["update_proj_gap"])
    return turns * max((width for width, _ in thin), default=0) * q.tokens * q.itemsize


def _adapters(q: PlanRequest) -> int:
    """Bytes a token that two thin factors beside, or in place of, each matrix add."""
    if q.optimizer not in FACTORED:
        return 0
    s, b = q.sizes, q.itemsize
    targets = sum(part.count for part in s.layer if part.role == "matrix")
    thin = targets * q.rank * b
    if not FACTORED[q.optimizer]:
        return thin
    inputs = sum(part.count * part.shape[1] for part in s.layer if part.role == "matrix")
    mask = 1 if q.device == "cuda" else b
    unneeded = (2 * s.hidden + s.intermediate) * b  # a frozen matrix keeps no input; attention keeps its output itself
    return thin + inputs * (b + mask) - unneeded


def final_activations(q: PlanRequest) -> int:
    """Of the last norm, and cosines and sines of the positions."""
    s, b = q.sizes, q.itemsize
    return q.tokens * (s.hidden * (4 if b == 2 else b) + 2 * s.hidden * b + 4) + 2 * q.length * s.attention // s.heads * b
