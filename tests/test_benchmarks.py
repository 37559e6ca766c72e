"""The benchmark commands run: each at its smallest size in a process of its own, without any peer that is not torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")
PEERS = ["--peers", "galore-torch", "torch"]


def run(script: str, *arguments: str, folder: Path) -> str:
    """What the command prints. Peers are looked for in an empty folder, and caches stay in the test's."""
    env = {**os.environ, "GALORE_PEERS": str(folder / "peers"), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("step_time/run.py", ["--rounds", "1", "--dtype", "bfloat16"]),
        ("step_time/gap.py", ["--steps", "3", "--gap", "2", "--skip", "1"]),
        ("step_time/memory.py", []),
    ],
)
def test_step_benchmarks_run_and_name_the_peer_that_is_missing(script: str, arguments: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "results.png"
    printed = run(script, "--shapes", "demo", *PEERS, *arguments, "--picture", str(picture), folder=tmp_path)
    assert "| GaLoreAdamW8bit |" in printed
    assert "Without galore-torch 1.0 AdamW: not installed" in printed
    assert picture.exists()


def test_end_to_end_benchmark_runs_in_the_trainers_loop(tmp_path: Path) -> None:
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / name).write_text("Of a gradient, a few directions hold nearly all. " * 60, encoding="utf-8")
    data = ["--data", str(tmp_path / "train.txt"), "--eval_data", str(tmp_path / "held_out.txt")]
    smallest = ["--layers", "1", "--steps", "2", "--block", "1", "--tokens", "128", "--threads", "1", "--grad_clipping", "1"]
    printed = run("end_to_end/run.py", *data, *smallest, folder=tmp_path)
    assert "| galore_adamw |" in printed
    assert "Without galore-torch 1.0 AdamW: not installed" in printed
