"""galore generate: greedy text is the argmax of the model, drawn text depends on the seed alone, bad values are one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from galore_torch import cli
from galore_torch.train.checkpoint.saved_model import load_tokenizer, load_weights
from galore_torch.train.commands.export import export
from galore_torch.train.commands.generate import _prompt_ids, generate
from galore_torch.train.config.config import PretrainConfig
from support.whole_runs import command

Make = Callable[..., PretrainConfig]
PROMPT = "the cat sat"


@pytest.fixture
def run(make_config: Make, shared: Path) -> Path:
    """One finished run for all tests of this file, which only read it."""
    if not any(shared.iterdir()):
        command(make_config(save_dir=str(shared), num_training_steps=30, lr=0.02))
    return shared


def test_greedy_text_is_the_argmax_token_by_token(run: Path) -> None:
    """Oracle: the whole text through the model for each next token."""
    model, tokenizer = load_weights(run / "model"), load_tokenizer(run / "model")
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert generate(str(run), PROMPT, max_new_tokens=12, temperature=0.0) == [tokenizer.decode(ids[0])]


def test_top_k_of_one_is_greedy(run: Path) -> None:
    greedy = generate(str(run), PROMPT, max_new_tokens=8, temperature=0.0)
    assert generate(str(run), PROMPT, max_new_tokens=8, temperature=5.0, top_k=1, seed=9) == greedy


def test_least_and_great_temperatures_are_greedy_and_even(run: Path) -> None:
    """Neither end leaves the range of a float: the least one draws the likeliest token, a great one any."""
    greedy = generate(str(run), PROMPT, max_new_tokens=8, temperature=0.0)
    assert generate(str(run), PROMPT, max_new_tokens=8, temperature=0.001, seed=9) == greedy
    assert generate(str(run), PROMPT, max_new_tokens=8, temperature=1e30, seed=9) != greedy


def test_the_seed_decides_the_texts(run: Path) -> None:
    def texts(seed: int) -> list[str]:
        return generate(str(run), PROMPT, max_new_tokens=10, temperature=1.0, top_k=0, seed=seed, count=3)

    first = texts(1)
    assert first == texts(1)
    assert first != texts(2)
    assert len(set(first)) == 3
    assert all(text.startswith(PROMPT) for text in first)


def test_run_checkpoint_and_export_say_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(str(run), str(tmp_path / "out"))
    said = set()
    for source in (run, run / "checkpoints" / "step-000030", run / "model", tmp_path / "out"):
        assert cli.main(["generate", str(source), "--prompt", PROMPT, "--max-new-tokens", "10", "--seed", "3"]) == 0
        said.add(capsys.readouterr().out)
    assert said == {generate(str(run), PROMPT, max_new_tokens=10, seed=3)[0] + "\n"}


def test_several_texts_have_a_line_between_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens", "4", "--count", "3"]) == 0
    assert capsys.readouterr().out == "\n---\n".join(generate(str(run), PROMPT, max_new_tokens=4, count=3)) + "\n"


def test_text_ends_where_the_model_ends_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_an_end(folder: Path) -> Any:
        model = load_weights(folder)
        model.lm_head.bias = torch.nn.Parameter(1e4 * torch.nn.functional.one_hot(torch.tensor(0), 300).float())
        return model

    assert load_tokenizer(run / "model").eos_token_id == 0
    monkeypatch.setattr("galore_torch.train.commands.generate.load_weights", with_an_end)
    assert generate(str(run), PROMPT, max_new_tokens=9, count=2) == [PROMPT, PROMPT]


def test_other_families_speak_too(run: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=48, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(run / "model").save_pretrained(tmp_path / "gpt2")
    (text,) = generate(str(tmp_path / "gpt2"), PROMPT, max_new_tokens=5)
    assert text.startswith(PROMPT)
    assert text != PROMPT


def test_prompt_has_the_special_tokens_that_the_model_was_trained_on(run: Path) -> None:
    """LLaMA's tokenizer puts <s> first, T5's </s> last; a run of `galore pretrain` has seen neither."""
    tokenizer = load_tokenizer(run / "model")
    words = tokenizer(PROMPT).input_ids
    assert _prompt_ids(tokenizer, PROMPT, bare=True) == _prompt_ids(tokenizer, PROMPT, bare=False) == words
    assert _prompt_ids(tokenizer, "", bare=True) == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.bos_token_id), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", pair=None, special_tokens=special
    )
    assert tokenizer(PROMPT).input_ids == [tokenizer.bos_token_id, *words, 0]
    assert _prompt_ids(tokenizer, PROMPT, bare=True) == words
    assert _prompt_ids(tokenizer, PROMPT, bare=False) == [tokenizer.bos_token_id, *words]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of bounds: give a number at least 1"),
        (["--temperature", "-1"], "--temperature -1.0 is out of bounds: give a number at least 0"),
        (["--temperature", "nan"], "--temperature nan is out of bounds"),
        (["--temperature", "1e-40"], "--temperature 1e-40 is out of bounds: give a number at least 0.001, or 0 for the likeliest token"),
        (["--top_k", "-1"], "--top_k -1 is out of bounds: give a number at least 0"),
        (["--count", "0"], "--count 0 is out of bounds: give a number at least 1"),
        (["--count", "2", "--temperature", "0"], "--count 2 at --temperature 0 would be one text 2 times"),
        (["--seed", "-1"], "--seed -1 is out of bounds"),
        (["--top_k", "few"], "argument --top_k: invalid int value: 'few'"),
        (["--max_new_tokens", "60"], "the 5 tokens of --prompt and --max_new_tokens 60 are more than the 64 positions"),
    ],
)
def test_bad_value_is_one_line(run: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(run), "--prompt", PROMPT, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_special_token_past_the_models_rows_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(run / "model")
    load_weights(run / "model").save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>"]})
    tokenizer.save_pretrained(tmp_path)
    assert cli.main(["generate", str(tmp_path), "--prompt", "the <extra_id_0>"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--prompt spells the token <extra_id_0>, number 300, but the model has 300 rows; leave it out" in line


def test_missing_model_prompt_or_tokenizer_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(run / "model").save_pretrained(tmp_path / "bare")
    for words, says in [
        (["nowhere", "--prompt", PROMPT], "nowhere does not exist"),
        ([str(run)], "the following arguments are required: --prompt"),
        ([str(tmp_path / "bare"), "--prompt", PROMPT], "bare has no tokenizer that can be loaded"),
    ]:
        assert cli.main(["generate", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
