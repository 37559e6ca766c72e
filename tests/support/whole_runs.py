"""Runs of `galore pretrain` for tests: start one, read what it wrote, compare two."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.optimizers.registry import unused_flags
from support.forked import Forked

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


def words(config: PretrainConfig) -> list[str]:
    """The flags of a config that `make_config` made."""
    names = ("model_config", "device", "optimizer", "max_length", "batch_size", "num_training_steps", "eval_every", "update_proj_gap")
    names = (*names, "save_dir", "total_batch_size", "grad_clipping", "save_every", "seed", "eval_tokens", "gradients", "nproc")
    names = (*names, "parallel", "dtype", "loss_chunk", "keep", "resume")
    names = tuple(name for name in names if name not in unused_flags(config.contenders[0][0], names))
    found = [part for name in names if (value := getattr(config, name)) is not None for part in (f"--{name}", str(value))]
    switches = [
        f"--{name}" for name in ("pad_documents", "stream", "activation_checkpointing", "legacy_eval", "compile") if getattr(config, name)
    ]
    return ["pretrain", *found, *switches, "--data", *config.data]


def assert_close_runs(one: Path, other: Path) -> None:
    """Equal but for the order in which float32 gradients are added: 1e-6 of the largest, times Adam's quotient, over few steps."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert {key: mine[key] for key in ("step", "tokens_seen")} == {key: theirs[key] for key in ("step", "tokens_seen")}
        for key in ("loss", "eval_loss", "lr", "grad_norm", "eval_tokens"):
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=2e-5), (mine["step"], key)
    weights = load_file(one / "model" / "model.safetensors")
    for key, value in load_file(other / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


def killed_rank(forked: Forked, config: PretrainConfig, killed: int) -> str:
    """Start a run in two processes and kill -9 one after some steps: what the other one said, which has to be that it lost it."""
    assert config.save_dir is not None
    ids = forked.together(2, words(config))
    metrics = Path(config.save_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 7) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(ids[killed], signal.SIGKILL)
    codes, said = forked.wait()
    other = said[1 - killed]
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1, said
    assert "Traceback" not in other
    assert "another process of this run is gone" in other
    return other
