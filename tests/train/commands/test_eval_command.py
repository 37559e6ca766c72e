"""galore eval: what a run found about itself, of any saved model on any text; and the harness on a local task."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch import cli
from galore_torch.train.commands.evaluate import evaluate
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from support.texts import SENTENCE, document
from support.whole_runs import command

Make = Callable[..., PretrainConfig]


@pytest.fixture
def held_out_file(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join(json.dumps({"text": document(i)}) for i in range(100, 120)), encoding="utf-8")
    return path


@pytest.fixture
def finished(make_config: Make, held_out_file: Path, tmp_path: Path) -> Path:
    """A run's folder, evaluated on a text of its own."""
    assert command(make_config(eval_data=(str(held_out_file),), eval_tokens=500, batch_size=7))[0] == 0
    return tmp_path / "run"


def last_eval(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row][-1]


def test_it_finds_what_the_run_found(finished: Path, held_out_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text, windows and batches: the same loss to the last digit, of the run, its checkpoint and its model's folder."""
    own = last_eval(finished)
    for source in (finished, next((finished / "checkpoints").iterdir()), finished / "model"):
        line = f"eval {source} --data {held_out_file} --max-length 16 --batch_size 7 --eval_tokens 500 --json"
        assert cli.main(line.split()) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["loss"], found["tokens"]) == (own["eval_loss"], own["eval_tokens"])
        assert found["perplexity"] == pytest.approx(own["eval_perplexity"])


def test_padded_documents_are_read_as_the_run_reads_them(make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A document in a row, from the run's own column of the file: the run's figures, of the run, its checkpoint and its model's folder."""
    path = tmp_path / "content.jsonl"
    path.write_text("\n".join(json.dumps({"content": document(i)}) for i in range(30)), encoding="utf-8")
    text = {"data": (str(path),), "eval_data": (str(path),), "text_field": "content"}
    assert command(make_config(**text, pad_documents=True, max_length=64, eval_tokens=500, batch_size=7))[0] == 0
    run, own = tmp_path / "run", last_eval(tmp_path / "run")
    for source in (run, next((run / "checkpoints").iterdir()), run / "model"):
        found = evaluate(str(source), data=(str(path),), batch_size=7, eval_tokens=500)
        assert (found["loss"], found["tokens"], found["pad_documents"]) == (own["eval_loss"], own["eval_tokens"], True)
    assert cli.main(["eval", str(run), "--data", str(path)]) == 0
    assert "in padded documents of 64" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_int8_weights_are_evaluated_as_the_run_holds_them(dtype: str, make_config: Make, held_out_file: Path, tmp_path: Path) -> None:
    """What they are rounded to in bf16, for others to load, has another loss."""
    own = {"optimizer": "qgalore_adamw8bit", "dtype": dtype, "eval_data": (str(held_out_file),), "eval_tokens": 500, "batch_size": 7}
    assert command(make_config(**own))[0] == 0
    run, text = tmp_path / "run", {"data": (str(held_out_file),), "batch_size": 7, "eval_tokens": 500}
    assert evaluate(str(run), **text)["loss"] == last_eval(run)["eval_loss"]
    assert dtype == "float32" or evaluate(str(run / "model"), **text)["loss"] != last_eval(run)["eval_loss"]


def test_length_is_that_of_the_run(finished: Path, held_out_file: Path) -> None:
    """Trained on 16 tokens: what --max_length 16 gives, of the run, its checkpoint and its model's folder; another length differs."""
    data = (str(held_out_file),)
    given = evaluate(str(finished), data=data, max_length=16)
    assert evaluate(str(finished), data=data, max_length=32)["loss"] != given["loss"]
    for source in (finished, next((finished / "checkpoints").iterdir()), finished / "model"):
        found = evaluate(str(source), data=data)
        assert (found["max_length"], found["loss"]) == (16, given["loss"])


def test_mean_over_tokens_and_bits_per_byte_by_hand(finished: Path, held_out_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the text: the sum of its windows' losses, over its tokens and over its bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(finished / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    texts = [document(i) for i in range(100, 120)]
    ids = torch.tensor([i for text in texts for i in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
    count = (len(ids) - 1) // 32
    inputs, targets = ids[: count * 32].view(-1, 32), ids[1 : count * 32 + 1].view(-1, 32)
    with torch.no_grad():
        nats = nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    found = evaluate(str(finished), data=(str(held_out_file),), max_length=32)
    assert found["tokens"] == count * 32
    assert found["loss"] == pytest.approx(nats / (count * 32), rel=1e-5)
    written = len(tokenizer.decode(targets.flatten(), skip_special_tokens=True).encode())
    whole = len("".join(texts).encode())
    assert whole - 100 < written <= whole, "what is left out is the first token and a tail shorter than a window"
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / written, rel=1e-5)
    assert cli.main(["eval", str(finished), "--data", str(held_out_file), "--max_length", "32"]) == 0
    printed = capsys.readouterr().out
    assert f"perplexity     {found['perplexity']:,.3f}" in printed
    assert f"tokens         {found['tokens']:,} in windows of 32" in printed


def test_other_dtype_is_near_and_named(finished: Path, held_out_file: Path) -> None:
    whole, rounded = (evaluate(str(finished), data=(str(held_out_file),), max_length=16, dtype=dtype) for dtype in (None, "bf16"))
    assert (whole["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert whole["loss"] != rounded["loss"] == pytest.approx(whole["loss"], rel=1e-2)


def test_bad_input_is_one_line(finished: Path, held_out_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        ("", "nothing to do; give a text with --data FILE"),
        ("--data missing.txt --max_length 16", "--data missing.txt does not exist"),
        ("--data TEXT --max_length 0", "--max_length 0 is out of bounds: give a number at least 1"),
        ("--data TEXT --batch_size 0", "--batch_size 0 is out of bounds"),
        ("--data TEXT --eval_tokens 0", "--eval_tokens 0 is out of bounds"),
        ("--data TEXT --max_length 65", "--max_length 65 is more than the 64 positions"),
        ("--data TEXT --max_length 64 --eval_tokens 10", "--eval_tokens 10 is less than one sequence"),
        ("--data TEXT --dtype float16", "--dtype 'float16' is not known; did you mean bfloat16?"),
        ("--data TEXT --max_length 16 --text_field body", "has no text in 'body'"),
        ("--data TEXT --limit 3", "--limit 3 has no effect without --harness"),
    ):
        assert cli.main(["eval", str(finished), *given.replace("TEXT", str(held_out_file)).split()]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("galore: ")
        assert said in error


def test_missing_harness_says_what_to_install(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("galore_torch.train.commands.lm_eval.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--harness needs lm-eval; install it with: pip install "galore-torch\[eval\]"'):
        evaluate(str(finished), harness=("arc_easy",))


TASK = """task: cat_or_bird
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_harness_runs_a_local_task_offline(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy by hand: the likelier of two words, by the sum of their tokens' log-probabilities."""
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    words = SENTENCE.split()
    rows = [{"text": " ".join(words[:n]), "choices": [f" {words[n]}", f" {words[n - 2]}"], "label": n % 2} for n in range(2, 14)]
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = tmp_path / "cat_or_bird.yaml"
    task.write_text(TASK.format(file=file), encoding="utf-8")
    model, tokenizer = (c.from_pretrained(finished / "model") for c in (AutoModelForCausalLM, AutoTokenizer))

    def likelihood(text: str, choice: str) -> float:
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, choice))
        with torch.no_grad():
            logp = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return sum(float(logp[len(before) + i - 1, token]) for i, token in enumerate(after))

    right = [max(range(2), key=lambda i: likelihood(row["text"], row["choices"][i])) == row["label"] for row in rows]
    assert 0 < sum(right) < len(rows), "both have to occur for this test to see anything"
    found = evaluate(str(finished), harness=(str(task),), batch_size=2)
    assert found["harness"]["cat_or_bird"]["acc"] == pytest.approx(sum(right) / len(rows))
