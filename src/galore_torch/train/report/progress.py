"""What the user sees while a run lasts: a live bar and figures in a terminal, plain lines elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from galore_torch.train.report.series import RefreshShare

_PLAIN_LINES = 10  # lines of progress a run prints where there is no terminal


class _TwoLines(Progress):
    """The bars, one a run, and under them the figures of the run that lasts: together they do not fit 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.tasks:
            yield Text(self.tasks[-1].fields["figures"])  # a narrow terminal gets a second line of them


class Display:
    """The `Watcher` of a run. As a context it also turns SIGTERM and the first Ctrl-C into a clean stop."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stopped_by: int | None = None  # the signal that asked for the end
        self._training = False  # else what is being built is given up at once
        self._previous: dict[int, Any] = {}
        self._progress = _TwoLines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._share = RefreshShare()

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
        if not self._training:
            self.console.print("[yellow]stopped before the first step[/]")
            raise SystemExit(128 + number)
        if self.stopped_by is None:
            self.stopped_by = number
            self.console.print("[yellow]stopping after this step; Ctrl-C again to drop the run[/]")
        elif number == signal.SIGINT:  # SIGTERM may come again while the checkpoint is written
            raise KeyboardInterrupt

    def begin(self, name: str, total: int, planned_mb: float | None = None) -> None:
        """A new run called `name` of `total` steps, whose memory is to peak at `planned_mb` (None: nobody knows)."""
        self._name, self._planned_mb = name, planned_mb
        self._share, self._training = RefreshShare(), False
        self._task = self._progress.add_task(name, total=total, figures="first step, compiling where that pays")

    def should_stop(self) -> bool:
        self._training = True  # who asks will stop by himself
        return self.stopped_by is not None

    def step(self, row: dict[str, Any], total: int) -> None:
        self._share.add(row)
        figures = _figures(row, self._share.value, self._planned_mb)
        self._progress.update(self._task, completed=row["step"], figures=figures)
        every = max(1, total // _PLAIN_LINES)
        if not self.console.is_terminal and (row["step"] % every == 0 or row["step"] == total):
            self.console.print(f"{self._name} {row['step']}/{total}  {figures}", highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]note:[/] {escape(message)}", highlight=False)

    def evaluated(self, row: dict[str, Any]) -> None:
        if "scores" in row:
            scores = ", ".join(f"{name} [bold]{score:.4f}[/]" for name, score in row["scores"].items())
            self.console.print(f"{self._name} step {row['step']}: {scores}, loss {row['eval_loss']:.4f}", highlight=False)
            return
        legacy = f" (as published: {row['legacy_eval_perplexity']:,.2f})" if "legacy_eval_perplexity" in row else ""
        self.console.print(
            f"{self._name} step {row['step']}: validation perplexity "
            f"[bold]{row['eval_perplexity']:,.2f}[/] over {row['eval_tokens']:,} tokens{legacy}",
            highlight=False,
        )


def _figures(row: dict[str, Any], share: float | None, planned_mb: float | None) -> str:
    """Loss, rate, speed, memory now / at its peak / planned (of the device where there is one), shares of peak speed and refreshes.

    A row without `tokens_per_s` is a step that compiled.
    """
    now, peak = (row["cuda_mb"], row["cuda_peak_mb"]) if "cuda_mb" in row else (row["rss_mb"], row["peak_rss_mb"])
    sizes = (now, peak) if planned_mb is None else (now, peak, planned_mb)
    memory = "/".join(f"{mb / 1e3:.1f}" if peak >= 10_000 else f"{mb:,.0f}" for mb in sizes) + (" GB" if peak >= 10_000 else " MB")
    refresh = "" if share is None else f"  refresh {share:.0%}"
    mfu = f"  mfu {row['mfu']:.0%}" if "mfu" in row else ""
    speed = f"tokens/s {row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else row.get("warm_up", "compiling")
    return f"loss {row['loss']:.3f}  lr {row['lr']:.3g}  {speed}{mfu}  memory {memory}{refresh}"


def show_table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table narrow enough for 80 columns; a name too long for its column is folded, never cut."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, highlight=False)
    console.print(table)


def make_console() -> Console:
    return Console(file=sys.stdout)
