"""Bytes as people write them: GB is 10**9, GiB is 2**30, and a card's "24 GB" is its own number (see cards.py)."""

from __future__ import annotations

import re

from galore_torch.train.errors import UserError

GB, GIB = 10**9, 2**30
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": GB, "g": GB, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": GIB, "tib": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "22.5 GiB" or "800MB"; G alone is GB."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"--memory {text!r} is no amount of memory: give a number and a unit, such as 24GB (10**9) or 24GiB (2**30)")
    number = round(float(match[1]) * _UNITS[match[2]])
    if number <= 0:
        raise UserError(f"--memory {text} must be above 0, such as 24GB")
    return number


def gb(number: int) -> str:
    """In GB with a precision that shows a tenth of a percent of what a plan is about."""
    return f"{number / GB:.2f}" if abs(number) >= GB else f"{number / GB:.4f}"
