"""Trackers: what reaches them, what happens where one is missing or breaks. Stand-ins take the packages' places."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from galore_torch.train.checkpoint.storage import checkpoints_in, step_of
from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.report.trackers import flat

Make = Callable[..., PretrainConfig]


class Recorder:
    """A stand-in for wandb, trackio or a SummaryWriter; `broken` names the function that raises."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, broken: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.broken = broken
        where = "torch.utils.tensorboard" if name == "tensorboard" else name
        module = ModuleType(where)
        for function in ("init", "log", "finish", "add_scalar", "add_text", "close", "SummaryWriter"):
            setattr(module, function, self.recorded(function, module))
        monkeypatch.setitem(sys.modules, where, module)

    def recorded(self, function: str, module: ModuleType) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if function == self.broken:
                raise ConnectionError("no route to host")
            self.calls.append((function, args, kwargs))
            return module  # a SummaryWriter has the functions too

        return call

    def of(self, function: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for name, args, kwargs in self.calls if name == function]


def command(config: PretrainConfig) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=140)
    return pretrain(config, console), console.file.getvalue()  # type: ignore[attr-defined]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_service_gets_every_row_under_its_step(name: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(name, monkeypatch)
    assert command(make_config(tracker=(name,), optimizer="galore_adamw", rank=4, track_subspace=True))[0] == 0
    ((_, start),) = recorder.of("init")
    assert (start["project"], start["config"]["optimizer"]) == ("galore", "galore_adamw")
    assert start["name"].partition("-")[0] == "run"
    assert (start.get("dir") == str(tmp_path / "run")) == (name == "wandb")
    assert len(recorder.of("finish")) == 1
    rows = metrics(tmp_path / "run")
    sent = [(args[0], kwargs["step"]) for args, kwargs in recorder.of("log")]
    assert [step for _, step in sent] == [row["step"] for row in rows]
    for (values, _), row in zip(sent, rows, strict=True):
        assert values.get("train/loss") == row.get("loss")
        assert values.get("eval/loss") == row.get("eval_loss")
        assert all(isinstance(value, (int, float)) for value in values.values())
    assert any(key.startswith("overlap/model.layers.0") for values, _ in sent for key in values)


def test_resumed_run_goes_on_in_the_same_run_of_each_service(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb knows a run by its id, trackio by its name; a run in another folder is another one to both."""
    services = [Recorder(name, monkeypatch) for name in ("wandb", "trackio")]
    trackers: dict[str, Any] = {"tracker": ("wandb", "trackio"), "save_every": 2, "keep": 9}
    assert command(make_config(**trackers))[0] == 0
    killed_after_update(4, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert command(make_config(**trackers, save_dir=str(tmp_path / "moved"), resume="auto"))[0] == 0
    branch = make_config(**trackers, save_dir=str(tmp_path / "branch"), resume=str(tmp_path / "moved" / "checkpoints" / "step-000002"))
    assert command(branch)[0] == 0
    for recorder, key in zip(services, ("id", "name"), strict=True):
        first, resumed, branched = [kwargs for _, kwargs in recorder.of("init")]
        assert first["resume"] == resumed["resume"] == "allow"
        assert first[key] == resumed[key] != branched[key]
        steps = [kwargs["step"] for _, kwargs in recorder.of("log")]
        assert steps == [*[0, 1, 2, 3, 4, 5, 6, 6], *[5, 6, 6], *[3, 4, 5, 6, 6]]


def test_run_that_starts_again_before_its_first_checkpoint_is_the_same_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder("wandb", monkeypatch)
    config = make_config(tracker=("wandb",), num_training_steps=2, resume="auto")
    assert command(config)[0] == 0
    for path in (tmp_path / "run").iterdir():  # what a kill leaves
        if path.name not in ("config.json", "metrics.jsonl", "trackers.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert command(config)[0] == 0
    first, again = [kwargs["id"] for _, kwargs in recorder.of("init")]
    assert first == again


def killed_after_update(step: int, run: Path) -> None:
    """Make a finished run look as if it had been killed after the checkpoint of `step`, and before the next one."""
    for path in checkpoints_in(run / "checkpoints"):
        if step_of(path) > step:
            shutil.rmtree(path)


def test_several_trackers_and_several_runs(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a comparison is a run of its own to each tracker."""
    board, service = Recorder("tensorboard", monkeypatch), Recorder("wandb", monkeypatch)
    code, _ = command(make_config(compare=("adamw", "sgd"), tracker=("tensorboard", "wandb", "wandb"), num_training_steps=2))
    assert code == 0
    assert [args[0] for args, _ in board.of("SummaryWriter")] == [str(tmp_path / "run" / name / "tensorboard") for name in ("adamw", "sgd")]
    assert [kwargs["name"] for _, kwargs in service.of("init")] == ["adamw", "sgd"]
    assert [args[2] for args, _ in board.of("add_scalar") if args[0] == "train/loss"] == [1, 2, 1, 2]
    assert len(board.of("close")) == len(service.of("finish")) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_missing_package_is_said_before_training(name: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (name, "torch.utils.tensorboard", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(UserError, match=rf'--tracker {name} cannot be used .*pip install "galore-torch\[{name}\]"'):
        command(make_config(tracker=(name,)))
    assert not (tmp_path / "run").exists()


def test_service_that_refuses_to_start_stops_before_training(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder("wandb", monkeypatch, broken="init")
    with pytest.raises(UserError, match=r"--tracker wandb did not start: no route to host; leave it out"):
        command(make_config(tracker=("wandb",)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_service_that_breaks_does_not_cost_the_run(broken: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named once; the other tracker and metrics.jsonl have everything."""
    Recorder("wandb", monkeypatch, broken=broken)
    other = Recorder("trackio", monkeypatch)
    code, printed = command(make_config(tracker=("wandb", "trackio")))
    assert code == 0
    assert printed.count("--tracker wandb failed") == 1
    assert len(other.of("log")) == len(metrics(tmp_path / "run")) == 8


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match="--tracker 'mlflow' is not known; choose one of: tensorboard, wandb, trackio"):
        PretrainConfig(tracker=("tensorboard", "mlflow"))


def test_names_of_values() -> None:
    row = {"step": 3, "loss": 1.0, "skipped": "why", "overlap": {"a.weight": 0.5}, "memory_mb": {"weights": 2.0}}
    assert flat("train", row) == {"train/loss": 1.0, "overlap/a.weight": 0.5, "memory_mb/weights": 2.0}
    assert flat("eval", {"step": 3, "eval_loss": 1.0, "seconds": 2.0}) == {"eval/loss": 1.0, "eval/seconds": 2.0}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_real_tensorboard_reads_back_the_losses_of_a_resumed_run(make_config: Make, tmp_path: Path) -> None:
    """Written by torch's SummaryWriter, read by TensorBoard's own reader: each step once, though some were written twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tracker=("tensorboard",), save_every=2, keep=9, resume="auto")
    assert command(config)[0] == 0
    killed_after_update(4, tmp_path / "run")
    assert command(config)[0] == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {row["step"]: row["loss"] for row in metrics(tmp_path / "run") if "loss" in row}
    read = events.Scalars("train/loss")
    assert [event.step for event in read] == list(losses)
    assert {event.step: event.value for event in read} == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 6]
