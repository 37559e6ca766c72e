"""A run that is killed or stopped at any moment, and resumed, is the uninterrupted run."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from galore_torch import cli
from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.model.loss import TokenLoss
from galore_torch.train.report.progress import Display
from support.forked import Forked
from support.whole_runs import assert_same_run, command, rows

Make = Callable[..., PretrainConfig]


def killed(forked: Forked, words: list[str], at: Callable[[], bool], with_signal: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """(exit code, what it said) of a `galore` that gets the signal as soon as `at` says so."""
    (process,) = forked.start(words)
    deadline = time.monotonic() + 120
    while not at() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process, with_signal)
    (code,), (said,) = forked.wait()
    return code, said


def has_lines(folder: Path, lines: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") >= lines


CASES = {
    "one optimizer after the other": (
        ["galore_adamw", "galore_adamw_per_layer", "galore_adamw8bit", "adamw"],
        ["--compare", "galore_adamw,galore_adamw_per_layer,galore_adamw8bit,adamw"],
    ),
    "per layer, accumulated, clipped, bf16": (
        [".", "."],
        ["--optimizer", "galore_adamw_per_layer", "--total_batch_size", "8", "--grad_clipping", "0.5", "--dtype", "bf16"],
    ),
    "text streams, documents packed": (["."], ["--optimizer", "galore_adamw", "--stream"]),
}


# One optimizer after the other takes as long as all others together.
@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if "other" in name else ()) for name in CASES])
def test_killed_at_random_and_resumed_is_the_uninterrupted_run(
    case: str, text_file: Path, model_file: Path, tmp_path: Path, forked: Forked
) -> None:
    """SIGKILL at a random line of each folder's metrics, by another process; then to the end. Curves and weights are bit-equal."""
    folders, own = CASES[case]
    words = ["pretrain", "--model_config", str(model_file), "--data", str(text_file), "--device", "cpu", "--max_length", "16", *own]
    words += ["--batch_size", "4", "--num_training_steps", "60", "--update_proj_gap", "3", "--rank", "4", "--eval_every", "10"]
    assert cli.main([*words, "--save_dir", str(tmp_path / "whole")]) == 0
    resumable = [*words, "--save_every", "7", "--save_dir", str(tmp_path / "parts"), "--resume", "auto"]
    seed = random.randrange(10**6)
    print("seed", seed)  # pytest shows it where this fails
    places = random.Random(seed)
    for last, folder in zip([*[False] * (len(folders) - 1), True], folders, strict=True):
        line = places.randint(10 if last else 1, 40)  # also before the first checkpoint, but not every time
        code, said = killed(forked, resumable, lambda: has_lines(tmp_path / "parts" / folder, line))  # noqa: B023
        assert code == -signal.SIGKILL, said
    code, said = forked.run(*resumable)
    assert code == 0, said
    assert "resumed" in said
    for folder in folders:
        assert_same_run(tmp_path / "parts" / folder, tmp_path / "whole" / folder)
        saved = [path.name for path in checkpoints_in(tmp_path / "parts" / folder / "checkpoints")]
        assert saved == ["step-000056", "step-000060"]


def test_sigterm_saves_and_leaves_with_143(text_file: Path, model_file: Path, tmp_path: Path, forked: Forked) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--model_config", str(model_file), "--data", str(text_file), "--device", "cpu", "--max_length", "16"]
    words = [*words, "--batch_size", "4", "--num_training_steps", "100000", "--save_dir", str(run)]
    code, output = killed(forked, words, lambda: has_lines(run, 5), signal.SIGTERM)
    assert code == 143, output
    last = rows(run)[-1]["step"]
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == [f"step-{last:06d}"]
    assert (
        f"interrupted by SIGTERM: what was trained so far is saved; go on with the same command and --save_dir {run} --resume auto"
        in output
    )


def test_sigterm_may_come_twice_and_ctrl_c_after_it_drops_the_run() -> None:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits SIG_IGN
    try:
        with Display(Console(file=io.StringIO())) as display:
            assert not display.should_stop()  # who has asked will stop by himself
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert display.stopped_by == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Display(Console(file=io.StringIO())) as display:
            signal.raise_signal(signal.SIGINT)
            assert not display.should_stop(), "a job that ignores Ctrl-C has to go on"
    finally:
        signal.signal(signal.SIGINT, found)


@pytest.mark.parametrize("at", [0, 3])
def test_stop_during_an_evaluation_does_not_wait_for_it(
    at: int, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is without it; the resumed run makes up for it and equals the uninterrupted one."""
    assert command(make_config(save_dir=str(tmp_path / "whole"), eval_every=3, batch_size=1))[0] == 0
    forward, updates = TokenLoss.forward, 0

    def signalling(loss: TokenLoss, *args: torch.Tensor) -> torch.Tensor:
        nonlocal updates
        if torch.is_grad_enabled():
            updates += 1
        elif updates == at:
            signal.raise_signal(signal.SIGTERM)
        return forward(loss, *args)

    config = make_config(eval_every=3, batch_size=1, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(TokenLoss, "forward", signalling)
        assert command(config)[0] == 143
    assert [row["step"] for row in rows(tmp_path / "run")] == ([0, 1, 2, 3] if at else [])
    assert command(config)[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
