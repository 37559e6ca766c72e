"""The command, killed and called again: what comes out, what it says, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from galore_torch import cli
from galore_torch.train import pretrain as module
from galore_torch.train.checkpoint import checkpoints_in
from galore_torch.train.config import PretrainConfig
from galore_torch.train.data import TokenData
from galore_torch.train.display import Display
from galore_torch.train.errors import UserError
from galore_torch.train.pretrain import pretrain
from galore_torch.train.resume import find_starts
from galore_torch.train.trainer import _Loop, train

Make = Callable[..., PretrainConfig]
# What differs between two equal runs: a clock, the system's memory, and sizes that each process measures once.
CLOCK = {"tokens_per_s", "seconds", "optimizer_s", "rss_mb", "peak_rss_mb", "memory_mb"}


class Silent:
    def step(self, row: dict[str, Any], total: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def should_stop(self) -> bool:
        return False


def command(config: PretrainConfig) -> tuple[int, str]:
    """(exit code, what was printed)."""
    console = Console(file=io.StringIO(), width=400)
    code = pretrain(config, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}


# Imports once what a run needs, then makes a process of its own for each command it reads: (words, log, cache). A killed process,
# unlike a lost machine, loses nothing that it gave to the system, so none of them waits for the disk; none draws the picture.
FORKER = """
import json, os, sys
import torch, transformers.models.llama.modeling_llama
import galore_torch.train.pretrain
from galore_torch import cli
os.fsync = lambda descriptor: None
galore_torch.train.pretrain.draw = lambda *_: None
for line in sys.stdin:
    words, log, os.environ["XDG_CACHE_HOME"] = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        code = cli.main(words)
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forker:
    """`galore` in processes that can be killed, without seconds of imports for each."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, words: list[str], kill_at: Callable[[], bool] | None = None) -> int:
        """The exit code; SIGKILL as soon as `kill_at` says so."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([words, str(self.log), os.environ["XDG_CACHE_HOME"]]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_at is not None:
            deadline = time.monotonic() + 120
            while not kill_at() and time.monotonic() < deadline:
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    forker = Forker(tmp_path_factory.mktemp("forker") / "log")
    with forker.process:  # closes its standard input, which ends it, and waits
        yield forker


def has_lines(folder: Path, lines: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") >= lines


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    weights = load_file(one / "model" / "model.safetensors")
    assert all(torch.equal(weights.pop(key), value) for key, value in load_file(other / "model" / "model.safetensors").items())
    assert not weights


CASES = {
    "one optimizer after the other": (
        ["galore_adamw", "galore_adamw_per_layer", "galore_adamw8bit", "adamw"],
        ["--compare", "galore_adamw,galore_adamw_per_layer,galore_adamw8bit,adamw"],
    ),
    "per layer, accumulated, clipped, bf16": (
        [".", "."],
        ["--optimizer", "galore_adamw_per_layer", "--total_batch_size", "8", "--grad_clipping", "0.5", "--dtype", "bf16"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_and_resumed_is_the_uninterrupted_run(
    case: str, text_file: Path, model_file: Path, tmp_path: Path, forker: Forker
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
        assert forker.run(resumable, lambda: has_lines(tmp_path / "parts" / folder, line)) == -signal.SIGKILL, forker.log.read_text()  # noqa: B023
    assert forker.run(resumable) == 0, forker.log.read_text()
    assert "resumed" in forker.log.read_text()
    for folder in folders:
        assert_same_run(tmp_path / "parts" / folder, tmp_path / "whole" / folder)
        saved = [path.name for path in checkpoints_in(tmp_path / "parts" / folder / "checkpoints")]
        assert saved == ["step-000056", "step-000060"]


def test_sigterm_saves_and_leaves_with_143(text_file: Path, model_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--model_config", str(model_file), "--data", str(text_file), "--device", "cpu", "--max_length", "16"]
    words = [*words, "--batch_size", "4", "--num_training_steps", "100000", "--save_dir", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "galore_torch.cli", *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while process.poll() is None and not has_lines(run, 5):
            time.sleep(0.01)
        process.terminate()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, output
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
    loss = _Loop.loss

    def signalling(self: _Loop, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs and self.result.steps == at:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, *args, **kwargs)

    config = make_config(eval_every=3, batch_size=1, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "loss", signalling)
        assert command(config)[0] == 143
    assert [row["step"] for row in rows(tmp_path / "run")] == ([0, 1, 2, 3] if at else [])
    assert command(config)[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- where to go on -------------------------------------------------------------------------------------------------------


def test_auto_starts_afresh_where_nothing_was_saved(make_config: Make, tmp_path: Path) -> None:
    config = make_config(resume="auto")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 0, "ev')
    (run / "checkpoints" / ".tmp-step-000001").mkdir(parents=True)
    code, printed = command(config)
    assert (code, "resumed" in printed) == (0, False)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_auto_starts_afresh_beside_what_a_tracker_left(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert find_starts(make_config(resume="auto", tracker=("wandb",))).folder == run
    assert find_starts(make_config(resume="auto")).folder is None


def test_sizes_are_measured_in_the_first_update_that_is_not_skipped(
    make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = _Loop.loss
    monkeypatch.setattr(_Loop, "loss", lambda self, *a, **k: loss(self, *a, **k) * (1 if self.result.steps or k else torch.nan))
    train(make_config(), "adamw", 0.01, token_data, tmp_path, Silent())
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if "memory_mb" in row] == [2]


def test_auto_names_and_skips_the_broken_ones(make_config: Make, tmp_path: Path) -> None:
    config = make_config(save_every=2, keep=9, resume="auto")
    assert command(config)[0] == 0
    first, second, third = checkpoints_in(tmp_path / "run" / "checkpoints")
    (third / "optimizer.safetensors").write_bytes((third / "optimizer.safetensors").read_bytes()[:-1])
    whole = rows(tmp_path / "run")
    code, printed = command(config)
    assert code == 0
    assert f"skipped: {third} is broken: optimizer.safetensors has" in printed
    assert "resumed    adamw after update 4" in printed
    assert rows(tmp_path / "run") == whole
    for path in (first, second, third):
        (path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"none of 3 checkpoints is whole; .*step-000006 is broken: model.safetensors is missing; give a new"
    ):
        command(config)


def test_finished_run_is_left_as_it_is(make_config: Make, tmp_path: Path) -> None:
    command(make_config())
    before, summary = rows(tmp_path / "run"), (tmp_path / "run" / "summary.json").read_text()
    code, printed = command(make_config(resume="auto"))
    assert (code, "resumed    adamw after update 6" in printed) == (0, True)
    assert rows(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(summary)


def test_a_folder_resumes_just_that_one(make_config: Make, tmp_path: Path) -> None:
    """Branched off into a new folder; in its own folder only where the run has not gone further."""
    command(make_config(save_every=2, keep=9))
    second, last = checkpoints_in(tmp_path / "run" / "checkpoints")[1:]
    with pytest.raises(
        UserError, match=r"the run has gone on to step-000006; go on from there with --save_dir .* --resume auto, or branch"
    ):
        command(make_config(resume=str(second), save_dir=None))
    code, printed = command(make_config(resume=str(second), save_dir=str(tmp_path / "branch")))
    assert (code, "after update 4" in printed) == (0, True)
    assert_same_run(tmp_path / "branch", tmp_path / "run")
    shutil.rmtree(last)
    assert command(make_config(resume=str(second), save_dir=None))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "branch")


def test_what_is_not_a_run_is_never_touched(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_text("weights of last week")
    with pytest.raises(UserError, match="already exists and is not empty"):
        command(make_config(resume="auto"))
    assert [path.name for path in run.iterdir()] == ["model.safetensors"]
    with pytest.raises(UserError, match=r"has no manifest.json: it is no whole checkpoint"):
        command(make_config(resume=str(run)))
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        command(make_config(resume="nowhere"))
    with pytest.raises(UserError, match=r"--resume auto looks for checkpoints in --save_dir"):
        command(make_config(resume="auto", save_dir=None))
    with pytest.raises(UserError, match=r"--compare has 2 runs; use --resume auto"):
        make_config(resume=str(run), compare=("adamw", "sgd"))


# --- another run's checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.5}, r"--lr is 0.5, but 0.003 in .*step-000006, which would change the run; give 0.003, or start a new run"),
        ({"seed": 1}, "--seed is 1, but 0"),
        ({"optimizer": "sgd"}, "--optimizer is sgd, but adamw"),
        ({"total_batch_size": 8}, "--total_batch_size is 8, but 4"),
        ({"num_training_steps": 7}, "--num_training_steps is 7, but 6"),
        ({"dtype": "bf16"}, "--dtype is bfloat16, but float32"),
        ({"max_length": 8}, "--max_length is 8, but 16"),
        ({"vocab_size": 310}, r"--model_config \(vocab_size\) is 310, but 300"),
        ({"text": "other"}, "--data gives .* was trained on .*; give the same text, --eval_data and --tokenizer"),
    ],
)
def test_contradicting_setting_is_refused(
    make_config: Make, text_file: Path, tmp_path: Path, changes: dict[str, Any], says: str, finished_run: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    if changes.pop("text", None):
        lines = text_file.read_text().splitlines()
        text_file.write_text("\n".join([lines[2], lines[1], lines[0], *lines[3:]]))  # the same name, and almost the same text
    with pytest.raises(UserError, match=says):
        command(make_config(resume="auto", **changes))
    assert rows(tmp_path / "run") == rows(finished_run)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished_run(make_config: Make, shared: Path) -> Path:
    """One for all tests of this file: what is refused depends on the text, not on where it lies."""
    if not any(shared.iterdir()):
        command(make_config(save_dir=str(shared)))
    return shared


def test_settings_that_move_no_weight_may_change(make_config: Make, tmp_path: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    config = make_config(resume="auto", eval_every=2, save_every=3, keep=1, max_bad_steps=2, eval_tokens=64, activation_checkpointing=True)
    assert command(config)[0] == 0


def test_another_machine_is_noted(make_config: Make, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    _, printed = command(make_config(resume="auto"))
    assert "threads was 1 and is 99 now: the run goes on, but not to the last bit" in printed


# --- updates that are not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        *[("adamw", "loss"), ("adamw", "gradient norm"), ("galore_adamw", "loss"), ("galore_adamw", "gradient norm")],
        ("galore_adamw_per_layer", "loss"),  # inside the backward pass the optimizer itself skips each matrix's bad gradient
    ],
)
def test_bad_update_is_skipped_and_counted(
    name: str, broken: str, make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates 3 and 4 meet NaN: the weights stay as update 2 left them, and the run learns on."""
    loss = _Loop.loss

    def sometimes(self: _Loop, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = loss(self, *args, **kwargs)
        if kwargs or self.result.steps not in (2, 3):
            seen[self.result.steps] = [p.clone() for p in self.model.parameters()]
            return value
        if broken == "loss":
            return value * torch.nan
        value.register_hook(lambda grad: grad * torch.inf)
        return value

    seen: dict[int, list[torch.Tensor]] = {}
    monkeypatch.setattr(_Loop, "loss", sometimes)
    result, _ = train(make_config(optimizer=name, eval_every=2), name, 0.01, token_data, tmp_path, Silent())
    assert (result.status, result.skipped, result.skipped_in_a_row) == ("finished", 2, 0)
    assert all(torch.equal(one, other) for one, other in zip(seen[2], seen[4], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(seen[4], seen[5], strict=True))
    updates = [row for row in rows(tmp_path) if "lr" in row]
    assert [row["step"] for row in updates if "skipped" in row] == [3, 4]
    assert all(row["skipped"].startswith(f"the {broken} is ") for row in updates if "skipped" in row)
    assert ["refreshes" in row for row in updates] == [name != "adamw" and "skipped" not in row for row in updates]
    assert [step for step, _ in result.losses] == ([1, 2, 5, 6] if broken == "loss" else [1, 2, 3, 4, 5, 6])


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted across a resume; doubtful checkpoints do not push out the last good one."""
    loss = _Loop.loss
    monkeypatch.setattr(_Loop, "loss", lambda self, *a, **k: loss(self, *a, **k) * (torch.nan if self.result.steps > 1 and not k else 1))

    def interrupt_at_4(self: Display, row: dict[str, Any], total: int) -> None:
        if row["step"] == 4:
            self.stopped_by = signal.SIGTERM

    config = make_config(save_every=1, keep=1, max_bad_steps=3, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", interrupt_at_4)
        assert command(config)[0] == 143
    code, printed = command(config)
    assert code == module.EXIT_STOPPED
    assert "adamw stopped: the loss is nan at step 5, 3 skipped in a row; lower the lr" in printed
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize("name", ["adamw", "galore_adamw_per_layer"])
def test_loss_that_jumps_is_skipped_where_that_is_asked_for(
    name: str, make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update 56 reads 9 nats too much; update 3 does too, but then nothing is known yet."""
    loss = _Loop.loss
    monkeypatch.setattr(_Loop, "loss", lambda self, *a, **k: loss(self, *a, **k) + (9 if self.result.steps in (2, 55) and not k else 0))
    settings: dict[str, Any] = {"optimizer": name, "num_training_steps": 58}
    result, _ = train(make_config(max_loss_rise=3.0, **settings), name, 0.01, token_data, tmp_path, Silent())
    (skipped,) = [row for row in rows(tmp_path) if "skipped" in row]
    assert (skipped["step"], result.skipped, result.finished) == (56, 1, True)
    assert skipped["loss"] > 9
    assert "above the median of the last 50" in skipped["skipped"]
    result, _ = train(make_config(**settings), name, 0.01, token_data, tmp_path, Silent())
    assert result.skipped == 0


def test_weights_that_are_not_finite_are_no_checkpoint(make_config: Make, tmp_path: Path) -> None:
    code, _ = command(make_config(optimizer="sgd", lr=1e38, save_every=1, warmup_steps=0))
    assert code == module.EXIT_STOPPED
    for path in checkpoints_in(tmp_path / "run" / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())
