"""`galore report`: one self-contained HTML file of any number of runs, and each picture as a PNG beside it.

The file asks the network for nothing and runs no script; its first lines forbid both to whatever a run's name or config holds.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from galore_torch.train.errors import UserError
from galore_torch.train.loop.result import perplexity
from galore_torch.train.report.chart_style import house_style, printable
from galore_torch.train.report.charts import CHARTS, Chart
from galore_torch.train.report.palette import DARK, INK, PALETTE
from galore_torch.train.report.runs import Run, read_runs
from galore_torch.train.report.series import reading
from galore_torch.train.report.task_charts import TASK_CHARTS

_LOSSES = 3  # charts in the first row
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
)


def write_report(paths: Sequence[str], output: str | None = None) -> list[Path]:
    """Write the report of the runs in `paths`; returns the HTML file and the PNGs. UserError: nothing was written."""
    runs = read_runs(paths)
    page = Path(output) if output else (Path(paths[0]) if len(paths) == 1 else Path()) / "report.html"
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {page} is no HTML file; give a name that ends in .html")
    written, cards = [page], []
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with house_style():
            for chart in (*CHARTS[:_LOSSES], *TASK_CHARTS, *CHARTS[_LOSSES:]):
                figure = chart.draw(runs)
                if figure is None and chart in TASK_CHARTS:
                    continue
                cards.append((chart, None if figure is None else _svg(figure, chart)))
                if figure is not None:
                    written.append(page.with_name(f"{page.stem}-{chart.key}.png"))
                    figure.suptitle(chart.title)  # on the page it is the heading above the picture
                    figure.savefig(written[-1], facecolor="white")
        page.write_text(_document(runs, cards), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {page} cannot be written: {error.strerror}; name another file with -o") from error
    return written


def _document(runs: Sequence[Run], cards: Sequence[tuple[Chart, str | None]]) -> str:
    configs = _configs(runs)
    return _TEMPLATES.get_template("report.html.j2").render(
        title="galore report: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        ink=INK,
        light=PALETTE,
        dark=DARK,
        runs=runs,
        header=_header(runs),
        summary=[{"colour": index % len(PALETTE), "cells": _summary(run, runs)} for index, run in enumerate(runs)],
        cards=cards,
        losses=_LOSSES,
        config_names=[names for names, _ in configs],
        differences=_differences([config for _, config in configs]),
        overlaps=_overlaps(runs),
        configs=[(names, json.dumps(config, indent=2).splitlines()) for names, config in configs],
    )


def _svg(figure: Figure, chart: Chart) -> str:
    """The figure as an inline element: ids of its own, the page's ink and palette in place of the fixed ones."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{chart.key}-", text)
    # Only inside style attributes: a run may be named after a colour.
    text = re.sub(r'(?<= style=")[^"]*', lambda style: _themed(style[0]), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)


def _themed(style: str) -> str:
    style = style.replace(INK, "currentColor")
    for index, value in enumerate(PALETTE):
        style = style.replace(value, f"var(--c{index})")
    return style


def _header(runs: Sequence[Run]) -> list[str]:
    """Of the final table: scores where some run has them, and perplexity where some run has none."""
    names = list(dict.fromkeys(next(iter(run.scores)) for run in runs if run.scores))
    scores = [f"{' or '.join(names)}: last", "best"] if names else []
    measures = ["perplexity"] if any(not run.scores for run in runs) else []
    first = ["run", "optimizer", "status", "steps", "tokens", "training loss", "validation loss"]
    return [*first, *measures, *scores, "tokens/s", "time", "refresh share", "state MB", "peak MB"]


def _summary(run: Run, runs: Sequence[Run]) -> list[str]:
    """One row of the final table."""
    steps, tokens = run.series("tokens_seen")
    spent = sum(run.seconds())
    speed = run.tokens_per_update * len(run.seconds()) / spent if spent else None
    step, held_out = run.result or (None, None)
    late = f" at {step}" if step and step != run.last_step else ""  # trained on since
    measures = []
    if any(not other.scores for other in runs):
        measures.append("-" if run.scores else reading(None if held_out is None else perplexity(held_out)) + late)
    if any(other.scores for other in runs):
        measures += ["-", "-"] if run.score is None else [f"{run.score[1]:.4f}", f"{run.score[3]:.4f} at {run.score[4]}"]
    state = run.memory.get("optimizer", run.summary.get("optimizer_state_mb"))
    return [
        run.name,
        run.optimizer,
        run.status,
        f"{steps[-1]:,.0f}" if steps else "0",
        f"{tokens[-1]:,.0f}" if tokens else "0",
        reading(run.last_loss, ".4f"),
        reading(held_out, ".4f"),
        *measures,
        reading(speed, ",.0f"),
        _duration(run.wall),
        reading(run.refresh_share, ".1%"),
        reading(state),
        reading(run.peak_mb, ",.0f"),
    ]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.1f} s" if seconds < 120 else f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def _configs(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    """(names of the runs that share it, config) of each: the runs of a comparison have one."""
    shared: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for run in runs:
        if run.config:
            shared.setdefault(json.dumps(run.config), ([], run.config))[0].append(run.name)
    return [(", ".join(names), config) for names, config in shared.values()]


def _differences(configs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The settings in which several configs differ; a dash where one does not have it."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in ("save_dir", "resolved"))
    rows = [[key, *(json.dumps(config[key]) if key in config else "-" for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _overlaps(runs: Sequence[Run]) -> list[list[str]]:
    """Overlap of every matrix, which the page folds away: a deep model has hundreds."""
    return [
        [run.name, name, str(len(shares)), f"{shares[0]:.3f}", f"{sum(shares) / len(shares):.3f}", f"{shares[-1]:.3f}"]
        for run in runs
        for name, (_, shares) in run.overlaps.items()
    ]
