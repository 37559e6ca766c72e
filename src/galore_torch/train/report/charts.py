"""The pictures of a report: each a matplotlib figure of any number of runs."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from galore_torch.train.report.chart_style import FEW, LAYERS, colour, label_of, legend, look, names, panels, printable, x_axis
from galore_torch.train.report.palette import INK
from galore_torch.train.report.runs import Run
from galore_torch.train.report.series import smooth, thin

_LEGEND_LAYERS = 8  # at most so many of a deep model are named


@dataclass(frozen=True)
class Chart:
    """`draw` gives None where no run has the data; then `missing` says why."""

    key: str  # of the PNG's file name
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure | None]
    missing: str = "No step was written to metrics.jsonl."


def _loss(x: str) -> Callable[[Sequence[Run]], Figure | None]:
    def draw(runs: Sequence[Run]) -> Figure | None:
        shown = [(i, run) for i, run in enumerate(runs) if run.series("loss", x)[0] or run.held_out(x)[0]]
        if not shown:
            return None
        figure, (axes,) = panels()
        factor = x_axis(axes, x, runs)
        first, highest = [], []
        for index, run in shown:
            xs, ys = run.series("loss", x)
            held_x, held_y = run.held_out(x)
            xs, held_x = [v * factor for v in xs], [v * factor for v in held_x]
            axes.plot(*thin(xs, ys), color=colour(index), alpha=0.25, linewidth=0.8)
            axes.plot(*thin(xs, smooth(ys)), **look(index), linewidth=1.6, marker="." if len(xs) <= FEW else "")
            axes.plot(held_x, held_y, color=colour(index), linestyle="", marker="o", markersize=5, markerfacecolor="none")
            first += [series[0] for series in (ys, held_y) if series]
            highest += [*ys, *held_y]
        if max(highest) > 1.5 * max(first) > 0:  # one that diverged must not flatten the others
            axes.set_ylim(top=1.2 * max(first))
        axes.set_ylabel("loss" if any(run.scores for _, run in shown) else "loss (nats per token)")
        ring = Line2D([], [], color=INK, linestyle="", marker="o", markersize=5, markerfacecolor="none", label="validation")
        legend(figure, [*names(shown), *([ring] if any(run.evals for _, run in shown) else [])])
        return figure

    return draw


def _curves(field: str, unit: str, *, log: bool = False, smoothed: bool = False) -> Callable[[Sequence[Run]], Figure | None]:
    """One field of the steps over their number, one curve a run."""

    def draw(runs: Sequence[Run]) -> Figure | None:
        shown = [(i, run) for i, run in enumerate(runs) if run.series(field)[0]]
        if not shown:
            return None
        figure, (axes,) = panels(height=3.0)
        x_axis(axes, "step", runs)
        seen: list[float] = []
        for index, run in shown:
            xs, ys = run.series(field)
            seen += ys
            marker = "." if len(xs) <= FEW else ""
            if smoothed:
                axes.plot(*thin(xs, ys), color=colour(index), alpha=0.25, linewidth=0.8)
                ys = smooth(ys)
            axes.plot(*thin(xs, ys), **look(index), linewidth=1.6, marker=marker)
        if log and min(seen) > 0 and max(seen) > 10 * min(seen):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
        elif min(seen) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        if max(seen) >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        legend(figure, names(shown))
        return figure

    return draw


def _overlap(runs: Sequence[Run]) -> Figure | None:
    """A dot a refresh; a line a layer, the mean over its matrices in each gap."""
    shown = [(run, found) for run in runs if (found := run.overlaps)]
    if not shown:
        return None
    figure, stack = panels(len(shown), 0.8 + 2.2 * len(shown), sharex=True, sharey=True)
    layers = sorted({layer_of(name) for _, found in shown for name in found})
    for axes, (run, found) in zip(stack, shown, strict=True):
        gaps = [b - a for steps, _ in found.values() for a, b in itertools.pairwise(steps)]
        size, alpha = (8, 0.5) if sum(len(steps) for steps, _ in found.values()) < 500 else (3, 0.25)
        gap = statistics.median(gaps) if gaps else max(steps[-1] for steps, _ in found.values())
        for index, layer in enumerate(layers):
            dots = sorted((s, v) for name, points in found.items() if layer_of(name) == layer for s, v in zip(*points, strict=True))
            bins: dict[int, list[tuple[float, float]]] = {}
            for step, value in dots:
                bins.setdefault(int(step // gap), []).append((step, value))
            means = [tuple(map(statistics.fmean, zip(*part, strict=True))) for part in bins.values()]
            shade = LAYERS(index / max(1, len(layers) - 1))
            axes.scatter([step for step, _ in dots], [value for _, value in dots], color=shade, s=size, alpha=alpha, linewidths=0)
            axes.plot(*zip(*means, strict=True), color=shade, linewidth=1.6, marker="." if len(means) <= FEW else "")
        axes.set(ylim=(0, 1.02), ylabel="overlap")
        axes.set_title(label_of(run), loc="left")
    x_axis(stack[-1], "step", runs)
    every = -(-len(layers) // _LEGEND_LAYERS)
    named = list(enumerate(layers))[::every]
    legend(figure, [Line2D([], [], color=LAYERS(i / max(1, len(layers) - 1)), linewidth=2, label=label) for i, (_, label) in named])
    return figure


def layer_of(name: str) -> tuple[int, str]:
    """(order, label) of the layer that a parameter belongs to: the first number in its name, else the name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (int(found[1]), f"layer {found[1]}") if found else (1 << 30, printable(name))


def _step_times(runs: Sequence[Run]) -> Figure | None:
    """One panel a run: steps without a refresh pale, with one in full colour, on top of each other."""
    shown = [(i, run) for i, run in enumerate(runs) if run.seconds()]
    if not shown:
        return None
    figure, stack = panels(len(shown), 0.9 + (1.6 if len(shown) < 4 else 1.1) * len(shown), sharex=True)
    everything = sorted(s for _, run in shown for s in run.seconds())
    first, last = 0.95 * everything[0], 1.05 * everything[int(0.99 * (len(everything) - 1))]  # the slowest in a hundred leave the picture
    unit, factor = ("ms", 1e3) if last < 2 else ("s", 1.0)
    for axes, (index, run) in zip(stack, shown, strict=True):
        kinds = [("without a refresh", run.seconds(refreshed=False), 0.4), ("with a refresh", run.seconds(refreshed=True), 1.0)]
        kinds = [kind for kind in kinds if kind[1]] if run.series("refreshes")[0] else [("steps", run.seconds(), 0.4)]
        labels = [f"{label}: {len(part)}, median {statistics.median(part) * factor:.3g} {unit}" for label, part, _ in kinds]
        shades = [to_rgba(colour(index), alpha) for _, _, alpha in kinds]
        times = [[s * factor for s in part] for _, part, _ in kinds]
        axes.hist(times, bins=40, range=(first * factor, last * factor), stacked=True, color=shades, label=labels)
        beyond = sum(s > last for s in run.seconds())
        title = f"{label_of(run, 36)} ({beyond} slower than {last * factor:.3g} {unit})" if beyond else label_of(run)
        axes.set_title(title, loc="left")
        axes.set(ylabel="steps", ylim=(0, 1.6 * axes.get_ylim()[1]))  # room for the legend above the bars
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.legend(loc="upper right")
    stack[-1].set_xlabel(f"time of one step ({unit}), the first left out")
    return figure


def _memory(runs: Sequence[Run]) -> Figure | None:
    """One bar a run: weights, gradients, optimizer, activations side by side."""
    shown = [run for run in runs if run.memory]
    if not shown:
        return None
    figure, (axes,) = panels(height=1.0 + 0.6 * len(shown))
    widest = max(sum(run.memory.values()) for run in shown)
    unit, factor = _megabytes(widest)
    parts = list(dict.fromkeys(part for run in shown for part in run.memory))
    for row, run in enumerate(shown):
        left = 0.0
        for index, part in enumerate(parts):
            width = run.memory.get(part, 0.0)
            axes.barh(row, width * factor, left=left * factor, color=colour(index), height=0.5)
            if width > 0.08 * widest:
                middle = (left + width / 2) * factor
                axes.text(middle, row, f"{width * factor:.3g}", ha="center", va="center", fontsize=8, color="#ffffff")
            left += width
        axes.text(left * factor, row, f" {left * factor:.3g} {unit}", ha="left", va="center", fontsize=8)
        axes.text(0, row - 0.3, label_of(run), ha="left", va="bottom", fontsize=8.5)
    axes.set_yticks([])
    axes.set(xlabel=f"memory ({unit})", xlim=(0, widest * factor * 1.15), ylim=(len(shown) - 0.6, -0.8))
    legend(figure, [Patch(color=colour(index), label=part) for index, part in enumerate(parts)])
    return figure


def _megabytes(largest: float) -> tuple[str, float]:
    """Unit, and factor on MB."""
    return ("GB", 1e-3) if largest >= 10_000 else ("MB", 1.0)


def _held(runs: Sequence[Run]) -> Figure | None:
    """Memory as the system, or the device's allocator, counts it: now a line, its peak dashed."""
    found = []
    for index, run in enumerate(runs):
        prefix, suffix = ("cuda_", "mb") if run.series("cuda_mb")[0] else ("", "rss_mb")
        now, peak = run.series(f"{prefix}{suffix}"), run.series(f"{prefix}peak_{suffix}")
        if now[0]:
            found.append((index, run, now, peak))
    if not found:
        return None
    figure, (axes,) = panels(height=3.0)
    x_axis(axes, "step", runs)
    highest = max(value for *_, now, peak in found for value in (*now[1], *peak[1]))
    unit, factor = _megabytes(highest)
    for index, _, now, peak in found:
        now, peak = ((xs, [y * factor for y in ys]) for xs, ys in (now, peak))
        marker = "." if len(now[0]) <= FEW else ""
        axes.plot(*thin(*now), color=colour(index), linewidth=1.6, marker=marker)
        axes.plot(*thin(*peak), color=colour(index), linewidth=1.0, linestyle="--", marker=marker)
    axes.set(ylim=(0, 1.1 * highest * factor or 1), ylabel=f"memory ({unit})")
    dashed = Line2D([], [], color=INK, linewidth=1.0, linestyle="--", label="peak so far")
    now_lines = [Line2D([], [], color=colour(index), linewidth=2, label=label_of(run)) for index, run, *_ in found]
    legend(figure, [*now_lines, dashed])
    return figure


_BOLD = "Bold: smoothed; faint: every step; rings: validation."
CHARTS = (
    Chart("loss-steps", "Loss over steps", _BOLD, _loss("step")),
    Chart("loss-tokens", "Loss over tokens", _BOLD, _loss("tokens_seen")),
    Chart("loss-time", "Loss over time", _BOLD + " Loading is left out.", _loss("wall")),
    Chart("lr", "Learning rate", "Peak rate times warm-up and schedule.", _curves("lr", "learning rate")),
    Chart(
        "grad-norm",
        "Gradient norm",
        "2-norm of all gradients before clipping; of the projected ones where gradients are projected in the backward pass.",
        _curves("grad_norm", "gradient norm", log=True, smoothed=True),
        "Not recorded: updates inside the backward pass consume each gradient before a norm can be taken.",
    ),
    Chart("speed", "Speed", "Training tokens a second, evaluation left out.", _curves("tokens_per_s", "tokens/s", smoothed=True)),
    Chart(
        "overlap",
        "Subspace overlap",
        "Share of its old subspace that a matrix kept at a refresh: 1 is the same subspace. A dot a refresh, a line a layer.",
        _overlap,
        "Not recorded: train a low-rank optimizer with --track_subspace, past its first gap.",
    ),
    Chart(
        "step-time",
        "Time of a step",
        "Steps that refreshed a basis are in full colour, the others pale.",
        _step_times,
        "Not recorded: it takes at least two steps.",
    ),
    Chart(
        "memory",
        "Memory by purpose",
        "Measured in the first step: weights, gradients held together, optimizer state, and activations kept for the backward pass.",
        _memory,
        "Not recorded by these runs.",
    ),
    Chart("memory-held", "Memory held", "The device's allocator where there is one, else the whole process.", _held),
)
