"""The examples run as they stand, for a few steps, and their loss is a number."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDS = {
    "plain_loop": (),
    "hf_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "neural_operator": ("neuralop",),
}
SAYS = {"plain_loop": "step 2: loss ", "hf_trainer": "'train_loss': ", "lightning_module": "loss ", "neural_operator": "relative L2 error "}


def test_every_example_is_here_and_short() -> None:
    found = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert found.keys() == NEEDS.keys()
    assert max(found.values()) <= 60


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    missing = [package for package in NEEDS[name] if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert "nan" not in done.stdout
