"""docs/frameworks.md says what was run: its tables are those of the results, and the results are of the pinned releases."""

from __future__ import annotations

from pathlib import Path

from integrations import matrix

REQUIREMENTS = {path.stem: path.read_text(encoding="utf-8") for path in (matrix.HERE / "requirements").glob("*.txt")}


def test_tables_are_made_of_the_results() -> None:
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.filled(page, matrix.read()) == page, "the page is older than its results: run make test-integrations"


def test_results_are_of_the_pinned_releases() -> None:
    rows = matrix.read()
    assert rows
    assert {row["environment"] for row in rows} <= REQUIREMENTS.keys()
    for row in rows:
        assert f"=={row['version']}" in REQUIREMENTS[row["environment"]], row
        assert row["result"] in matrix.KINDS


def test_every_requirement_is_pinned_and_has_its_tests() -> None:
    for name, text in REQUIREMENTS.items():
        assert (matrix.HERE / f"test_{name.partition('_')[0]}.py").is_file()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert lines
        assert all("==" in line for line in lines), name


def test_a_result_that_works_has_no_difference_after_a_resume() -> None:
    """But for INT8 weights, whose checkpoint is bf16."""
    apart = {row["feature"] for row in matrix.read() if row["result"] == "works" and row["resume"]}
    assert apart <= {"Q-GaLore trains, saves and loads"}


def test_make_test_does_not_collect_the_integrations() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'norecursedirs = ["integrations"]' in text
