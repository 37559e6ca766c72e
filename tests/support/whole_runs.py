"""Runs of `galore pretrain` for tests: start one, read what it wrote, compare two."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig

# What differs between two equal runs: a clock, the system's memory, and sizes that each process measures once.
CLOCK = {"tokens_per_s", "tflops", "mfu", "seconds", "optimizer_s", "data_s", "rss_mb", "peak_rss_mb", "memory_mb", "warm_up"}


class Silent:
    """A watcher that does not look."""

    def step(self, row: dict[str, Any], total: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def warn(self, message: str) -> None: ...
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


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    weights = load_file(one / "model" / "model.safetensors")
    assert all(torch.equal(weights.pop(key), value) for key, value in load_file(other / "model" / "model.safetensors").items())
    assert not weights
