"""Whole runs of the command: the folder, the tables, and what happens when something is wrong."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from galore_torch.train.commands import pretrain as module
from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import load_data, windows_in_order
from galore_torch.train.errors import UserError
from galore_torch.train.report.progress import Display
from support.architectures import make_model

Make = Callable[..., PretrainConfig]


def command(config: PretrainConfig, *, terminal: bool = False) -> tuple[int, str]:
    """(exit code, what was printed)."""
    console = Console(file=io.StringIO(), width=140, force_terminal=terminal)
    code = pretrain(config, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def test_run_folder_is_complete_and_the_model_loads(make_config: Make, tmp_path: Path) -> None:
    """AutoModel and AutoTokenizer load it, and the loaded model has the perplexity the run reported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config(num_training_steps=40, lr=0.01)
    code, printed = command(config)
    run = tmp_path / "run"
    assert code == 0
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "results.md",
        "summary.json",
        "model",
        "checkpoints",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    (summary,) = json.loads((run / "summary.json").read_text())
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    data = load_data(config)
    assert tokenizer("the cat sat", add_special_tokens=False)["input_ids"] == data.tokenizer.encode(["the cat sat"])[0]
    assert tokenizer.eos_token == "<|endoftext|>"
    total = count = 0.0
    with torch.no_grad():
        for inputs, targets in windows_in_order(data.held_out, 16, 8):
            logits = model(input_ids=inputs).logits.flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
            count += targets.numel()
    assert torch.tensor(total / count).exp().item() == pytest.approx(summary["perplexity_after"], rel=1e-4)
    for figure in (f"{summary['parameters']:,}", f"{summary['perplexity_after']:.2f}", f"{summary['adamw_state_mb']:.2f} MB"):
        assert figure in printed


def test_config_is_resolved(make_config: Make, tmp_path: Path) -> None:
    command(make_config(num_training_steps=20, total_batch_size=8))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["rank"], saved["warmup_steps"], saved["total_batch_size"], saved["vocab_size"]) == (4, 2, 8, 300)
    lr = PretrainConfig(optimizer="adamw").contenders[0][1]
    assert saved["resolved"]["optimizers"] == [{"optimizer": "adamw", "lr": lr, "gradients": "full"}]
    assert saved["resolved"]["versions"]["torch"] == version("torch")


def test_compare_writes_one_table_and_one_picture(make_config: Make, tmp_path: Path) -> None:
    names = ["adamw", "galore_adamw", "galore_adamw8bit"]
    code, printed = command(make_config(compare=tuple(names), rank=4))
    run = tmp_path / "run"
    assert code == 0
    assert {path.name for path in run.iterdir()} == {"config.json", "loss.png", "results.md", "summary.json", *names}
    table = (run / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[4:]] == names
    summary = json.loads((run / "summary.json").read_text())
    sizes = {row["optimizer"]: row["optimizer_state_mb"] for row in summary}
    assert sizes["galore_adamw"] < sizes["adamw"] == pytest.approx(summary[0]["adamw_state_mb"])
    assert sizes["galore_adamw8bit"] < sizes["galore_adamw"]
    for name in names:
        assert (run / name / "model" / "model.safetensors").is_file()
        first = json.loads((run / name / "metrics.jsonl").read_text().splitlines()[0])
        assert first["eval_loss"] == pytest.approx(json.loads((run / "adamw" / "metrics.jsonl").read_text().splitlines()[0])["eval_loss"])
        assert name in printed


def test_contender_that_diverges_does_not_cost_the_others(make_config: Make, tmp_path: Path) -> None:
    code, printed = command(make_config(compare=("sgd:1e30", "adamw"), max_bad_steps=1))
    assert code == 1
    assert "sgd stopped: the loss is nan at step 2" in printed
    first, second = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["status"].startswith("the loss is nan")
    assert second["status"] == "finished"


def test_run_folder_is_never_overwritten(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    precious = tmp_path / "run" / "model.safetensors"
    precious.write_text("weights of last week")
    with pytest.raises(UserError, match=r"--save_dir .*run already exists and is not empty; give a new folder"):
        command(make_config())
    assert precious.read_text() == "weights of last week"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.safetensors"]


def test_default_folders_never_meet(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(save_dir=None, num_training_steps=1)
    for _ in range(2):
        command(config)
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("changes", [{"data": ("nowhere.txt",)}, {"tokenizer": "nowhere"}, {"vocab_size": 256}, {"max_length": 64}])
def test_bad_input_leaves_nothing_behind(make_config: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "max_length" in changes:  # the validation text is shorter than one such sequence
        (tmp_path / "few.jsonl").write_text('{"text": "one two three"}\n' * 9)
        changes = {**changes, "data": (str(tmp_path / "few.jsonl"),)}
    with pytest.raises(UserError):
        command(make_config(**changes))
    assert not (tmp_path / "run").exists()


def test_optimizers_complaint_comes_before_the_folder(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second contender cannot be built: that is said before the first has trained for an hour."""

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sgd":
            raise UserError("sgd: no")
        return build(name, *args, **kwargs)

    build = module.build_optimizer
    monkeypatch.setattr(module, "build_optimizer", refuse)
    with pytest.raises(UserError, match="sgd: no"):
        command(make_config(compare=("adamw", "sgd")))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_model_table_and_picture(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(Display):
        def step(self, row: dict[str, Any], total: int) -> None:
            super().step(row, total)
            if row["step"] == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "Display", Impatient)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits SIG_IGN
    try:
        code, printed = command(make_config(compare=("adamw", "sgd")))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler is not put back"
    finally:
        signal.signal(signal.SIGINT, found)
    run = tmp_path / "run"
    assert code == 130
    assert "interrupted by SIGINT" in printed
    assert "| - |" in (run / "results.md").read_text(), "no perplexity was measured after the last step"
    (summary,) = json.loads((run / "summary.json").read_text())
    assert (summary["optimizer"], summary["status"], summary["steps"]) == ("adamw", "interrupted", 3)
    assert (run / "adamw" / "model" / "model.safetensors").is_file()
    assert (run / "loss.png").is_file()


def test_terminal_shows_loss_lr_speed_and_memory(make_config: Make) -> None:
    _, printed = command(make_config(num_training_steps=2), terminal=True)
    for figure in ("loss ", "lr ", "tokens/s ", "memory "):
        assert figure in printed


def test_single_table_compares_with_adamw(make_config: Make) -> None:
    _, printed = command(make_config(optimizer="galore_adamw", rank=4))
    for row in (
        "parameters",
        "optimizer state, galore_adamw",
        "optimizer state, AdamW",
        "perplexity before",
        "perplexity after",
        "tokens/s",
    ):
        assert row in printed
    assert "% of AdamW" in printed


def test_note_where_a_flag_does_not_reach_everyone(make_config: Make) -> None:
    config = make_config(compare=("adamw", "galore_adamw"), rank=4, num_training_steps=1, given=frozenset({"compare", "rank"}))
    _, printed = command(config)
    assert "note: adamw does not use --rank" in printed


@pytest.mark.parametrize(
    ("model", "optimizer", "says"),
    [
        ("mamba", "galore_adamw", "no layer of MambaForCausalLM is named as attention or MLP"),
        ("mixtral", "qgalore_adamw8bit", "weights outside of linear layers stay floating"),
    ],
)
def test_warnings_of_the_library_are_notes_said_once(
    model: str, optimizer: str, says: str, make_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No warning reaches Python's own display, which names a file and a line: here one would be an error. Nor does a resumed run's."""
    folder = make_model(model, tmp_path / model)
    settings = {"hf_model": str(folder), "model_config": "demo", "compare": (optimizer, f"{optimizer}_per_layer")}
    settings |= {"max_length": 16, "batch_size": 2, "eval_tokens": 64, "num_training_steps": 1, "rank": 4}
    capfd.readouterr()
    for resume in (None, "auto"):
        code, printed = command(make_config(**settings, resume=resume))
        assert code == 0
        assert [line.startswith("note: ") for line in printed.splitlines() if says in line] == [True]
    assert "Warning" not in capfd.readouterr().err


def test_names_in_brackets_are_shown(make_config: Make, tmp_path: Path) -> None:
    """The name of the run's folder, before and after it, is not taken for a colour."""
    code, printed = command(make_config(num_training_steps=1, save_dir=str(tmp_path / "run[red]")))
    assert code == 0
    assert printed.count("run[red]") == 2


def test_real_text(make_config: Make, shared_data: Path) -> None:
    c4 = shared_data / "c4"
    config = make_config(
        data=(str(c4 / "train.jsonl.gz"),),
        eval_data=(str(c4 / "validation.jsonl.gz"),),
        tokenizer=str(shared_data / "tokenizers" / "c4-bpe4096"),
        vocab_size=4096,
        eval_tokens=2000,
    )
    code, printed = command(config)
    assert code == 0
    assert "4096 ids" in printed


def test_start_says_what_is_projected(make_config: Make) -> None:
    """One layer of a LLaMA has 7 matrices: q, k, v, o and gate, up, down."""
    code, output = command(make_config(optimizer="galore_adamw", rank=4, num_training_steps=1))
    assert code == 0
    assert "projected  7 of 7 matrices, 100 % of the body" in output


def test_few_targets_are_projected_alone_and_warned_of(make_config: Make, tmp_path: Path) -> None:
    """q and v of 16 x 16 each are 512 of 4 x 256 + 3 x 384 = 2,176 weights; --resume keeps to them, other targets are refused."""
    settings = {"optimizer": "galore_adamw", "rank": 4, "num_training_steps": 1}
    code, output = command(make_config(**settings, targets=("q_proj", "v_proj")))
    assert code == 0
    assert "projected  2 of 7 matrices, 24 % of the body" in output
    assert "--targets leaves the rest at full rank, such as model.layers.0.self_attn.k_proj" in " ".join(output.split())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["targets"] == ["q_proj", "v_proj"]
    assert pretrain(make_config(**settings, targets=("q_proj", "v_proj"), resume="auto")) == 0
    with pytest.raises(UserError, match=r"--targets is None, but .*'q_proj', 'v_proj'"):
        pretrain(make_config(**settings, resume="auto"))


@pytest.mark.parametrize("targets", [None, ("q_proj",)])
def test_dry_run_shows_config_plan_and_batch_and_makes_nothing(targets: tuple[str, ...] | None, make_config: Make, tmp_path: Path) -> None:
    settings = {"optimizer": "galore_adamw", "rank": 4, "batch_size": 4, "total_batch_size": 8, "targets": targets}
    code, output = command(make_config(**settings, dry_run=True))
    assert code == 0
    assert not (tmp_path / "run").exists()
    assert '"warmup_steps": 0' in output
    assert "plan       galore_adamw: a peak of" in output
    assert "inputs (4, 16), targets (4, 16) of int64; 2 in one step" in output


def test_speed_leaves_out_the_first_update(make_config: Make, tmp_path: Path) -> None:
    """tokens/s of the summary are those of the rows that tell a speed; the first row tells none."""
    assert pretrain(make_config(num_training_steps=4)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *others = [row for row in rows if "loss" in row]
    assert first["warm_up"] in ("first step", "compiling")
    assert not first.keys() & {"tokens_per_s", "tflops", "mfu"}
    timed = [row for row in others if "warm_up" not in row]
    (summary,) = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens_per_s"] == pytest.approx(len(timed) * 64 / sum(row["seconds"] for row in timed), rel=1e-3)
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows if "loss" in row), rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_building_stops_at_once(
    number: signal.Signals, make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The exit code is the shell's for that signal; nothing is trained, and the folder is unlocked."""

    def building(*arguments: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr("galore_torch.train.loop.trainer.model_for", building)
    with pytest.raises(SystemExit) as stop:
        pretrain(make_config())
    assert stop.value.code == 128 + number
    assert not (tmp_path / "run" / ".lock").exists()
