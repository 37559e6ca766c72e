"""The command line: help without torch, one line and exit code 2 for what the user can fix."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from galore_torch import __version__, cli
from galore_torch.train.config.config import PretrainConfig

SRC = Path(cli.__file__).resolve().parents[1]

# Every flag of the published script.
PUBLISHED_FLAGS = {
    *("model_config", "lr", "galore_scale", "rank", "update_proj_gap", "batch_size", "total_batch_size"),
    *("num_training_steps", "warmup_steps", "weight_decay", "dtype", "eval_every", "optimizer", "activation_checkpointing"),
    *("grad_clipping", "proj_type", "max_length", "scheduler", "min_lr_ratio", "seed", "save_dir", "beta1"),
    *("use_hf_model", "continue_from", "gradient_accumulation", "max_train_tokens", "save_every", "tags", "workers", "name", "single_gpu"),
}


def galore(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run(
        [sys.executable, "-m", "galore_torch.cli", *words], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error; the exit code has to be 2."""
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "words",
    [
        *[["--help"], ["pretrain", "--help"], ["pretrain", "--config", "60m", "--rank", "0"], ["recipes"], ["report", "--help"]],
        *[["export", "--help"], ["generate", "--help"]],
        *[["pretrain", "--data", "nowhere.txt"], ["pretrain", "--tokenizer", "./nowhere"], ["pretrain", "--hf_model", "./nowhere"]],
        *[["pretrain", "--save_dir", str(SRC)], ["pretrain", "--resume", "./nowhere"], ["pretrain", "--lrr", "1"]],
    ],
)
def test_parsing_loads_no_heavy_library(words: list[str]) -> None:
    program = (
        "import sys\nfrom galore_torch.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "print('loaded:', [m for m in ('torch', 'transformers', 'tokenizers', 'rich', 'matplotlib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_published_flags_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    missing = {flag for flag in PUBLISHED_FLAGS if f"--{flag}" not in text}
    assert not missing
    assert "presets: demo, 9m" in text
    assert "galore_adamw8bit_per_layer" in text


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    for item in fields(PretrainConfig):
        if item.name not in ("given", "machine", "processes", "remarks", "throwaway"):
            assert item.metadata["help"]


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "pretrain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "x"], ["--rank", "'x'", "whole number"]),
        (["--rank", "2.5"], ["--rank", "'2.5'", "whole number"]),
        (["--rank", "0"], ["--rank 0", "at least 1"]),
        (["--lr", "fast"], ["--lr", "'fast'", "0.01"]),
        (["--lr", "-1"], ["--lr -1.0", "greater than 0"]),
        (["--data", "nowhere.txt"], ["--data nowhere.txt", "does not exist"]),
        (["--optimizer", "lion"], ["'lion'", "galore_adamw"]),
        (["--optimizer", "AdamW", "--rank", "8"], ["--rank has no effect on adamw"]),
        (["--compare", "adamw,sgd", "--galore_scale", "1"], ["--galore_scale has no effect on adamw, sgd"]),
        (["--compare", ","], ["names no optimizer"]),
        (["--total_batch_size", "20"], ["--total_batch_size 20", "--batch_size 16", "try --total_batch_size 16"]),
        (["--learning_rate", "1"], ["--learning_rate", "--help"]),
        (["--model_config"], ["--model_config", "expected one argument"]),
        (["--wam", "1"], ["--wam"]),
    ],
)
def test_bad_word_is_one_line_and_exit_2(words: list[str], says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "pretrain", *words)
    assert all(part in line for part in says), line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"galore-torch {__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "pretrain" in failure(capsys, "train")


def test_empty_file_from_a_shell(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = galore("pretrain", "--data", "empty.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "galore: --data empty.txt is empty (0 bytes); give a file with text\n"
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_missing_extra_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "tokenizers") else object())
    line = failure(capsys, "pretrain")
    assert "needs tokenizers, rich" in line
    assert 'pip install "galore-torch[train]"' in line


def test_report_needs_only_the_package_that_draws(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    line = failure(capsys, "report", "runs/first")
    assert "galore report needs matplotlib;" in line


def test_report_loads_neither_torch_nor_transformers() -> None:
    """A report is drawn where nothing can be trained."""
    program = (
        "import sys, galore_torch.train.report.html\nprint('loaded:', [m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_what_is_typed_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PretrainConfig] = []
    monkeypatch.setattr("galore_torch.cli.check_ready", lambda config: None)
    monkeypatch.setattr("galore_torch.train.commands.pretrain.pretrain", lambda config: seen.append(config) or 0)
    words = "pretrain --num-training-steps=7 --data a.txt b.txt --data c.txt --activation_checkpointing --min-lr-ratio 0.5"
    assert cli.main([*words.split(), "--compare", "adamw,galore_adamw:0.02"]) == 0
    (config,) = seen
    assert (config.num_training_steps, config.min_lr_ratio, config.activation_checkpointing) == (7, 0.5, True)
    assert config.data == ("a.txt", "b.txt", "c.txt")
    assert config.contenders[1] == ("galore_adamw", 0.02)
    assert config.given == {"num_training_steps", "data", "activation_checkpointing", "compare", "min_lr_ratio"}


def test_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: PretrainConfig) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("galore_torch.train.commands.pretrain.pretrain", interrupted)
    assert cli.main(["pretrain"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pretrian"], "'pretrian' is not known; did you mean pretrain?"),
        (["pretrain", "--lrr", "1"], "--lrr 1; did you mean --lr? (see galore pretrain --help)"),
        (["pretrain", "--batch-sise=4"], "did you mean --batch_size?"),
        (["recipes", "shwo", "60m"], "'shwo' is not known; did you mean show?"),
        (["recipes", "show", "60n"], "recipe '60n' is not known; did you mean 60m?"),
    ],
)
def test_near_miss_is_answered_with_the_name(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in failure(capsys, *words)


def test_device_that_is_not_here_is_refused_before_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("galore_torch.train.device.Path.exists", lambda path: False)
    assert "--device cuda: this machine shows no GPU; give --device cpu" in failure(capsys, "pretrain", "--device", "cuda")
