"""The one exception that the command line shows as a single line instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the text names the value, the bound and the cure."""


def first_line(error: Exception) -> str:
    """What a foreign exception says, short enough to be part of a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'did you mean X? ' where a known word is near, else ''."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""
