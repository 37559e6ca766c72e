"""Examples as tokens, and batches of them that are padded no further than to their longest: neighbours in a batch are of like length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from galore_torch.train.model.loss import IGNORED

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from galore_torch.train.data.sampler import Lanes

_POOL = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Sequences:
    """n examples end to end, T tokens in all; example i lies in [starts[i], starts[i + 1]).

    `fields`: what the tokenizer gives, (T,) int32 by name; `targets`: one an example, (n,) int64 classes or float32 numbers, or one a
    token, (T,) int32; `padding`: what fills up a field. Where every example has one target its batches have an attention mask.
    """

    fields: dict[str, Tensor]
    starts: Tensor  # (n + 1,) int64
    targets: Tensor
    padding: dict[str, int]
    left: bool = False  # whether padding stands in front
    left_out: int = 0  # examples of the file that are not here, as nothing of their answer was left

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """(n,) int64: tokens of each example."""
        return self.starts.diff()

    @property
    def of_tokens(self) -> bool:
        """Whether every token has a target of its own."""
        return len(self.targets) != len(self)

    @cached_property
    def digest(self) -> str:
        """Of every token and target."""
        found = hashlib.sha256()
        for tensor in (self.starts, self.targets, *self.fields.values()):
            found.update(tensor.numpy().data)
        return found.hexdigest()[:16]

    def batch(self, rows: Sequence[int]) -> tuple[BatchEncoding, Tensor]:
        """(inputs, targets) of examples by number: inputs (B, L) int64 by name, padded behind, or with `left` in front; targets (B,), or
        (B, L) int64."""
        from transformers import BatchEncoding

        spans = [slice(int(self.starts[row]), int(self.starts[row + 1])) for row in rows]

        def padded(flat: Tensor, filler: int) -> Tensor:
            side = "left" if self.left else "right"
            return pad_sequence([flat[span] for span in spans], batch_first=True, padding_value=filler, padding_side=side).long()

        inputs: dict[str, Any] = {name: padded(flat, self.padding[name]) for name, flat in self.fields.items()}
        if self.of_tokens:
            return BatchEncoding(inputs), padded(self.targets, IGNORED)
        lengths = self.lengths[list(rows)]
        places = torch.arange(int(lengths.max()))
        inputs["attention_mask"] = ((places.flip(0) if self.left else places)[None] < lengths[:, None]).long()
        return BatchEncoding(inputs), self.targets[list(rows)]

    def in_order(self, batch_size: int) -> Iterator[tuple[BatchEncoding, Tensor]]:
        """Batches that cover every example once, the longest first; the last one may be smaller."""
        order = self.lengths.argsort(descending=True, stable=True).tolist()
        return (self.batch(order[start : start + batch_size]) for start in range(0, len(order), batch_size))


class BucketedBatches:
    """Endless training batches of one of `ranks` processes. Every pass over the examples is a new order that depends on `seed` alone.

    Examples are shuffled, sorted by length in pools of 32 batches, cut into batches, and those are shuffled. A pass has each example once;
    one of its batches may be smaller. With several processes that one takes further examples of the pass, so that none is without.
    """

    def __init__(self, examples: Sequences, batch_size: int, seed: int, lanes: Lanes | None = None, rank: int = 0, ranks: int = 1) -> None:
        self._examples, self._at_once, self._seed = examples, batch_size * ranks, seed
        self._rank, self._ranks = rank, ranks
        self._drawn = lanes[0]["batches_drawn"] if lanes else 0
        self._epoch = -1
        self._order: list[list[int]] = []

    def __next__(self) -> tuple[BatchEncoding, Tensor]:
        epoch, index = divmod(self._drawn, -(-len(self._examples) // self._at_once))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._pass(epoch)
        self._drawn += 1
        return self._examples.batch(self._order[index][self._rank :: self._ranks])

    def state(self) -> Lanes:
        """Where the next batch begins, the same in all processes."""
        return {0: {"batches_drawn": self._drawn}}

    def close(self) -> None:
        pass

    def _pass(self, epoch: int) -> list[list[int]]:
        """The batches of all processes, each as numbers of examples."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self._examples), generator=generator)
        sorted_pools = [pool[self._examples.lengths[pool].argsort(stable=True)] for pool in order.split(_POOL * self._at_once)]
        batches = [batch.tolist() for pool in sorted_pools for batch in pool.split(self._at_once)]
        if short := len(batches[-1]) % self._ranks:
            batches[-1] += order[: self._ranks - short].tolist()
        return [batches[index] for index in torch.randperm(len(batches), generator=generator)]
