"""Bounds of numbers and choices among names, as settings and flags declare them, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from galore_torch.train.errors import UserError, did_you_mean

BOUNDS = frozenset({"at_least", "above", "at_most", "below"})


def check_number(name: str, value: float | None, **bounds: float) -> None:
    """Refuse a --`name` outside of its bounds: at_least, above, at_most, below. None is not given, and passes."""
    if value is not None and not (math.isfinite(value) and _holds(value, **bounds)):
        raise UserError(f"--{name} {value} is out of bounds: give a number {_said(**bounds)}")


def check_choice(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Refuse a --`name` that is none of `choices`. None is not given, and passes."""
    if value is not None and value not in choices:
        raise UserError(f"--{name} {value!r} is not known; {did_you_mean(value, choices)}choose one of: {', '.join(choices)}")


def _holds(value: float, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf, below: float = math.inf) -> bool:
    return at_least <= value <= at_most and above < value < below


def _said(**bounds: Any) -> str:
    if bounds.keys() == {"at_least", "at_most"}:
        most = "2**63 - 1" if bounds["at_most"] == 2**63 - 1 else bounds["at_most"]
        return f"between {bounds['at_least']} and {most}"
    words = {"at_least": "at least", "above": "greater than", "at_most": "at most", "below": "below"}
    return " and ".join(f"{words[kind]} {bound}" for kind, bound in bounds.items())
