"""The pictures of fine-tuning: a task's scores, and the learning rates that were tried. A report has them where some run has the data."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from galore_torch.train.report.chart_style import colour, label_of, legend, look, names, panels, printable, x_axis
from galore_torch.train.report.charts import Chart
from galore_torch.train.report.palette import INK
from galore_torch.train.report.runs import Run


def _scores(runs: Sequence[Run]) -> Figure | None:
    """The task's own score a run in full colour, its others pale; a star at the best."""
    shown = [(index, run, run.scores) for index, run in enumerate(runs) if run.scores]
    if not shown:
        return None
    figure, (axes,) = panels()
    x_axis(axes, "step", runs)
    for index, run, found in shown:
        for order, (steps, values) in enumerate(found.values()):
            axes.plot(steps, values, **look(index), linewidth=1.6 if order == 0 else 0.8, alpha=1.0 if order == 0 else 0.35, marker=".")
        if run.score is not None:
            *_, best, step = run.score
            axes.plot([step], [best], color=colour(index), marker="*", markersize=10, linestyle="")
    named = list(dict.fromkeys(next(iter(found)) for *_, found in shown))
    others = list(dict.fromkeys(name for *_, found in shown for name in list(found)[1:]))
    axes.set_ylabel(", ".join(named) + (f" (pale: {', '.join(others)})" if others else ""))
    star = Line2D([], [], color=INK, marker="*", markersize=8, linestyle="", label="best")
    legend(figure, [*names([(index, run) for index, run, _ in shown]), star])
    return figure


def _rates(runs: Sequence[Run]) -> Figure | None:
    """One line a sweep, a star at its least loss."""
    shown = [(run, found) for run in runs if (found := run.rates_tried)]
    if not shown:
        return None
    figure, (axes,) = panels()
    handles: list[Line2D] = []
    for run, found in shown:
        for of, (rates, losses) in found.items():
            style = look(len(handles))
            axes.plot(rates, losses, **style, linewidth=1.6, marker=".")
            least = losses.index(min(losses))
            axes.plot([rates[least]], [losses[least]], color=style["color"], marker="*", markersize=10, linestyle="")
            label = {"matrices": "matrices: lr x scale", "rest": "the rest: lr", "all": "lr"}.get(of, printable(of))
            handles.append(Line2D([], [], **style, linewidth=2, label=label if len(shown) == 1 else f"{label_of(run, 30)}, {label}"))
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    legend(figure, handles)
    return figure


TASK_CHARTS = (
    Chart(
        "scores",
        "Scores",
        "Of the task, on the examples held out, after each evaluation.",
        _scores,
    ),
    Chart(
        "find-lr",
        "Rates tried",
        "Each dot a run of 30 steps from the same weights on the same batches: the mean loss of its last third. A star: taken.",
        _rates,
    ),
)
