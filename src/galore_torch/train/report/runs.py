"""Runs read back from their folders: what metrics.jsonl, config.json and summary.json say, whole or cut short.

Forgiving inside a run (a killed one ends in half a line), strict about what is one. Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galore_torch.train.config.compare import name_with_lr
from galore_torch.train.errors import UserError
from galore_torch.train.report.series import RefreshShare, number, smooth

Points = tuple[list[float], list[float]]  # x and y of one curve


@dataclass
class Run:
    """One optimizer's run. `steps` and `evals` are rows of metrics.jsonl in the order of their steps, each step once."""

    folder: Path
    name: str
    updates: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0  # lines of metrics.jsonl
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seconds, self.wall = self._wall_clock()

    @property
    def optimizer(self) -> str:
        made = _dict(self.config.get("resolved")).get("optimizers")
        names = [_dict(one).get("optimizer") for one in made] if isinstance(made, list) else []
        alone = names[0] if len(names) == 1 else self.folder.name if names else None  # a comparison names folders after optimizers
        return str(self.summary.get("optimizer") or alone or "-")

    @property
    def status(self) -> str:
        """What the run said of itself at its last step, else what that step says."""
        last, planned = self.last_step, number(self.config.get("num_training_steps"))
        if self.summary.get("status") and number(self.summary.get("steps", last)) == last:  # else it was resumed after that
            return str(self.summary["status"])
        if planned is None:
            return f"at step {last}"
        return "finished" if last >= planned else f"not finished: step {last} of {planned:.0f}"

    @property
    def last_step(self) -> int:
        """Of its steps; 0 where it made none."""
        return int(self.updates[-1]["step"]) if self.updates else 0

    def series(self, y: str, x: str = "step") -> Points:
        """A field of the steps over `step`, `tokens_seen` or `wall` (seconds); steps without the field are left out."""
        return self._points(self.updates, lambda row: number(row.get(y)), x)

    def held_out(self, x: str = "step") -> Points:
        """Held-out loss (nats per token)."""
        return self._points(self.evals, lambda row: number(row.get("eval_loss")), x)

    @property
    def scores(self) -> dict[str, Points]:
        """Name of a task's score -> (steps, values); the first one is the task's own. {} of a run without scores."""
        found: dict[str, Points] = {}
        for row in self.evals:
            for name, value in _dict(row.get("scores")).items():
                if (score := number(value)) is not None:
                    steps, values = found.setdefault(str(name), ([], []))
                    steps.append(row["step"])
                    values.append(score)
        return found

    @property
    def score(self) -> tuple[str, float, int, float, int] | None:
        """(name, last value, its step, best value, its step) of the task's own score after a step; of equal ones the first is the best."""
        name, (steps, values) = next(iter(self.scores.items()), ("", ([], [])))
        after = [(value, int(step)) for step, value in zip(steps, values, strict=True) if step > 0]
        if not after:
            return None
        best = max(after, key=lambda pair: (pair[0], -pair[1]))
        return name, *after[-1], *best

    @property
    def rates_tried(self) -> dict[str, Points]:
        """What a sweep of learning rates was of -> (rates, losses of the short runs), by rate; {} of a run without one."""
        found: dict[str, list[tuple[float, float]]] = {}
        records = _dict(self.config.get("resolved")).get("find_lr")
        for one in records if isinstance(records, list) else []:
            rate, loss = number(_dict(one).get("rate")), number(_dict(one).get("loss"))
            if rate is not None and loss is not None:
                found.setdefault(str(one.get("of")), []).append((rate, loss))
        return {of: ([rate for rate, _ in sorted(pairs)], [loss for _, loss in sorted(pairs)]) for of, pairs in found.items()}

    @property
    def result(self) -> tuple[int, float] | None:
        """(step, loss) of the last validation after a step; the one before training is no result."""
        steps, losses = self.held_out()
        return (int(steps[-1]), losses[-1]) if steps and steps[-1] > 0 else None

    def _points(self, rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], x: str) -> Points:
        at = (lambda row: self._seconds.get(row["step"])) if x == "wall" else (lambda row: number(row.get(x)))
        pairs = [(at(row), value(row)) for row in rows]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [a for a, _ in known], [b for _, b in known]

    def _wall_clock(self) -> tuple[dict[int, float], float]:
        """step -> seconds of steps and evaluations until then, and of all; what a killed run did twice counts once."""
        of_evals = {row["step"]: number(row.get("seconds")) or 0.0 for row in self.evals}
        total = of_evals.get(0, 0.0)
        clock = {0: total}
        for row in self.updates:
            total += update_seconds(row, self.tokens_per_update) or 0.0
            clock[row["step"]] = total
            total += of_evals.get(row["step"], 0.0)
        return clock, total

    @property
    def tokens_per_update(self) -> float:
        first = self.updates[0] if self.updates else {}
        return (number(first.get("tokens_seen")) or 0.0) / max(1, first.get("step", 1))

    def seconds(self, *, refreshed: bool | None = None) -> list[float]:
        """Of each step; those with (True) or without (False) a refresh, or all (None). Those that warm up or compile are left out."""
        rows = [row for row in self.updates if row["step"] > 1 and "warm_up" not in row and refreshed in (None, bool(row.get("refreshes")))]
        return [s for row in rows if (s := update_seconds(row, self.tokens_per_update))]

    @property
    def refresh_share(self) -> float | None:
        share = RefreshShare()
        for row in self.updates:
            share.add(row)
        return share.value

    @property
    def memory(self) -> dict[str, float]:
        """MB of weights, gradients, optimizer and activations; {} where the run did not measure them."""
        measured = [row["memory_mb"] for row in self.updates if isinstance(row.get("memory_mb"), dict)]
        return {str(key): mb for key, value in (measured[-1] if measured else {}).items() if (mb := number(value)) is not None}

    @property
    def peak_mb(self) -> float | None:
        """Of the device where there is one, else of the process."""
        for key in ("cuda_peak_mb", "peak_rss_mb"):
            _, values = self.series(key)
            if values:
                return max(values)
        return None

    @property
    def overlaps(self) -> dict[str, Points]:
        """Parameter name -> (steps of its refreshes, share of the subspace that each kept)."""
        found: dict[str, Points] = {}
        for row in self.updates:
            for name, value in _dict(row.get("overlap")).items():
                if (share := number(value)) is not None:
                    steps, shares = found.setdefault(str(name), ([], []))
                    steps.append(row["step"])
                    shares.append(share)
        return found

    @property
    def last_loss(self) -> float | None:
        """Training loss at the end, smoothed as the curve is."""
        _, losses = self.series("loss")
        return smooth(losses)[-1] if losses else None


def update_seconds(row: dict[str, Any], tokens: float) -> float | None:
    """Seconds of a step; of runs that did not write them, tokens over tokens/s."""
    speed = number(row.get("tokens_per_s"))
    return number(row.get("seconds")) or (tokens / speed if speed else None)


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in these folders; a comparison's folder counts as the runs in it. UserError names what is none."""
    folders: list[tuple[Path, Path]] = []  # (run, the folder with its config.json and summary.json)
    for path in map(Path, paths):
        if (path / "metrics.jsonl").is_file():
            folders.append((path, path if (path / "config.json").is_file() else path.resolve().parent))
            continue
        inside = sorted(child.parent for child in path.glob("*/metrics.jsonl")) if path.is_dir() else []
        if not inside or not (path / "config.json").is_file():
            what = "does not exist" if not path.exists() else "has no metrics.jsonl" if path.is_dir() else "is a file"
            raise UserError(f"{path} is no run: it {what}; give a folder that galore pretrain wrote, such as runs/pretrain-<date>-<time>")
        folders += [(child, path) for child in inside]
    unique = list({run.resolve(): (run, home) for run, home in folders}.values())
    names = _names([run for run, _ in unique])
    return [_read(run, home, name) for (run, home), name in zip(unique, names, strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _read(folder: Path, home: Path, name: str) -> Run:
    updates: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        row = _dict(_parsed(line))
        step = row.get("step")
        if not isinstance(step, int) or not row.keys() & {"loss", "skipped", "eval_loss"}:
            unreadable += bool(line.strip())
            continue
        (evals if "eval_loss" in row else updates)[step] = row  # a resumed run writes some steps again: the last word counts
    return Run(
        folder,
        name,
        [updates[step] for step in sorted(updates)],
        [evals[step] for step in sorted(evals)],
        unreadable,
        _dict(_json(home / "config.json")),
        _own_record(_json(home / "summary.json"), folder, alone=home.resolve() == folder.resolve()),
    )


def _own_record(records: object, folder: Path, *, alone: bool) -> dict[str, Any]:
    """The record of summary.json that belongs to this folder."""
    found = [_dict(record) for record in records] if isinstance(records, list) else []
    if alone:
        return found[0] if found else {}
    for record in found:
        name = str(record.get("optimizer"))
        if folder.name in (name, name_with_lr(name, number(record.get("lr")) or 0.0)):
            return record
    return {}


def _json(path: Path) -> object:
    return _parsed(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
