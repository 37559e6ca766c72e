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

from matplotlib.figure import Figure

from galore_torch.train.errors import UserError
from galore_torch.train.loop.result import perplexity
from galore_torch.train.report.chart_style import INK, PALETTE, colour, house_style, printable
from galore_torch.train.report.charts import CHARTS, Chart
from galore_torch.train.report.runs import Run, read_runs

_DARK = ("#4aa3df", "#ff8a4c", "#2fc79b", "#e39bc4", "#f2b636", "#8ccff5", "#a8a8a8")  # the palette on a dark page
_LOSSES = 3  # charts in the first row
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --faint: #5b6570; --line: #d8dee4; --card: #f6f8fa; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --ink: #e6e9ed; --faint: #9aa4af; --line: #303842; --card: #171c23; DARK }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 88rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.05rem; margin: 0 } p { margin: .25rem 0 } .faint { color: var(--faint) }
.losses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin: 1rem 0 }
.more { columns: 26rem; column-gap: 1rem } .more figure { break-inside: avoid; margin-bottom: 1rem }
figure { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0 }
figure svg { display: block; width: 100%; height: auto; color: var(--ink) }
figcaption { color: var(--faint); font-size: .85rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); font-size: .9rem }
td { white-space: nowrap } th, td { text-align: right; vertical-align: top }
th { font-weight: 600; color: var(--faint); vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
td:first-child, td:nth-child(3) { white-space: normal; overflow-wrap: break-word; min-width: 6rem; max-width: 24rem }
td:first-child { min-width: 13rem }
.settings { margin: 1.5rem 0 }
.settings td { white-space: normal } .settings th, .settings td { min-width: 7rem; max-width: 24rem; overflow-wrap: anywhere }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; font-size: .85rem }
summary { cursor: pointer; margin: .5rem 0 } @media print { figure { break-inside: avoid } }
"""


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
            for chart in CHARTS:
                figure = chart.draw(runs)
                cards.append(_card(chart, figure))
                if figure is not None:
                    written.append(page.with_name(f"{page.stem}-{chart.key}.png"))
                    figure.suptitle(chart.title)  # on the page it is the heading above the picture
                    figure.savefig(written[-1], facecolor="white")
        page.write_text(_document(runs, cards), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {page} cannot be written: {error.strerror}; name another file with -o") from error
    return written


def _document(runs: Sequence[Run], cards: Sequence[str]) -> str:
    title = "galore report: " + (_text(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs")
    light, dark = ("; ".join(f"--c{i}: {value}" for i, value in enumerate(colours)) for colours in (PALETTE, _DARK))
    broken = [f"{_text(run.name)}: {run.unreadable} of the lines in metrics.jsonl could not be read" for run in runs if run.unreadable]
    body = [
        f"<h1>{title}</h1>",
        _table(_HEADER, [_summary(index, run) for index, run in enumerate(runs)]),
        *(f'<p class="faint">{line}</p>' for line in broken),
        f'<div class="losses">{"".join(cards[:_LOSSES])}</div>',
        f'<div class="more">{"".join(cards[_LOSSES:])}</div>',
        _differences(runs),
        _overlaps(runs),
        _settings(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE.replace('LIGHT', light).replace('DARK', dark)}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _card(chart: Chart, figure: Figure | None) -> str:
    picture = f"<p>{_text(chart.missing)}</p>" if figure is None else _svg(figure, chart)
    caption = "" if figure is None else f"<figcaption>{_text(chart.caption)}</figcaption>"
    return f'<figure id="{chart.key}"><h2>{_text(chart.title)}</h2>{picture}{caption}</figure>\n'


def _svg(figure: Figure, chart: Chart) -> str:
    """The figure as an inline element: ids of its own, the page's ink and palette in place of the fixed ones."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{chart.key}-", text)
    # Only inside style attributes: a run may be named after a colour.
    text = re.sub(r'(?<= style=")[^"]*', lambda style: _themed(style[0]), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{_text(chart.title)}"', 1)


def _themed(style: str) -> str:
    style = style.replace(INK, "currentColor")
    for index, value in enumerate(PALETTE):
        style = style.replace(value, f"var(--c{index})")
    return style


_HEADER = (
    *("run", "optimizer", "status", "updates", "tokens", "training loss", "held-out loss", "perplexity", "tokens/s"),
    *("time", "refresh share", "state MB", "peak MB"),
)


def _summary(index: int, run: Run) -> list[str]:
    """One row of the final table, as HTML."""
    _, held_out = run.held_out()
    steps, tokens = run.series("tokens_seen")
    spent = sum(run.seconds())
    speed = run.tokens_per_update * len(run.seconds()) / spent if spent else None
    share = run.refresh_share
    state = run.memory.get("optimizer", run.summary.get("optimizer_state_mb"))
    return [
        f'<span class="swatch" style="background: var(--c{PALETTE.index(colour(index))})"></span>{_text(run.name)}',
        _text(run.optimizer),
        _text(run.status),
        f"{steps[-1]:,.0f}" if steps else "0",
        f"{tokens[-1]:,.0f}" if tokens else "0",
        _figures(run.last_loss, ".4f"),
        _figures(held_out[-1] if held_out else None, ".4f"),
        _figures(perplexity(held_out[-1]) if held_out else None, ",.2f"),
        _figures(speed, ",.0f"),
        _duration(run.wall),
        "-" if share is None else f"{share:.1%}",
        _figures(state, ",.2f"),
        _figures(run.peak_mb, ",.0f"),
    ]


def _figures(value: Any, how: str) -> str:
    return format(value, how) if isinstance(value, (int, float)) else "-"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.1f} s" if seconds < 120 else f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows are HTML, the header is text."""
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _configs(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    """(names of the runs that share it, config) of each: the runs of a comparison have one."""
    shared: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for run in runs:
        if run.config:
            shared.setdefault(json.dumps(run.config), ([], run.config))[0].append(run.name)
    return [(", ".join(names), config) for names, config in shared.values()]


def _differences(runs: Sequence[Run]) -> str:
    """The settings in which several configs differ; a dash where one does not have it."""
    names, configs = zip(*_configs(runs) or [("", {})], strict=True)
    keys = dict.fromkeys(key for config in configs for key in config if key not in ("save_dir", "resolved"))
    rows = [(key, [json.dumps(config[key]) if key in config else "-" for config in configs]) for key in keys]
    different = [[_text(key), *map(_text, values)] for key, values in rows if len(set(values)) > 1]
    table = _table(["", *names], different)
    return f'<div class="settings"><h2>Settings that differ</h2>{table}</div>' if different else ""


def _overlaps(runs: Sequence[Run]) -> str:
    """Overlap of every matrix, folded away: a deep model has hundreds."""
    rows = [
        [_text(run.name), _text(name), str(len(shares)), f"{shares[0]:.3f}", f"{sum(shares) / len(shares):.3f}", f"{shares[-1]:.3f}"]
        for run in runs
        for name, (_, shares) in run.overlaps.items()
    ]
    table = _table(["run", "matrix", "refreshes", "first overlap", "mean", "last"], rows)
    return f"<details><summary>Subspace overlap of every matrix</summary>{table}</details>" if rows else ""


def _settings(runs: Sequence[Run]) -> str:
    """Every config whole, folded away."""
    folded = [
        f"<details><summary>Settings of {_text(names)}</summary><pre>"
        + "\n".join(map(_text, json.dumps(config, indent=2).splitlines()))
        + "</pre></details>"
        for names, config in _configs(runs)
    ]
    return "\n".join(folded)
