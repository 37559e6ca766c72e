"""The tables of docs/frameworks.md, made from results.jsonl. `make test-integrations` writes both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
PAGE = HERE.parents[1] / "docs" / "frameworks.md"
KINDS = ("works", "refused", "ignored", "wrong", "not installable")  # every result, in the order of the columns
Row = dict[str, Any]


def read() -> list[Row]:
    """One row a feature: environment, framework, version, torch, feature, result, note, resume, loss, adamw."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def support(rows: list[Row]) -> Iterator[str]:
    """A line for each release of a framework: its features by what came of them."""
    yield "| framework | works | refused, with the reason | ignored without a word | wrong |"
    yield "|---|---|---|---|---|"
    for title, own in _by_title(rows).items():
        if all(row["result"] == "not installable" for row in own):
            yield f"| **{title}** | not installable: {own[0]['note']} | | | |"
            continue
        cells = ["; ".join(_feature(row) for row in own if row["result"] == kind) for kind in KINDS[:-1]]
        yield f"| **{title}** | {' | '.join(cells)} |"
    for name in sorted(path.stem for path in (HERE / "requirements").glob("*.txt")):
        if name not in {row["environment"] for row in rows}:
            yield f"| **{name}** | its tests are written, and have not been run whole | | | |"


def numbers(rows: list[Row]) -> Iterator[str]:
    """A line for each row that has a number. Releases of one framework stand side by side."""
    yield "| framework | feature | resume | loss | AdamW's |"
    yield "|---|---|---|---|---|"
    for title, own in _by_title(rows).items():
        for row in own:
            if row["resume"] is not None or row["loss"] is not None:
                losses = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("loss", "adamw")]
                resume = "" if row["resume"] is None else f"{row['resume']:.1g}"
                yield f"| {title} | {row['feature']} | {resume} | {' | '.join(losses)} |"


def _by_title(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["framework"].lower(), row["version"], row["feature"].strip("`").lower())):
        found.setdefault(f"{row['framework']} {row['version']}", []).append(row)
    return found


def _feature(row: Row) -> str:
    return row["feature"] + (f" ({row['note']})" if row["note"] else "")


TABLES = {"support": support, "numbers": numbers}


def filled(page: str, rows: list[Row]) -> str:
    """The page with what stands between `<!-- results: NAME -->` and `<!-- end -->` made anew."""
    for name, table in TABLES.items():
        before, mark, rest = page.partition(f"<!-- results: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        if not end:
            raise ValueError(f"the page has no place for the table {name!r}: write <!-- results: {name} --> and <!-- end --> into it")
        page = "".join((before, mark, "\n", *(f"{line}\n" for line in table(rows)), "\n", end, after))
    return page


def write_page() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
