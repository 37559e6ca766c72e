"""How a setting is declared: with its default, its line in the help and its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any

PUBLISHED = "accepted from the published script"


def setting(default: Any, group: str, help: str, **more: Any) -> Any:
    """A setting: its default, its group and line in the help, and its bounds (as `bounds.check_number` takes them) or `choices`.

    ``also``: further names of its flag.
    """
    return field(default=default, metadata={"group": group, "help": help, **more})


def refused(default: Any, cure: str) -> Any:
    """A flag of the published script that asks for what is not done here; ``cure``: how it is done instead."""
    return field(default=default, metadata={"group": PUBLISHED, "help": f"refused: {cure}", "refused": cure})


def published(why: str) -> Any:
    """A flag that has nothing to set here: it is accepted, and a note says why."""
    return field(default=None, metadata={"group": PUBLISHED, "help": f"no effect: {why}", "note": why})
