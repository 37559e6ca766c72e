"""What a benchmark prints: a line that dates it, a table in markdown, and progress beside it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import date

from small_llama import machine


def heading(settings: object, device: str = "cpu") -> str:
    """The date, the machine in words, and what was measured."""
    return f"{date.today()}, {machine(device)}; {settings}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def count(number: int, noun: str) -> str:
    """'1 layer', '2 layers'."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def ratios(values: Mapping[str, float], base: str) -> dict[str, float]:
    """Each value over that of ``base``; empty where the base was not measured."""
    return {name: value / values[base] for name, value in values.items()} if base in values else {}


def cell(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def progress(text: str) -> None:
    """One line on stderr that the next call overwrites; an empty text ends it."""
    print(f"\r\033[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)
