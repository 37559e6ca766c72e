"""Metrics sent to TensorBoard, Weights & Biases or trackio, beside metrics.jsonl, which is always written.

Each tracker is an extra that is imported only when `--tracker` names it. One that fails later is dropped, not the run.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from galore_torch.train.checkpoint.resume import TRACKED
from galore_torch.train.errors import UserError
from galore_torch.train.loop.watcher import Watcher

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "galore"


class _Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, settings: dict[str, Any], after: int) -> None:
        # What a killed process wrote after its checkpoint is written again: its reader drops those points.
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else 0)
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """wandb, and trackio, which has the same functions, but knows a run by its name alone."""

    def __init__(self, module: Any, folder: Path, settings: dict[str, Any], after: int) -> None:
        self.module = module
        mark = secrets.token_hex(4)
        if module.__name__ == "wandb":
            which = {"id": _kept(folder, "wandb", mark), "name": folder.name, "dir": str(folder)}
        else:
            which = {"name": _kept(folder, "trackio", f"{folder.name}-{mark}")}
        module.init(project=_PROJECT, config=settings, resume="allow", **which)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def _kept(folder: Path, service: str, new: str) -> str:
    """What `service` has known the run in `folder` by since its first start, so that a resumed run goes on there: now `new`."""
    path = folder / TRACKED
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if service not in known:
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(known | {service: new}) + "\n", encoding="utf-8")
        partial.replace(path)
    return known.get(service, new)


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
    names: Sequence[str], watcher: Watcher, folder: Path, settings: dict[str, Any], warn: Callable[[str], None], after: int
) -> Iterator[Watcher]:
    """`watcher`, with every row also sent to the trackers; UserError where one does not start.

    after: the step that a resumed run goes on after. It goes on in the same run of each tracker.
    """
    trackers: dict[str, _Tracker] = {}
    try:
        for kind in dict.fromkeys(names):
            make = _TensorBoard if kind == "tensorboard" else _Service
            try:
                trackers[kind] = make(_import(kind), folder, settings, after)
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
