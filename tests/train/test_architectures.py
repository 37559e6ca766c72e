"""Every command with every architecture: it works, or it is refused in one line with exit code 2. docs/architectures.md is its table.

Oracles: the exit code and what is said; resumed and exported weights are bit for bit those that the run ended with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.architectures import ARCHITECTURES, OPTIMIZERS, make_model, try_steps

pytest.importorskip("peft", reason="lora needs the extra peft")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("architectures")}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_step_works_or_is_refused_in_one_line(name: str, optimizer: str, models: dict[str, Path], tmp_path: Path) -> None:
    if name not in models:
        models[name] = make_model(name, models[""] / name)
    outcomes = try_steps(models[name], optimizer, tmp_path)
    assert not {step: outcome for step, outcome in outcomes.items() if not outcome.is_right}


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_two_of_them_each_time(name: str, tmp_path: Path) -> None:
    """Conv1D and a tied head, experts that are no linear layers: what most often breaks, at every commit."""
    outcomes = try_steps(make_model(name, tmp_path / "model"), "galore_adamw", tmp_path / "runs")
    assert {step: outcome.status for step, outcome in outcomes.items()} == dict.fromkeys(outcomes, "works")
