"""Batches of examples: each once a pass, padded to their longest, in an order that resumes and is shared among processes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from galore_torch.train.data.sequences import BucketedBatches, Sequences
from galore_torch.train.model.loss import IGNORED


def sequences(lengths: list[int]) -> Sequences:
    """Example i has tokens i + 1 and the answer i."""
    ids = torch.cat([torch.full((length,), index + 1, dtype=torch.int32) for index, length in enumerate(lengths)])
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    return Sequences({"input_ids": ids}, starts, torch.arange(len(lengths)), {"input_ids": 0})


def lengths(number: int) -> list[int]:
    return torch.randint(3, 90, (number,), generator=torch.Generator().manual_seed(0)).tolist()


def test_batch_is_padded_to_its_longest_and_says_where() -> None:
    inputs, answers = sequences([3, 1, 2]).batch([2, 0])
    assert inputs["input_ids"].tolist() == [[3, 3, 0], [1, 1, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert answers.tolist() == [2, 0]


def test_targets_of_tokens_are_padded_with_what_counts_for_nothing() -> None:
    targets = torch.tensor([7, 8, 9], dtype=torch.int32)
    examples = Sequences({"input_ids": torch.tensor([1, 2, 3], dtype=torch.int32)}, torch.tensor([0, 2, 3]), targets, {"input_ids": 0})
    inputs, found = examples.batch([0, 1])
    assert found.tolist() == [[7, 8], [9, IGNORED]]
    assert "attention_mask" not in inputs


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("number", [7, 64, 131])
def test_every_pass_has_each_example_once(number: int, ranks: int) -> None:
    """Three passes of all processes together; only where a batch has none for one of them does it take an example again."""
    examples, batch = sequences(lengths(number)), 4
    streams = [BucketedBatches(examples, batch, 5, rank=rank, ranks=ranks) for rank in range(ranks)]
    a_pass = -(-number // (batch * ranks))
    orders = []
    for _ in range(3):
        drawn = [next(stream)[1].tolist() for _ in range(a_pass) for stream in streams]
        assert all(drawn), "none without an example"
        counts = Counter(itertools.chain(*drawn))
        assert set(counts) == set(range(number))
        assert sum(counts.values()) - number < ranks
        orders.append(drawn)
    assert len({str(order) for order in orders}) > 1, "not the same order each time"


def test_seed_decides_the_order() -> None:
    examples = sequences(lengths(50))
    first = [next(BucketedBatches(examples, 4, seed))[1].tolist() for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_order_goes_on_from_any_state() -> None:
    examples = sequences(lengths(50))
    whole = BucketedBatches(examples, 4, 0)
    drawn = []
    for _ in range(30):
        state = whole.state()
        drawn.append((state, next(whole)[1].tolist()))
    for state, answers in drawn:
        assert next(BucketedBatches(examples, 4, 0, state))[1].tolist() == answers


def test_buckets_leave_little_padding() -> None:
    """Of random batches of 16 about two fifths of the places are padding, of these at most a tenth."""
    examples = sequences(lengths(2000))
    stream = BucketedBatches(examples, 16, 0)
    masks = [next(stream)[0]["attention_mask"] for _ in range(125)]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.1


def test_evaluation_covers_every_example_once() -> None:
    found = [answers.tolist() for _, answers in sequences(lengths(50)).in_order(16)]
    assert [len(answers) for answers in found] == [16, 16, 16, 2]
    assert sorted(itertools.chain(*found)) == list(range(50))
