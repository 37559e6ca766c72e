"""How every picture of a report looks: ink, palette, type, axes and legends.

Ink and palette are fixed colours that `html` can replace by the page's own, light or dark.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from galore_torch.train.report.palette import DEPTH, INK, PALETTE
from galore_torch.train.report.runs import Run
from galore_torch.train.report.series import number

_STYLES = ("-", "--", ":", "-.")  # past the palette's end
LAYERS = LinearSegmentedColormap.from_list("layers", DEPTH)
_WIDTH = 4.2  # inches: on a screen of 390 px its letters are 11 px high
FEW = 2  # points that make no line: they get markers
_RC = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and escaped by the writer
    "text.parse_math": False,  # a run may be called "$x$"
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "hatch.color"), INK),
}


@contextmanager
def house_style() -> Iterator[None]:
    """Around drawing and saving. A letter that the font lacks is drawn as a box in a PNG: no reason to warn."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def look(index: int) -> dict[str, Any]:
    return {"color": colour(index), "linestyle": _STYLES[index // len(PALETTE) % len(_STYLES)]}


def printable(text: str) -> str:
    """Without control characters and halves of surrogates, which no document can hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def label_of(run: Run, letters: int = 48) -> str:
    """The run's name in at most so many letters, its middle left out."""
    name = printable(run.name)
    name = f"{name[: letters - 18]}…{name[-17:]}" if len(name) > letters else name
    return " " + name if name.startswith("_") else name  # matplotlib hides labels that begin with an underscore


def panels(rows: int = 1, height: float = 3.2, **share: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), dpi=190, layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, **share)[:, 0])


def legend(figure: Figure, handles: list[Any]) -> None:
    """Below the axes: inside, one curve or another would run through it."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 62 // (longest + 8)))
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def names(runs: Sequence[tuple[int, Run]]) -> list[Any]:
    return [Line2D([], [], **look(index), linewidth=2, label=label_of(run)) for index, run in runs]


def x_axis(axes: Axes, x: str, runs: Sequence[Run]) -> float:
    """Label the x axis, from 0 to the end of the longest run; returns the factor on x."""
    if x == "wall":
        longest = max(run.wall for run in runs)
        unit, factor = ("s", 1.0) if longest < 600 else ("min", 1 / 60) if longest < 7200 else ("h", 1 / 3600)
        axes.set(xlabel=f"time of steps and evaluations ({unit})", xlim=_span(longest * factor))
        return factor
    rows = [row for run in runs for row in (*run.updates, *run.evals)]
    axes.set_xlim(_span(max((number(row.get(x)) or 0 for row in rows), default=0)))
    if x == "tokens_seen":
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return 1.0


def _span(end: float) -> tuple[float, float]:
    """From 0 to `end`, with room for the marks at both."""
    end = end or 1
    return -0.02 * end, 1.02 * end
