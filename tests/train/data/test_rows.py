"""Rows are the documents' tokens, each target once, packed or padded; the oracles are lists."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from galore_torch.train.data.packing import inputs_and_targets, packed_rows, padded_row
from galore_torch.train.data.sampler import Place
from galore_torch.train.model.loss import IGNORED

Documents = list[tuple[Place, NDArray[np.int32]]]


def documents(*lengths: int) -> Documents:
    """Tokens counted through: no two are equal."""
    ends = np.cumsum(lengths)
    return [(Place(0, 0, i, i), np.arange(end - n, end, dtype=np.int32)) for i, (end, n) in enumerate(zip(ends, lengths, strict=True))]


@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_are_windows_of_all_tokens_one_apart(seed: int) -> None:
    """Documents of no token, of one, of many rows."""
    lengths = random.Random(seed).choices([0, 1, 2, 5, 8, 40], k=60)
    total, length = sum(lengths), 8
    rows = [row.tolist() for row, _, _ in packed_rows(documents(*lengths), length)]
    assert rows == [list(range(at, at + length + 1)) for at in range(0, total - length, length)]


@pytest.mark.parametrize("seed", range(5))
def test_packing_goes_on_behind_any_row(seed: int) -> None:
    texts = documents(*random.Random(seed).choices([0, 1, 2, 5, 8, 40], k=60))
    made = list(packed_rows(texts, 8))
    for index, (_, place, used) in enumerate(made):
        again = packed_rows(texts[place.document :], 8, used)
        assert [row.tolist() for row, _, _ in again] == [row.tolist() for row, _, _ in made[index + 1 :]]


def test_padded_row_is_the_published_sample() -> None:
    def row(*ids: int, end: int | None = 1) -> list[int] | None:
        found = padded_row(np.array(ids, dtype=np.int32), 5, end)
        return None if found is None else found.tolist()

    no = IGNORED
    assert row(7, 8, 1) == [7, 8, 1, no, no, no]
    assert row(7, 8, 9, 10, 1) == [7, 8, 9, 10, 1, no], "n tokens are n - 1 targets, as many as places less one"
    assert row(7, 8, 9, 10, 11, 12, 1) == [7, 8, 9, 10, 1, no], "cut: the last token is the end of text, as the published tokenizer's"
    assert row(7, 8, 9, 10, 11, 12, end=None) == [7, 8, 9, 10, 11, no]
    assert row(1) is None
    assert row() is None


def test_padded_rows_are_what_transformers_makes_of_the_published_sample(shared_data: object) -> None:
    """Tokenised, cut and padded by the T5 tokenizer, its padding relabelled, shifted as transformers' models do."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{shared_data}/tokenizers/t5")
    for text in ("Two words", "many words " * 40):
        ids = tokenizer(text, max_length=16, truncation=True, padding="max_length", return_tensors="pt")["input_ids"]
        labels = torch.where(ids == tokenizer.pad_token_id, IGNORED, ids)[:, 1:]
        ours = padded_row(np.array(tokenizer(text, add_special_tokens=False)["input_ids"] + [1], dtype=np.int32), 16, 1)
        assert ours is not None
        inputs, targets = inputs_and_targets(torch.from_numpy(ours)[None])
        assert torch.equal(inputs, ids)
        assert torch.equal(targets[:, :-1], labels)
        assert targets[0, -1] == IGNORED


def test_padding_is_seen_by_no_place_that_counts() -> None:
    """The logits of the text are those of the text without its padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, max_position_embeddings=16, **shape)).eval()
    row = padded_row(np.array([5, 6, 7, 1], dtype=np.int32), 9, 1)
    assert row is not None
    inputs, targets = inputs_and_targets(torch.from_numpy(row)[None])
    assert targets.tolist() == [[6, 7, 1] + [IGNORED] * 6]
    with torch.no_grad():
        padded, alone = model(input_ids=inputs).logits[:, :4], model(input_ids=inputs[:, :4]).logits
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
