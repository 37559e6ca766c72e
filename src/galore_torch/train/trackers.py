"""Metrics sent to TensorBoard, Weights & Biases or trackio, beside metrics.jsonl, which is always written.

Each tracker is an extra that is imported only when `--tracker` names it. One that fails later is dropped, not the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from galore_torch.train.errors import UserError
from galore_torch.train.trainer import Watcher

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "galore"


class _Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.writer = module.SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """wandb, and trackio, which has the same functions."""

    def __init__(self, module: Any, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.module = module
        where = {"dir": str(folder)} if module.__name__ == "wandb" else {}
        module.init(project=_PROJECT, name=name, config=settings, **where)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Import each one; UserError says what to install."""
    for name in names:
        _import(name)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UserError(f'--tracker {name} cannot be used ({error}); install it with: pip install "galore-torch[{name}]"') from error


@contextmanager
def tracked(
    names: Sequence[str], watcher: Watcher, folder: Path, name: str, settings: dict[str, Any], warn: Callable[[str], None]
) -> Iterator[Watcher]:
    """`watcher`, with every row also sent to the trackers; UserError where one does not start."""
    trackers: dict[str, _Tracker] = {}
    try:
        for kind in dict.fromkeys(names):
            make = _TensorBoard if kind == "tensorboard" else _Service
            try:
                trackers[kind] = make(_import(kind), folder, name, settings)
            except Exception as error:  # whatever a service raises where nobody is logged in
                raise UserError(f"--tracker {kind} did not start: {error}; leave it out, or set it up first") from error
        yield _Tracked(watcher, trackers, warn) if trackers else watcher
    finally:
        for kind, tracker in trackers.items():
            _attempt(kind, tracker.close, warn)


class _Tracked:
    """A watcher that passes everything on."""

    def __init__(self, watcher: Watcher, trackers: dict[str, _Tracker], warn: Callable[[str], None]) -> None:
        self.watcher, self.trackers, self.warn = watcher, trackers, warn

    def step(self, row: dict[str, Any], total: int) -> None:
        self.watcher.step(row, total)
        self._send("train", row)

    def evaluated(self, row: dict[str, Any]) -> None:
        self.watcher.evaluated(row)
        self._send("eval", row)

    def should_stop(self) -> bool:
        return self.watcher.should_stop()

    def _send(self, prefix: str, row: dict[str, Any]) -> None:
        values = flat(prefix, row)
        for kind, tracker in list(self.trackers.items()):
            if not _attempt(kind, lambda tracker=tracker: tracker.log(values, row["step"]), self.warn):  # type: ignore[misc]
                del self.trackers[kind]


def _attempt(kind: str, act: Callable[[], None], warn: Callable[[str], None]) -> bool:
    try:
        act()
    except Exception as error:  # a lost connection or a full disk must not cost a day of training
        warn(f"--tracker {kind} failed and is left out from here on ({error}); metrics.jsonl has everything")
        return False
    return True


def flat(prefix: str, row: dict[str, Any]) -> dict[str, float]:
    """A row of metrics as names with a prefix: train/loss, eval/loss, overlap/<matrix>, memory_mb/<part>; text is left out."""
    values: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            values |= {f"{key}/{name}": item for name, item in value.items()}
        elif key != "step" and not isinstance(value, str):
            values[f"{prefix}/{key.removeprefix('eval_')}"] = value
    return values
