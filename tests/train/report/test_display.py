"""What a run shows: in a terminal of 80 columns nothing is cut off, elsewhere plain lines without control codes."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from galore_torch.train.report.progress import Display

TOTAL = 30


def row(step: int, **more: Any) -> dict[str, Any]:
    """A step of 1 s, and 0.5 s more at every second step, which refreshes."""
    refreshes = step % 2
    speed = {"tokens_per_s": 123_456.0, "seconds": 1 + 0.5 * refreshes, "refreshes": refreshes}
    return {"step": step, "loss": 3.14159, "lr": 1e-3, "rss_mb": 8123.4, "peak_rss_mb": 9876.5} | speed | more


def shown(*, terminal: bool, planned_mb: float | None = 9500.0, **more: Any) -> list[str]:
    """Every line that was printed, without control codes."""
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with Display(console) as display:
        display.begin("galore_adamw8bit", TOTAL, planned_mb)
        for step in range(1, TOTAL + 1):
            display.step(row(step, **more), TOTAL)
        display.warn("brackets [red] are text")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert terminal or "\x1b" not in text
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", text).replace("\r", "\n").splitlines()


def test_terminal_of_80_columns_shows_everything() -> None:
    """Bar, count, ETA; loss, lr, speed, memory now, at its peak and planned, refresh share: (0.5 s x 15) of 37.5 s."""
    text = " ".join(" ".join(shown(terminal=True)).split())
    assert "loss 3.142 lr 0.001 tokens/s 123,456 memory 8,123/9,876/9,500 MB refresh 20%" in text
    for part in ("galore_adamw8bit", "30/30", "ETA", "━━━━"):
        assert part in text
    assert "…" not in text


def test_plain_lines_elsewhere() -> None:
    lines = [line for line in shown(terminal=False) if "loss" in line]
    assert len(lines) == 10
    assert lines[-1] == "galore_adamw8bit 30/30  loss 3.142  lr 0.001  tokens/s 123,456  memory 8,123/9,876/9,500 MB  refresh 20%"


def test_memory_that_nobody_planned_is_left_out() -> None:
    assert any("memory 8,123/9,876 MB  " in line for line in shown(terminal=False, planned_mb=None))


@pytest.mark.parametrize(
    ("more", "figure"),
    [
        ({"cuda_mb": 20_100.0, "cuda_peak_mb": 30_200.0}, "tokens/s 123,456  memory 20.1/30.2/9.5 GB  refresh"),
        ({"rss_mb": 12_345.0, "peak_rss_mb": 23_456.0}, "tokens/s 123,456  memory 12.3/23.5/9.5 GB  refresh"),
    ],
)
def test_memory_is_the_devices_where_there_is_one(more: dict[str, float], figure: str) -> None:
    assert figure in shown(terminal=False, **more)[-2]


def test_an_update_that_compiles_has_no_speed() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Display(console) as display:
        display.begin("galore_adamw", 1)
        display.step({key: value for key, value in row(1).items() if key != "tokens_per_s"}, 1)
    assert "lr 0.001  compiling  memory 8,123/9,876 MB" in console.file.getvalue()  # type: ignore[attr-defined]


def test_no_refreshes_no_share() -> None:
    assert not any("refresh" in line for line in shown(terminal=False, refreshes=0))


def test_a_note_is_text() -> None:
    assert "note: brackets [red] are text" in shown(terminal=False)
