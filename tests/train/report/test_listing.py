"""`galore ls` on folders written by hand: what is listed is what metrics.jsonl says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from galore_torch import cli
from galore_torch.train.errors import UserError
from galore_torch.train.report.listing import list_runs


def write_run(folder: Path, updates: int, *evals: tuple[int, float]) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 2.0} for step in range(1, updates + 1)]
    rows += [{"step": step, "eval_loss": math.log(perplexity)} for step, perplexity in evals]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {"optimizers": [{"optimizer": "galore_adamw", "lr": 0.01}]}
    (folder / "config.json").write_text(json.dumps({"num_training_steps": 10, "resolved": made}))


def test_each_run_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The perplexity before training is no result of a run that was interrupted before its next evaluation."""
    write_run(tmp_path / "runs" / "whole", 10, (0, 300.0), (10, 42.5))
    write_run(tmp_path / "runs" / "cut", 4, (0, 300.0))
    assert cli.main(["ls", str(tmp_path / "runs")]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "optimizer", "status", "steps", "perplexity"]
    found = {line.split()[0]: line.split()[1:] for line in lines}
    assert found[str(tmp_path / "runs" / "whole")] == ["galore_adamw", "finished", "10", "42.50", "at", "10"]
    assert found[str(tmp_path / "runs" / "cut")] == ["galore_adamw", "not", "finished", "4", "-"]


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        list_runs(str(tmp_path))
    with pytest.raises(UserError, match="does not exist; give a folder with runs: galore ls FOLDER"):
        list_runs(str(tmp_path / "nowhere"))
