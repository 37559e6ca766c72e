"""Who looks on while a run lasts: a display, trackers, tests."""

from __future__ import annotations

from typing import Any, Protocol


class Watcher(Protocol):
    """Told of every step and evaluation by its row of metrics.jsonl, asked whether to stop."""

    def step(self, row: dict[str, Any], total: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def should_stop(self) -> bool: ...
    def warn(self, message: str) -> None: ...
