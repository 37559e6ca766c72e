"""Which document comes next: shards, passes, validation documents and ranks. A `Place` says where; reading can go on from any place."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from galore_torch.train.data.sources import Source
from galore_torch.train.errors import UserError

Lanes = dict[int, dict[str, int]]  # by number, where each lane of a text is: a lane has the documents of one rank of the run's start
HELD_OUT_EVERY = 20  # one document in 20 is held out where there is no --eval_data
_BLOCK = 1000  # documents that are shuffled among themselves; the published run's buffer


@dataclass(frozen=True)
class Place:
    """Just before one document. `row` counts in the shard, `document` in the pass, both over all documents, of every rank."""

    epoch: int = 0
    shard: int = 0  # number in the order of this pass
    row: int = 0
    document: int = 0

    def after(self) -> Place:
        """Just behind that document."""
        return Place(self.epoch, self.shard, self.row + 1, self.document + 1)


def held_out(document: int) -> bool:
    """Whether a document is held out by its number: the second of every 20, so that two are enough for both sides."""
    return document % HELD_OUT_EVERY == 1


@dataclass(frozen=True)
class Documents:
    """The endless order of training documents that one of `ranks` processes reads; `split`: validation ones are left out.

    Document i of a pass, validation ones not counted, belongs to rank i % ranks: in every pass each is read by exactly one.
    """

    source: Source
    seed: int = 0
    split: bool = False
    rank: int = 0
    ranks: int = 1

    def after(self, place: Place) -> Iterator[tuple[Place, str]]:
        """(where, text) of this rank's documents from `place` on, pass after pass."""
        read = place.document > 0  # a pass that is gone on with may have none left
        while True:
            order = self._shards(place.epoch)
            while place.shard < len(order):
                for text in self._documents(place.epoch, order[place.shard], place.row):
                    if self._is_mine(place.document) and text.strip():
                        read = True
                        yield place, text
                    place = place.after()
                place = Place(place.epoch, place.shard + 1, 0, place.document)
            if not read:
                raise UserError(
                    f"{self.source.name} has {place.document} documents, none of them for process {self.rank} of {self.ranks}; give more"
                )
            place, read = Place(place.epoch + 1), False

    def _is_mine(self, document: int) -> bool:
        if not self.split:
            return document % self.ranks == self.rank
        held_out_before = (document + HELD_OUT_EVERY - 2) // HELD_OUT_EVERY
        return not held_out(document) and (document - held_out_before) % self.ranks == self.rank

    def _shards(self, epoch: int) -> list[int]:
        order = list(range(self.source.shards))
        if self.source.shuffled:
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def _documents(self, epoch: int, shard: int, row: int) -> Iterator[str]:
        """Blocks are shuffled, not a rolling buffer: what a buffer held when the run stopped nobody could tell."""
        if not self.source.shuffled:
            yield from self.source.documents(shard, row)
            return
        first, inside = divmod(row, _BLOCK)
        documents = self.source.documents(shard, first * _BLOCK)
        for number in itertools.count(first):
            block = list(itertools.islice(documents, _BLOCK))
            if not block:
                return
            random.Random(f"{self.seed} {epoch} {shard} {number}").shuffle(block)
            yield from block[inside:]
            inside = 0
