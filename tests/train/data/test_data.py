"""Batches are the promised windows in the promised order; validation text stays out."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.check import check_data
from galore_torch.train.data.loader import batches, load_data, windows_in_order
from galore_torch.train.errors import UserError


def test_one_pass_sees_every_window_once_and_targets_are_one_ahead() -> None:
    tokens = torch.arange(1000, 1000 + 12 * 8 + 1, dtype=torch.int32)  # 12 windows of 8
    seen = []
    for inputs, targets in islice(batches(tokens, 8, 4, seed=0), 3):
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)
        seen += inputs[:, 0].tolist()
    assert sorted(seen) == list(range(1000, 1096, 8))
    assert seen != sorted(seen)


def test_order_depends_on_the_seed_alone() -> None:
    tokens = torch.arange(500, dtype=torch.int32)

    def order(seed: int) -> list[list[int]]:
        torch.rand(3)  # the global generator has moved on: it must not matter
        return [inputs[:, 0].tolist() for inputs, _ in islice(batches(tokens, 8, 5, seed), 40)]

    assert order(3) == order(3)
    assert order(3) != order(4)
    first_pass, second_pass = order(3)[:12], order(3)[12:24]
    assert first_pass != second_pass


@pytest.mark.parametrize("drawn", [1, 12, 50, 77, 156])  # 78 windows a pass: within the first, at its last, in the second, in the third
def test_order_goes_on_from_any_place(drawn: int) -> None:
    tokens = torch.arange(625, dtype=torch.int32)
    whole = [inputs[0, 0].item() for inputs, _ in islice(batches(tokens, 8, 1, seed=3), 200)]
    assert [inputs[0, 0].item() for inputs, _ in islice(batches(tokens, 8, 1, seed=3, start=drawn), 200 - drawn)] == whole[drawn:]


def test_evaluation_covers_the_text_in_order() -> None:
    tokens = torch.arange(8 * 7 + 5, dtype=torch.int32)
    parts = list(windows_in_order(tokens, 8, 3))
    assert torch.cat([inputs.flatten() for inputs, _ in parts]).tolist() == list(range(56))
    assert torch.cat([targets.flatten() for _, targets in parts]).tolist() == list(range(1, 57))


def decoded(tokenizer: object, tokens: torch.Tensor) -> str:
    return tokenizer.fast.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=False)  # type: ignore[attr-defined]


def test_held_out_documents_are_not_trained_on(make_config: Callable[..., PretrainConfig]) -> None:
    data = load_data(make_config(num_training_steps=1000))
    train, held_out = decoded(data.tokenizer, data.train), decoded(data.tokenizer, data.held_out)
    ends = {index: f"end {index}.<|endoftext|>" for index in range(60)}
    assert {index for index, end in ends.items() if end in held_out} == {1, 21, 41}
    assert {index for index, end in ends.items() if end in train} == set(ends) - {1, 21, 41}


def test_reads_no_more_than_the_run_needs(make_config: Callable[..., PretrainConfig]) -> None:
    data = load_data(make_config(num_training_steps=2, eval_tokens=40))
    assert len(data.train) == 2 * 4 * 16 + 1
    assert len(data.held_out) == 41


def test_eval_data_is_the_held_out_text(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, again and again. " * 9)
    data = load_data(make_config(eval_data=(str(other),), num_training_steps=1000))
    assert decoded(data.tokenizer, data.held_out).startswith("something else entirely")
    assert "end 21." in decoded(data.tokenizer, data.train)


def test_eval_data_alone_is_refused(text_file: Path) -> None:
    with pytest.raises(UserError, match="without --data"):
        check_data(PretrainConfig(eval_data=(str(text_file),)))


def test_text_field_without_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="--text_field body has no effect"):
        check_data(PretrainConfig(data=(str(tmp_path / "a.txt"),), text_field="body", given=frozenset({"text_field"})))


def test_too_little_text_names_tokens_and_bound(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a few words"}))
    with pytest.raises(UserError, match=r"training text has \d+ tokens.*= 17: give --data"):
        load_data(make_config(data=(str(short),)))
    short.write_text(json.dumps({"text": "a good many words, for once. " * 9}))
    with pytest.raises(UserError, match=r"validation text has 0 tokens.*--eval_data"):
        load_data(make_config(data=(str(short),)))


def test_tokenizer_larger_than_the_vocabulary_is_refused(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    data = load_data(make_config())
    data.tokenizer.fast.save_pretrained(tmp_path / "tok")
    assert data.vocab_size == 300
    with pytest.raises(UserError, match=rf"{data.tokenizer.size} ids, more than the 290 rows.*--vocab_size"):
        load_data(make_config(tokenizer=str(tmp_path / "tok"), vocab_size=290))
    assert load_data(make_config(tokenizer=str(tmp_path / "tok"), vocab_size=512)).vocab_size == 512


def test_demo_model_takes_the_tokenizers_size(text_file: Path) -> None:
    data = load_data(PretrainConfig(data=(str(text_file),), num_training_steps=1, max_length=16, vocab_size=270))
    assert data.vocab_size == 270


def test_c4_with_its_tokenizer(shared_data: Path) -> None:
    c4 = shared_data / "c4"
    config = PretrainConfig(
        data=(str(c4 / "train.jsonl.gz"),),
        eval_data=(str(c4 / "validation.jsonl.gz"),),
        tokenizer=str(shared_data / "tokenizers" / "c4-bpe4096"),
        num_training_steps=5,
        eval_tokens=2000,
    )
    data = load_data(config)
    assert (data.vocab_size, data.tokenizer.end_id) == (4096, 1)
    assert len(data.held_out) == 2001
    assert (data.train == 1).sum() >= 3, "documents end with </s>"
