"""`galore finetune` as a user meets it: the published command, every method and task, resuming, and what is refused."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from galore_torch import cli
from galore_torch.train.checkpoint.storage import checkpoints_in, verify
from galore_torch.train.commands.finetune import finetune, read
from galore_torch.train.config.finetune import METHODS, FinetuneConfig
from galore_torch.train.config.flags import add_flags, config_from
from galore_torch.train.data.glue import GLUE
from galore_torch.train.errors import UserError
from galore_torch.train.loop import find_lr
from galore_torch.train.loop.result import RunResult
from galore_torch.train.loop.tasks import Labels
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.baselines import to_dense
from galore_torch.train.model.freeze import freeze
from galore_torch.train.model.heads import load_classifier
from galore_torch.train.optimizers.registry import build_optimizer, state_bytes
from galore_torch.train.plan.answer import plan_request
from galore_torch.train.report.chart_style import house_style
from galore_torch.train.report.runs import read_runs
from galore_torch.train.report.summary import _outcome_rows
from galore_torch.train.report.task_charts import _rates
from support import tasks
from support.forked import Forked
from support.whole_runs import Silent, assert_same_run, rows

Make = Callable[..., FinetuneConfig]


@pytest.fixture(autouse=True)
def _draws_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes longer than these runs; the published command's test has it."""
    if "published" not in request.node.name:
        monkeypatch.setattr("galore_torch.train.commands.pretrain.draw", lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT of width 32, which these tests only read."""
    return tasks.bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def make(model: str, tmp_path: Path) -> Make:
    """A config for 64 pairs and the BERT."""
    data = tasks.glue(tmp_path / "glue")

    def config(**changes: Any) -> FinetuneConfig:
        settings: dict[str, Any] = {"hf_model": model, "task_name": "mrpc", "data_dir": data, "device": "cpu", "batch_size": 8}
        return FinetuneConfig(**(settings | {"rank": 4, "update_proj_gap": 5, "save_dir": str(tmp_path / "run")} | changes))

    return config


def command(config: FinetuneConfig) -> tuple[int, str]:
    """(exit code, what was printed)."""
    console = Console(file=io.StringIO(), width=400)
    code = finetune(config, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def written(folder: Path) -> int:
    """Lines of metrics so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "eval_loss" in row]


def test_the_published_command_works_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of its example; on files in place of the hub, for two epochs, at a rate that a model without pre-training needs."""
    words = [
        *("finetune", "--model_name_or_path", tasks.bert(tmp_path / "bert", max_position_embeddings=512), "--task_name", "mrpc"),
        *("--enable_galore", "--lora_all_modules", "--max_length", "512", "--seed", "1234", "--lora_r", "4", "--galore_scale", "4"),
        *("--per_device_train_batch_size", "16", "--update_proj_gap", "500", "--learning_rate", "5e-3", "--num_train_epochs", "12"),
        *("--output_dir", str(tmp_path / "run"), "--data_dir", tasks.glue(tmp_path / "glue")),
    ]
    assert cli.main(words) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    settled = {"optimizer": "galore_adamw", "rank": 4, "galore_scale": 4.0, "batch_size": 16, "update_proj_gap": 500, "lr": 5e-3}
    assert {name: config[name] for name in settled} == settled
    assert (config["num_training_steps"], config["max_length"], config["seed"]) == (48, 512, 1234)
    assert "model_config" not in config
    assert "text_field" not in config
    found = evaluations(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(0, 49, 4)), "before, and after each epoch"
    assert found[-1]["scores"]["f1"] > 0.95 > found[0]["scores"]["f1"], "learnt"
    (record,) = json.loads((tmp_path / "run" / "summary.json").read_text())
    best = max(row["scores"]["f1"] for row in found[1:])
    assert (record["scores_last"], record["scores_best"]["f1"]) == (found[-1]["scores"], best)
    assert record["score_best_step"] == next(row["step"] for row in found[1:] if row["scores"]["f1"] == best), "the first of equals"
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "best")] == [f"step-{record['score_best_step']:06d}"]
    said = capsys.readouterr().out
    assert "--lora_all_modules has no effect: the linear layers of the body are all projected" in said
    assert "f1 at its best evaluation, step" in said
    assert cli.main(["ls", str(tmp_path / "run")]) == 0
    assert f"f1 {found[-1]['scores']['f1']:.4f} at 48, best {best:.4f} at" in capsys.readouterr().out


@pytest.mark.parametrize("task", GLUE)
def test_every_task_of_glue(task: str, make: Make, tmp_path: Path) -> None:
    """Its columns, its number of classes, its own scores first; of MNLI both sets, each whole."""
    spec = GLUE[task]
    draw = random.Random(0)
    sizes = {"train": 16} | {split: 6 + index for index, split in enumerate(spec.held_out.values())}
    for split, size in sizes.items():
        found = [{column: tasks.sentence(draw)[0] for column in spec.columns} for _ in range(size)]
        labels = [index % len(spec.classes) if spec.classes else index / 3 for index in range(size)]
        tasks.write(tmp_path / "all" / task / f"{split}.jsonl", [row | {"label": label} for row, label in zip(found, labels, strict=True)])
    code, _ = command(make(task_name=task, data_dir=str(tmp_path / "all"), num_training_steps=2))
    assert code == 0
    last = evaluations(tmp_path / "run")[-1]
    assert list(last["scores"]) == [name + suffix for suffix in spec.held_out for name in spec.scores]
    assert [last[f"eval_examples{suffix}"] for suffix in spec.held_out] == list(sizes.values())[1:]
    model = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (len(model["id2label"]), model["problem_type"]) == (
        (len(spec.classes), "single_label_classification") if spec.classes else (1, "regression")
    )


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if "8" in name or name == "qgalore" else []) for name in METHODS]
)
def test_every_method_learns_on_equal_terms(method: str, make: Make, tmp_path: Path) -> None:
    """The same batches from the same weights: the first loss is one, and the pairs are learnt."""
    if method == "lora":
        pytest.importorskip("peft", reason="lora needs the extra peft")
    lr = 2e-2 if method == "lora" else 3e-3
    assert command(make(optimizer=method, lr=lr, num_train_epochs=6, galore_scale=4, eval_every=99, save_every=99))[0] == 0
    found = rows(tmp_path / "run")
    assert found[1]["loss"] == pytest.approx(0.69, abs=0.2)
    assert found[-1]["scores"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("method", "settled"),
    [
        ("galore", {"lr": 3e-5, "scale": 2.0, "update_proj_gap": 200}),
        ("apollo", {"lr": 3e-5, "scale": 1.0, "update_proj_gap": 200}),
        ("ldadam", {"lr": 3e-5, "scale": 1.0, "update_proj_gap": 1}),
        ("galore_muon", {"lr": 3e-5, "scale": 0.2, "update_proj_gap": 1}),
        ("galore_sgd", {"lr": 0.03, "scale": 2.0, "update_proj_gap": 200}),
    ],
)
def test_what_is_not_given_suits_the_method(method: str, settled: dict[str, float], make: Make) -> None:
    """A paper's gap and scale stay its own; the rate is that of fine-tuning for all whose step has the size of Adam's."""
    config = make(optimizer=method, update_proj_gap=None)
    ((name, lr),) = config.contenders
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(32, 32), "mlp": torch.nn.Linear(32, 64)})
    optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
    (group,) = (group for group in optimizer.param_groups if group["rank"] is not None)
    assert {key: group[key] for key in settled} == settled


def test_compared_methods_start_equal_and_have_one_table(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="lora needs the extra peft")
    code, said = command(make(optimizer="galore", compare=("full", "galore:1e-3", "lora"), num_train_epochs=1))
    assert code == 0
    first = [rows(tmp_path / "run" / name)[1]["loss"] for name in ("adamw", "galore_adamw", "lora")]
    assert first[0] == first[1] == pytest.approx(first[2], abs=1e-6)
    assert "f1 last" in said
    rates = {record["optimizer"]: record["lr"] for record in json.loads((tmp_path / "run" / "summary.json").read_text())}
    assert rates == {"adamw": 3e-5, "galore_adamw": 1e-3, "lora": 5e-4}


@pytest.mark.parametrize("method", ["galore", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qgalore", "lora"))])
def test_killed_and_resumed_is_the_uninterrupted_run(method: str, tmp_path: Path, forked: Forked) -> None:
    """SIGKILL in the middle of an epoch, with dropout and accumulation; metrics, weights and the best checkpoint are bit-equal."""
    if method == "lora":
        pytest.importorskip("peft", reason="lora needs the extra peft")
    model = tasks.bert(tmp_path / "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    words = ["finetune", "--model_name_or_path", model, "--task_name", "mrpc", "--data_dir", tasks.glue(tmp_path / "glue", train=47)]
    words += ["--method", method, "--lora_r", "4", "--per_device_train_batch_size", "4", "--device", "cpu"]
    words += [] if method == "lora" else ["--update_proj_gap", "3"]
    words += ["--gradient_accumulation_steps", "2", "--learning_rate", "3e-3", "--num_train_epochs", "3", "--weight_decay", "0.1"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    parts = tmp_path / "parts"
    resumable = [*words, "--save_every", "5", "--output_dir", str(parts), "--resume_from_checkpoint", "auto"]
    (process,) = forked.start(resumable)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and written(parts) < 12:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    (code,), (said,) = forked.wait()
    assert code == -signal.SIGKILL, said
    code, said = forked.run(*resumable)
    assert code == 0, said
    assert "resumed" in said
    assert_same_run(parts, tmp_path / "whole")
    best = [next((folder / "best").glob("step-*")) for folder in (parts, tmp_path / "whole")]
    assert best[0].name == best[1].name
    assert (best[0] / "model.safetensors").read_bytes() == (best[1] / "model.safetensors").read_bytes()


def test_changed_examples_are_refused_when_a_run_goes_on(make: Make, tmp_path: Path) -> None:
    assert command(make(num_training_steps=3))[0] == 0
    tasks.glue(tmp_path / "other", train=65)
    with pytest.raises(
        UserError, match=r"--data_dir gives 65 examples.*was trained on 64 examples.*; give the same text and --tokenizer, or"
    ):
        command(make(num_training_steps=3, data_dir=str(tmp_path / "other"), resume="auto"))


def test_columns_given_by_name_are_those_that_were_found(make: Make, tmp_path: Path) -> None:
    """A run goes on with what was found anyway; other columns are other examples, and the flags named are the command's."""
    file = tasks.write(tmp_path / "own.jsonl", [{"text": f"w{row}", "note": row, "other": "", "label": row % 2} for row in range(12)])
    own: dict[str, Any] = {"task_name": "classification", "data_dir": None, "train_file": (file,), "num_training_steps": 2}
    code, said = command(make(**own))
    assert code == 0
    assert "own.jsonl: 'text' of 10 examples in 1 epochs, 2 to evaluate on" in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]["text_columns"] == ["text"]
    assert command(make(**own, text_columns=("text",), resume="auto"))[0] == 0
    with pytest.raises(
        UserError, match=r"--train_file gives 10 .*; give the same text, --validation_file, --text_columns and --tokenizer, or"
    ):
        command(make(**own, text_columns=("other",), resume="auto"))


def test_other_examples_to_evaluate_on_are_refused_when_a_run_goes_on(make: Make, tmp_path: Path) -> None:
    """The best score would be the better of two sets."""
    assert command(make(num_training_steps=3))[0] == 0
    tasks.glue(tmp_path / "other", dev=25)
    with pytest.raises(UserError, match=r"to evaluate on are 25 examples.*, but 24 examples.*; give the same --validation_file"):
        command(make(num_training_steps=3, data_dir=str(tmp_path / "other"), resume="auto"))


@pytest.mark.parametrize(("kept", "best"), [("best", 2), ("checkpoints", 2), ("neither", 3)])
def test_branch_has_the_best_checkpoint_that_it_tells_of(
    kept: str, best: int, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run's where that still is; else the best of what there is, here the checkpoint that it branches off from."""

    def values(*found: float) -> None:
        stream = iter(found)
        monkeypatch.setattr(Labels, "value", lambda self, row: next(stream))

    old, new = tmp_path / "run", tmp_path / "new"
    every: dict[str, Any] = {"num_training_steps": 4, "eval_every": 1, "save_every": 1, "keep": 9}
    values(0.0, 0.1, 0.9, 0.4, 0.3)
    assert command(make(**every))[0] == 0
    saved = (old / "checkpoints" / f"step-{best:06d}" / "model.safetensors").read_bytes()
    if kept != "best":
        shutil.rmtree(old / "best")
    if kept == "neither":
        shutil.rmtree(old / "checkpoints" / "step-000002")
    values(0.3)
    assert command(make(**every, resume=str(old / "checkpoints" / "step-000003"), save_dir=str(new)))[0] == 0
    (record,) = json.loads((new / "summary.json").read_text())
    assert record["score_best_step"] == best
    assert [path.name for path in checkpoints_in(new / "best")] == [f"step-{best:06d}"]
    assert (new / "best" / f"step-{best:06d}" / "model.safetensors").read_bytes() == saved
    verify(new / "best" / f"step-{best:06d}")


def test_batches_and_steps_are_those_of_a_loop_by_hand(make: Make, tmp_path: Path) -> None:
    """The published faults: weight decay ignored, accumulation off by one. AdamW, the schedule and the mean over a step's examples, written
    out with torch's own pieces: the same losses and weights; the last step of all takes what is left of the last epoch."""
    from transformers import AutoModelForSequenceClassification

    shape: dict[str, Any] = {"batch_size": 6, "gradient_accumulation": 4, "num_train_epochs": 2, "warmup_steps": 2}
    config, data = read(make(optimizer="full", lr=1e-2, weight_decay=0.1, min_lr_ratio=0.1, **shape))
    assert config.num_training_steps == 6  # 11 batches of 64 examples an epoch, the last of 4; 22 in steps of 4
    result, model = train(config, "adamw", 1e-2, data, tmp_path, Silent())

    assert config.hf_model is not None
    torch.manual_seed(config.seed)
    by_hand = AutoModelForSequenceClassification.from_pretrained(config.hf_model, num_labels=2)
    adamw = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.1)
    batches = data.batches(config)
    shares = [0.5, 1.0, 1.0, 0.7, 0.4, 0.1]
    losses = []
    for share in shares:
        drawn = [next(batches) for _ in range(4)]
        number = sum(len(labels) for _, labels in drawn)
        total = 0.0
        for inputs, labels in drawn:  # one after the other: Adam makes whole steps of the rounding of a gradient near 0
            part = torch.nn.functional.cross_entropy(by_hand(**inputs).logits, labels, reduction="sum") / number
            part.backward()
            total += part.item()
        adamw.param_groups[0]["lr"] = 1e-2 * share
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    assert [loss for _, loss in result.losses] == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["galore", "galore8bit"])
def test_weight_decay_acts_on_every_weight(method: str, make: Make, tmp_path: Path) -> None:
    """One step with and without it: the weights differ by lr x decay x what they were."""
    from galore_torch.train.loop.build import model_for

    ends = []
    for decay in (0.0, 0.5):
        config, data = read(make(optimizer=method, lr=1e-2, weight_decay=decay, num_training_steps=1, eval_every=9))
        (tmp_path / str(decay)).mkdir()
        _, model = train(config, METHODS[method], 1e-2, data, tmp_path / str(decay), Silent())
        ends.append(dict(model.named_parameters()))
    for name, before in model_for(config, data).named_parameters():
        torch.testing.assert_close(ends[0][name] - ends[1][name], 1e-2 * 0.5 * before, rtol=1e-3, atol=1e-6, msg=name)


def test_each_epoch_ends_with_an_evaluation_and_a_checkpoint(make: Make, tmp_path: Path) -> None:
    """64 examples in steps of 3 x 8: an epoch's end lies within a step, which is where it is noticed."""
    assert command(make(gradient_accumulation=3, num_train_epochs=3, keep=9))[0] == 0
    assert [row["step"] for row in evaluations(tmp_path / "run")] == [0, 3, 6, 8]
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-000003", "step-000006", "step-000008"]


def test_exported_run_loads_as_a_classifier_and_answers_alike(make: Make, tmp_path: Path) -> None:
    """Of LoRA too, whose adapters are multiplied out; and neither is taken for a language model."""
    pytest.importorskip("peft", reason="lora needs the extra peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert command(make(compare=("galore", "lora"), num_train_epochs=1))[0] == 0
    for name in ("galore_adamw", "lora"):
        run = tmp_path / "run" / name
        assert cli.main(["export", str(next((run / "best").iterdir())), str(tmp_path / name)]) == 0
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        last = AutoModelForSequenceClassification.from_pretrained(run / "model")
        pair = AutoTokenizer.from_pretrained(tmp_path / name)("w1 w2", "w3 good", return_tensors="pt")
        torch.testing.assert_close(model(**pair).logits, last(**pair).logits, msg="one epoch: the best one is the last one")
    assert cli.main(["generate", str(tmp_path / "run" / "lora"), "--prompt", "w1"]) == 2


@pytest.mark.parametrize(
    ("method", "pattern"), [("galore", "embeddings"), ("full", r"layer\.0\."), ("muon", r"layer\.0\."), ("relora", r"layer\.0\.")]
)
def test_frozen_parameters_stay_as_they_are(method: str, pattern: str, make: Make, tmp_path: Path) -> None:
    """And cost no state."""
    from galore_torch.train.loop.build import model_for

    if method == "relora":
        pytest.importorskip("peft", reason="relora needs the extra peft")
    own = {"muon": {"rank": None, "update_proj_gap": None}, "full": {"rank": None, "update_proj_gap": None}}
    own["relora"] = {"cycle_length": 1, "update_proj_gap": None}
    config, data = read(make(optimizer=method, freeze=(pattern,), lr=1e-2, num_training_steps=2, **own.get(method, {})))
    before = dict(model_for(config, data).named_parameters())
    ((name, lr),) = config.contenders
    _, model = train(config, name, lr, data, tmp_path, Silent())
    moved = {name for name, p in to_dense(model).named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not re.search(pattern, name)}


def test_lora_trains_no_frozen_layer_and_is_exported_as_it_stands(make: Make, tmp_path: Path) -> None:
    """Neither in the model nor in a checkpoint, whose layers are put together again; a resumed run has the same adapters."""
    pytest.importorskip("peft", reason="lora needs the extra peft")
    from safetensors.torch import load_file

    run, settings = tmp_path / "run", {"optimizer": "lora", "update_proj_gap": None, "freeze": (r"layer\.0\.",), "lr": 1e-2}
    assert command(make(**settings, num_training_steps=4, save_every=2, eval_every=2))[0] == 0
    whole = (run / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert command(make(**settings, num_training_steps=4, save_every=2, eval_every=2, resume="auto"))[0] == 0
    assert (run / "checkpoints" / "step-000004" / "model.safetensors").read_bytes() == whole
    assert cli.main(["export", str(next((run / "best").iterdir())), str(tmp_path / "best")]) == 0
    before = load_file(Path(make().hf_model or "") / "model.safetensors")
    for folder in (run / "model", tmp_path / "best"):
        after = load_file(folder / "model.safetensors")
        moved = {name for name, weight in before.items() if not torch.equal(after[f"bert.{name}"], weight)}
        assert moved == {name for name in before if "layer.1." in name and name.endswith(".weight") and "LayerNorm" not in name}


def test_lora_without_a_layer_to_train_is_refused(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="lora needs the extra peft")
    with pytest.raises(UserError, match=r"--freeze names all of them; freeze less"):
        command(make(optimizer="lora", update_proj_gap=None, freeze=("layer",)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "frozen"),
    [
        ("full", ()),
        ("full", ("embeddings",)),
        ("galore", ("embeddings",)),
        ("galore", (r"layer\.0\.",)),
        ("lora", ()),
        ("lora", ("pooler",)),
        ("lora", (r"layer\.0\.",)),
    ],
)
def test_what_is_frozen_is_planned_without_state(method: str, frozen: tuple[str, ...], make: Make) -> None:
    """Bytes of weights and state before a run, those of a real optimizer after a step."""
    config = make(optimizer=method, freeze=frozen)
    request = plan_request(config, device="cpu")
    model = load_classifier(config.hf_model, ("0", "1"), seed=0, dtype="float32", activation_checkpointing=False)
    freeze(model, frozen)
    optimizer = build_optimizer(config.optimizer, model, lr=1e-3, settings=config.optimizer_settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    assert request.total("weight") == sum(p.nbytes for p in model.parameters())
    assert request.total("moments") + request.total("basis") == state_bytes(optimizer)


def test_dry_run_makes_none(make: Make, tmp_path: Path) -> None:
    code, said = command(make(dry_run=True))
    assert code == 0
    assert "batch      inputs (8, " in said
    assert not (tmp_path / "run").exists()


def test_what_the_hub_gives_is_read_by_its_columns(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(path: str, config: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return tasks.examples(16, seed=len(asked))

    monkeypatch.setattr("galore_torch.train.data.sources._load", hub)
    assert command(make(data_dir=None, num_training_steps=2))[0] == 0
    assert asked == [("nyu-mll/glue", "mrpc", "train"), ("nyu-mll/glue", "mrpc", "validation")]


BAD: dict[str, tuple[list[str], str]] = {
    "no model": (["--task_name", "mrpc"], "needs a model: give --model_name_or_path"),
    "no task": (["--model_name_or_path", "MODEL"], "needs a task: give --task_name"),
    "unknown task": (["--model_name_or_path", "MODEL", "--task_name", "mprc"], "did you mean mrpc?"),
    "own task without file": (["--model_name_or_path", "MODEL", "--task_name", "regression"], "give them with --train_file"),
    "file of a task of GLUE": (
        ["--model_name_or_path", "MODEL", "--task_name", "rte", "--train_file", "a.csv"],
        "--train_file has no effect",
    ),
    "missing file": (["--model_name_or_path", "MODEL", "--task_name", "prompts", "--train_file", "a.csv"], "a.csv does not exist"),
    "packing of pairs": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--packing"], "--packing has no effect"),
    "unknown method": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--method", "galor"], "'galor' is not known"),
    "galore without it": (
        ["--model_name_or_path", "MODEL", "--task_name", "rte", "--enable_galore", "--method", "full"],
        "that trains without GaLore",
    ),
    "alpha without lora": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--lora_alpha", "8"], "--lora_alpha 8 has no effect"),
    "two lengths": (
        ["--model_name_or_path", "MODEL", "--task_name", "rte", "--num_train_epochs", "3", "--max_train_steps", "9"],
        "both say how long to train",
    ),
    "gap that is not between": (
        ["--model_name_or_path", "MODEL", "--task_name", "mrpc", "--data_dir", "GLUE", "--gap_range", "20", "80"],
        "--gap_range 20 80 must have --update_proj_gap 200 between them; try --gap_range 50 1600",
    ),
    "upload": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--push_to_hub"], "--push_to_hub: nothing is uploaded here"),
    "foreign code": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--trust_remote_code"], "no code of a model's folder is run"),
    "weights of their own": (
        ["--model_name_or_path", "MODEL", "--task_name", "rte", "--load_pretrained_model", "w.pt"],
        "--load_pretrained_model: give the weights' folder as --model_name_or_path",
    ),
    "too long": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--max_length", "65"], "more than the 64 positions"),
    "no such model": (["--model_name_or_path", "./nofolder", "--task_name", "rte"], "--hf_model ./nofolder does not exist"),
    "no such folder": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--data_dir", "nowhere"], "--data_dir nowhere is no folder"),
    "files of another task": (["--model_name_or_path", "MODEL", "--task_name", "rte", "--data_dir", "GLUE"], "has no train file for rte"),
    "frozen whole": (
        ["--model_name_or_path", "MODEL", "--task_name", "mrpc", "--data_dir", "GLUE", "--freeze", "."],
        "leaves nothing to train",
    ),
    "freezes none": (
        ["--model_name_or_path", "MODEL", "--task_name", "mrpc", "--data_dir", "GLUE", "--freeze", "zz"],
        "matches no parameter",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_word_is_one_line_and_leaves_nothing(case: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, says = BAD[case]
    places = {"MODEL": model, "GLUE": str(tmp_path / "glue")}
    tasks.glue(tmp_path / "glue")
    assert cli.main(["finetune", *(places.get(word, word) for word in words), "--output_dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["galore", "full"])
def test_rates_are_found_and_taken(method: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep against a bowl: of GaLore first the matrices' rate, then the rest's; past the grid where the least lies there."""
    best = {"matrices": 1.0 if method == "galore" else 1e-2, "rest": 1e-6}

    def short_run(config: FinetuneConfig, name: str, lr: float, scale: float, data: Any) -> float:
        return 1 + abs(math.log(lr * scale / best["matrices"])) + abs(math.log(lr / best["rest"]))

    monkeypatch.setattr("galore_torch.train.loop.find_lr.short_run", short_run)
    assert command(make(optimizer=method, find_lr=True, lr=1e-5, galore_scale=1e4, num_training_steps=1))[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lr"] == pytest.approx(1e-6)
    if method == "galore":
        assert config["lr"] * config["galore_scale"] == pytest.approx(1.0)
    assert {one["of"] for one in config["resolved"]["find_lr"]} == ({"matrices", "rest"} if method == "galore" else {"all"})
    monkeypatch.setattr("galore_torch.train.loop.find_lr.short_run", None)  # what goes on does not look again
    again = make(optimizer=method, find_lr=True, lr=1e-5, galore_scale=1e4, num_training_steps=1, resume="auto")
    assert command(again)[0] == 0
    (run,) = read_runs([tmp_path / "run"])
    assert {of: rates[losses.index(min(losses))] for of, (rates, losses) in run.rates_tried.items()} == pytest.approx(
        {"matrices": 1.0, "rest": 1e-6} if method == "galore" else {"all": 1e-6}
    )
    with house_style():
        assert _rates([run]) is not None


def test_rates_of_a_run_that_has_its_own_are_not_looked_for(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a sweep, not after it."""
    assert command(make(optimizer="full", rank=None, update_proj_gap=None, num_training_steps=1, save_every=1))[0] == 0
    monkeypatch.setattr("galore_torch.train.loop.find_lr.short_run", None)
    for resume in ("auto", str(tmp_path / "run" / "checkpoints" / "step-000001")):
        with pytest.raises(UserError, match=r"--find_lr has no effect on the run in .*run, which has its rates"):
            command(make(optimizer="full", rank=None, update_proj_gap=None, num_training_steps=1, find_lr=True, resume=resume))


def test_a_refused_setting_says_what_the_run_has(make: Make) -> None:
    assert command(make(update_proj_gap=None, num_training_steps=1))[0] == 0
    with pytest.raises(UserError, match=r"--galore_scale is 4.0, but 2.0 in .*; give 2.0, or start a new run"):
        command(make(update_proj_gap=None, num_training_steps=1, galore_scale=4.0, resume="auto"))
    with pytest.raises(UserError, match=r"--freeze is .*; leave it out, or start a new run"):
        command(make(update_proj_gap=None, num_training_steps=1, freeze=("embeddings",), resume="auto"))


def test_the_gap_in_use_is_between_those_of_a_range(make: Make) -> None:
    assert make(update_proj_gap=None, gap_range=(100, 400)).gap_range == (100, 400)


def test_every_other_flag_of_the_published_script_acts_or_is_noted(model: str) -> None:
    line = "--use_slow_tokenizer --ignore_mismatched_sizes --eval_llama --low_rank_method x --with_tracking --report_to all"
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_flags(parser, FinetuneConfig)
    words = ["--model_name_or_path", model, "--task_name", "mrpc", *line.split(), "--checkpointing_steps", "epoch"]
    config = config_from(vars(parser.parse_args(words)), kind=FinetuneConfig)
    assert config.save_every == 0
    noted = {note.split()[0] for note in config.notes if "has no effect" in note}
    assert noted == {word for word in line.split() if word.startswith("--")}


def test_a_run_that_training_made_worse_says_so() -> None:
    result = RunResult("adamw", 1e-3, 1, 1, 1)
    result.scores = [(0, {"f1": 0.5}), (1, {"f1": 0.4})]
    result.values = [(0, 0.5), (1, 0.4)]
    result.steps = 1
    assert ["f1 before training", "0.5000, which no later evaluation reached"] in _outcome_rows(result)
    result.scores[1] = (1, {"f1": 0.6})
    assert ["f1 before training", "0.5000"] in _outcome_rows(result)


def test_rates_of_which_none_trains_are_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_torch.train.loop.find_lr.short_run", lambda *_: math.inf)
    with pytest.raises(UserError, match=r"--find_lr: no rate of all \(lr\) from 3e-08 to 0.0001 trains 30 steps with finite losses"):
        command(make(optimizer="full", find_lr=True, lr=1e-5, rank=None, update_proj_gap=None))
    assert not (tmp_path / "run").exists()


LONG: dict[str, dict[str, Any]] = {
    "cosine_restarts": {"scheduler": "cosine_restarts", "cycle_length": 100, "restart_warmup_steps": 40},
    "relora": {"optimizer": "relora", "cycle_length": 100, "warmup_steps": 50},
    "relora in short cycles": {"optimizer": "relora", "cycle_length": 2},
    "golore": {"optimizer": "golore", "random_after": 100},
    "wsd": {"scheduler": "wsd", "decay_steps": 100},
}


@pytest.mark.parametrize("case", LONG)
def test_rates_of_a_long_schedule_are_found(case: str, make: Make) -> None:
    """30 steps allow less than 300: a short run has what they do."""
    if "relora" in case:
        pytest.importorskip("peft", reason="relora needs the extra peft")
    config, data = read(make(num_training_steps=300, batch_size=2, given=frozenset(LONG[case]), **LONG[case]))
    ((name, lr),) = config.contenders
    assert find_lr.short_run(config, name, lr, 2.0, data) == pytest.approx(0.69, abs=0.2)


def test_fewer_examples_than_processes_are_refused(make: Make, tmp_path: Path) -> None:
    """When they have been read, and in each of the processes: none is left without a batch."""
    few = tasks.glue(tmp_path / "few", train=2)
    with pytest.raises(UserError, match=r"2 training examples for 3 processes, .*; start 2 at most, or give more examples"):
        read(make(data_dir=few, nproc=3))
    assert read(make(data_dir=few, nproc=2))[0].num_training_steps == 3


@pytest.mark.slow
def test_short_runs_tell_a_good_rate_from_bad_ones(make: Make) -> None:
    """Real ones: too small a rate learns nothing, too large a one breaks down; no folder and no checkpoint is left."""
    config, data = read(make())
    losses = {lr: find_lr.short_run(config, "galore_adamw", lr, 4.0, data) for lr in (1e-6, 5e-3, 1e3)}
    assert losses[5e-3] < losses[1e-6]
    assert losses[5e-3] < losses[1e3]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one_with_the_whole_batch(parallel: str, tmp_path: Path, forked: Forked) -> None:
    """Each takes every second example of a batch: the same losses and scores; the last batch of an epoch has one for each."""
    words = ["finetune", "--model_name_or_path", tasks.bert(tmp_path / "bert"), "--task_name", "mrpc", "--device", "cpu", "--lora_r", "4"]
    words += ["--data_dir", tasks.glue(tmp_path / "glue", train=34), "--learning_rate", "1e-3", "--num_train_epochs", "2"]
    words += ["--parallel", parallel]
    forked.together(2, [*words, "--batch_size", "4", "--output_dir", str(tmp_path / "two")])
    assert cli.main([*words, "--batch_size", "8", "--gradients", "full", "--output_dir", str(tmp_path / "one")]) == 0
    codes, said = forked.wait()
    assert codes == [0, 0], said
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for key in ("loss", "eval_loss", "tokens_seen", "eval_examples"):
        mine, theirs = ([row[key] for row in found if key in row] for found in (one, two))
        assert mine
        assert mine == pytest.approx(theirs, rel=1e-4), key
    assert [row["scores"] for row in one if "scores" in row] == [row["scores"] for row in two if "scores" in row]


def test_decoder_classifies(make: Make, tmp_path: Path) -> None:
    """Its tokenizer names no padding; the saved model knows which token pads."""
    code, _ = command(make(hf_model=tasks.llama(tmp_path / "llama"), num_training_steps=3))
    assert code == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["architectures"], config["pad_token_id"]) == (["LlamaForSequenceClassification"], 3)


def test_as_long_as_the_positions_that_a_text_may_take(make: Make, tmp_path: Path) -> None:
    """RoBERTa's 66 begin behind its padding token's number, which is 1; XLNet's have no end."""
    long = [row | {"sentence2": "w1 " * 300} for row in tasks.examples(8)]
    for split in ("train", "dev"):
        tasks.write(tmp_path / "long" / "mrpc" / f"{split}.jsonl", long)
    settings: dict[str, Any] = {"data_dir": str(tmp_path / "long"), "num_training_steps": 1}
    roberta = tasks.roberta(tmp_path / "roberta")
    with pytest.raises(UserError, match=r"--max_length 65 is more than the 64 positions"):
        make(hf_model=roberta, max_length=65)
    for model, length in ((roberta, 64), (tasks.xlnet(tmp_path / "xlnet"), 300)):
        folder = tmp_path / f"run-{length}"
        assert command(make(hf_model=model, max_length=length, save_dir=str(folder), **settings))[0] == 0
        assert json.loads((folder / "summary.json").read_text())[0]["tokens_seen"] == 8 * length


@pytest.mark.parametrize("how", [{"dtype": "bf16"}, {"activation_checkpointing": True}, {"grad_clipping": 0.5}, {"optimizer": "muon"}])
def test_settings_of_pretraining_act_here_too(how: dict[str, Any], make: Make, tmp_path: Path) -> None:
    assert (
        command(make(num_training_steps=2, eval_every=9, **({"rank": None, "update_proj_gap": 200} if "optimizer" in how else {}), **how))[
            0
        ]
        == 0
    )
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses == pytest.approx([0.69, 0.69], abs=0.2)


def test_a_run_that_does_not_fit_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan, before anything is made."""
    monkeypatch.setattr("galore_torch.train.plan.at_hand.memory_at_hand", lambda device: 100_000)
    with pytest.raises(UserError, match=r"galore_adamw on .*bert needs .* GB by the plan"):
        command(make())
    assert command(make(force=True, num_training_steps=1))[0] == 0


def test_record_of_a_run_is_a_config_file(make: Make, tmp_path: Path) -> None:
    """With the same settings; flags win, and other epochs count anew."""
    assert command(make(optimizer="galore8bit", num_train_epochs=1, lr=1e-3))[0] == 0
    path = str(tmp_path / "run" / "config.json")
    again = config_from({"config": path, "save_dir": str(tmp_path / "again")}, kind=FinetuneConfig)
    assert (again.contenders, again.num_training_steps, again.rank) == ([("galore_adamw8bit", 1e-3)], 8, 4)
    longer = config_from({"config": path, "num_train_epochs": 2.0}, kind=FinetuneConfig).for_examples(64)
    assert longer.num_training_steps == 16
    (tmp_path / "other.json").write_text('{"model_config": "60m"}')
    with pytest.raises(UserError, match=r"setting 'model_config' is not known"):
        config_from({"config": str(tmp_path / "other.json")}, kind=FinetuneConfig)


def test_report_of_a_run_before_its_first_score(make: Make, tmp_path: Path) -> None:
    """And beside a run without scores each has its own columns."""
    scored, other = tmp_path / "scored", tmp_path / "other"
    for folder, row in ((scored, {"eval_loss": 0.7, "scores": {"f1": 0.4}}), (other, {"eval_loss": 1.0, "eval_perplexity": 2.7})):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, **row}) + "\n")
    page = tmp_path / "page.html"
    assert cli.main(["report", str(scored), "-o", str(page)]) == 0
    assert "<th>f1: last</th><th>best</th>" in page.read_text()
    assert "<th>perplexity</th>" not in page.read_text()
    assert 'id="scores"' in page.read_text()
    assert 'id="find-lr"' not in page.read_text()
    assert cli.main(["report", str(scored), str(other), "-o", str(page)]) == 0
    assert "<th>perplexity</th><th>f1: last</th><th>best</th>" in page.read_text()


@pytest.mark.parametrize(("number", "batch", "parts"), [(64, 8, 1), (47, 4, 2), (10, 16, 1)])
def test_steps_of_two_epochs_see_every_example_twice(number: int, batch: int, parts: int, make: Make, tmp_path: Path) -> None:
    data_dir = tasks.glue(tmp_path / "other", train=number)
    config, data = read(make(data_dir=data_dir, batch_size=batch, gradient_accumulation=parts, num_train_epochs=2))
    stream = data.batches(config)
    seen = sum(len(next(stream)[1]) for _ in range(config.num_training_steps * parts))
    further = config.num_training_steps * parts - 2 * -(-number // batch)  # batches that fill up the last step
    assert 2 * number <= seen <= 2 * number + further * batch
    assert 0 <= further < parts
    assert [step for step in range(1, config.num_training_steps + 1) if config.evaluates(step)] == [
        math.ceil(epoch * -(-number // batch) / parts) for epoch in (1, 2)
    ]
