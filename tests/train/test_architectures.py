"""Every command with every architecture: it works, or it is refused in one line with exit code 2. docs/architectures.md is its table.

Oracles: the exit code and what is said; resumed and exported weights are bit for bit those that the run ended with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.architectures import ARCHITECTURES, OPTIMIZERS, STEPS, make_model, try_steps

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


def test_a_hybrid_with_experts_works_throughout(tmp_path: Path) -> None:
    """One of them at every commit: attention, Mamba and expert weights in one model, renamed on their way to a file."""
    outcomes = try_steps(make_model("jamba", tmp_path / "model"), "galore_adamw", tmp_path / "runs")
    assert {step: outcome.status for step, outcome in outcomes.items()} == dict.fromkeys(STEPS, "works")


def test_the_page_names_each_of_them() -> None:
    """docs/architectures.md is made by benchmarks/architectures/run.py from the same outcomes, and holds none that fails."""
    page = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
    if not page.is_file():
        pytest.skip("a source distribution has no docs")
    head, _, *rows = [line.strip("| ").split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert head == ["architecture", *OPTIMIZERS]
    assert {row[0] for row in rows} == set(ARCHITECTURES)
    assert not [row for row in rows if len(row) != len(head) or "FAILS" in "".join(row)]
