"""Plans side by side as stacked bars, in a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from galore_torch.train.errors import UserError
from galore_torch.train.plan.answer import Plan
from galore_torch.train.plan.show import PARTS, parts
from galore_torch.train.plan.units import GB, gb
from galore_torch.train.report.chart_style import INK, colour, house_style

_HATCHED: dict[str, dict[str, Any]] = {
    "gathered": {"color": colour(PARTS.index("weights")), "edgecolor": "white", "hatch": "...."},  # weights, whole for a while
    "reserve": {"color": "none", "edgecolor": INK, "hatch": "////"},
}


def draw_bars(path: Path, title: str, rows: Sequence[tuple[str, Plan]], budget: int | None) -> None:
    """One bar a plan, the reserve on top, and a line at the budget."""
    with house_style():
        figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(rows)), dpi=150, layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        left = [0.0] * len(rows)
        stacks = [(name, [parts(plan)[name] / GB for _, plan in rows]) for name in PARTS]
        stacks.append(("reserve", [plan.reserve / GB for _, plan in rows]))
        for index, (name, values) in enumerate(stacks):
            if not any(values):
                continue
            look = _HATCHED.get(name) or {"color": colour(index)}
            axes.barh(places, values, left=left, height=0.7, label=name, linewidth=0, **look)
            left = [so_far + value for so_far, value in zip(left, values, strict=True)]
        label = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the line at the budget
        for place, end in zip(places, left, strict=True):
            axes.annotate(f"{end:.1f}", (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=label)
        if budget is not None:
            axes.axvline(budget / GB, color=INK, linestyle="--", linewidth=1)
            axes.annotate(f"{gb(budget)} GB", (budget / GB, 0), xytext=(3, 14), textcoords="offset points", fontsize=8.5)
        axes.set_yticks(list(places), [name for name, _ in rows])
        axes.set(xlabel="GB (10⁹ bytes) at the peak", title=title)
        axes.margins(x=0.08)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=4)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {path} cannot be written: {error}") from error
