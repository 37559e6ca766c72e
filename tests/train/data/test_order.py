"""Every document exactly once in every pass, over any number of ranks; any place can be gone on from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from galore_torch.train.data.sampler import Documents, Place, held_out
from galore_torch.train.data.sources import FileSource
from galore_torch.train.errors import UserError


class Shards:
    """A source of so many documents in each shard; document 5 of shard 2 is '2.5'."""

    name = identity = "shards"

    def __init__(self, *sizes: int, shuffled: bool = True) -> None:
        self.sizes, self.shuffled = sizes, shuffled

    @property
    def shards(self) -> int:
        return len(self.sizes)

    def documents(self, shard: int, start: int) -> Iterator[str]:
        yield from (f"{shard}.{row}" for row in range(start, self.sizes[shard]))

    def all(self) -> list[str]:
        return [text for shard in range(self.shards) for text in self.documents(shard, 0)]


def one_pass(documents: Documents, epoch: int) -> list[str]:
    """What one rank reads in pass `epoch`, from its beginning."""
    found = []
    for place, text in documents.after(Place(epoch)):
        if place.epoch != epoch:
            return found
        found.append(text)
    raise AssertionError("the order has an end")


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("split", [False, True])
def test_every_document_is_read_exactly_once_in_every_pass(shuffled: bool, ranks: int, split: bool) -> None:
    """Shards of no, one, and more documents than are shuffled at once. Held-out ones by nobody; every rank has its share."""
    source = Shards(7, 0, 1, 1100, 31, shuffled=shuffled)
    for epoch in range(2):
        shares = [one_pass(Documents(source, 5, split, rank, ranks), epoch) for rank in range(ranks)]
        counted = Counter(text for share in shares for text in share)
        assert set(counted.values()) == {1}
        missing = set(source.all()) - set(counted)
        assert len(missing) == (sum(map(held_out, range(1139))) if split else 0)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if not shuffled and split:
        assert missing == {text for number, text in enumerate(source.all()) if held_out(number)}


def test_passes_and_seeds_differ_and_repeat() -> None:
    source = Shards(30, 40)
    orders = [tuple(one_pass(Documents(source, seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert one_pass(Documents(source, 1), 1) == list(orders[-1])
    assert {order[0][0] for order in orders} == {"0", "1"}, "the shards change places too"
    assert one_pass(Documents(Shards(30, 40, shuffled=False), 1), 1) == source.all()


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_order_goes_on_from_any_place(shuffled: bool, rank: int) -> None:
    """At a document, behind it, at the end of a shard, of a block, of a pass."""
    documents = Documents(Shards(3, 1100, 4, shuffled=shuffled), 7, split=True, rank=rank, ranks=3)
    whole = list(islice(documents.after(Place()), 800))  # two passes and more
    assert whole[-1][0].epoch == 2
    for at in [0, 1, 2, 3, 300, 330, 349, 350, 351, 352, 353, 700]:
        assert list(islice(documents.after(whole[at][0]), 5)) == whole[at : at + 5]
        assert list(islice(documents.after(whole[at][0].after()), 5)) == whole[at + 1 : at + 6]


def test_going_on_reads_no_shard_before(tmp_path: Path) -> None:
    """The oracle is a source that fails when it is asked for one."""

    class Late(Shards):
        def documents(self, shard: int, start: int) -> Iterator[str]:
            assert (shard, start) >= (2, 0), "read a shard that lies before"
            return super().documents(shard, start)

    documents = Documents(Late(5, 5, 5, 5, shuffled=False))
    assert next(documents.after(Place(0, 2, 1, 11)))[1] == "2.1"


def test_too_few_documents_for_the_ranks_is_no_endless_loop() -> None:
    with pytest.raises(UserError, match="shards has 2 documents, none of them for process 2 of 3; give more"):
        next(Documents(Shards(2), rank=2, ranks=3).after(Place()))


def test_identity_of_files_is_their_names_and_sizes(tmp_path: Path) -> None:
    def identity(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "a.jsonl"
        path.write_text(json.dumps({"text": text}))
        return FileSource((str(path),), "text").identity

    assert identity("one", "text") == identity("other", "text")
    assert identity("one", "text") != identity("other", "longer")
