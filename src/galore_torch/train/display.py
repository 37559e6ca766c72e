"""What the user sees while a run lasts: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_LINES = 10  # lines of progress a run prints where there is no terminal


class Display:
    """The `Watcher` of a run. As a context it also turns SIGTERM and the first Ctrl-C into a clean stop."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stopped_by: int | None = None  # the signal that asked for the end
        self._previous: dict[int, Any] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Display:
        # Only the main thread may handle signals; elsewhere Ctrl-C keeps its usual meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
                    self._previous[number] = signal.signal(number, self._stop)
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is None:
            self.stopped_by = number
            self.console.print("[yellow]stopping after this update; Ctrl-C again to drop the run[/]")
        elif number == signal.SIGINT:  # SIGTERM may come again while the checkpoint is written
            raise KeyboardInterrupt

    def begin(self, name: str, total: int) -> None:
        """A new run called `name` of `total` updates."""
        self._name = name
        self._task = self._progress.add_task(name, total=total, figures="")

    def should_stop(self) -> bool:
        return self.stopped_by is not None

    def step(self, row: dict[str, Any], total: int) -> None:
        figures = f"loss {row['loss']:.3f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tok/s  {row['rss_mb']:,.0f} MB"
        self._progress.update(self._task, completed=row["step"], figures=figures)
        every = max(1, total // _PLAIN_LINES)
        if not self.console.is_terminal and (row["step"] % every == 0 or row["step"] == total):
            self.console.print(f"{self._name} {row['step']}/{total}  {figures}", highlight=False)

    def evaluated(self, row: dict[str, Any]) -> None:
        self.console.print(
            f"{self._name} update {row['step']}: held-out perplexity "
            f"[bold]{row['eval_perplexity']:,.2f}[/] over {row['eval_tokens']:,} tokens",
            highlight=False,
        )


def show_table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table narrow enough for 80 columns; a name too long for its column is folded, never cut."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, highlight=False)
    console.print(table)


def make_console() -> Console:
    return Console(file=sys.stdout)
