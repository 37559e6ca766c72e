"""The table and the picture of the frontier, from the lines that `run.py` and `cost.py` have written.

    python benchmarks/frontier/table.py

A method is in the table once its rate is tuned and all seeds have run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pretrain"))
from cost import COSTS
from methods import METHODS
from paired_runs import paired
from report import cell, table
from run import IN_BF16, RESULTS, TASKS
from tuning import TUNING_SEED

from galore_torch.train.report.palette import INK, PALETTE

HERE = Path(__file__).resolve().parent
BASE = "adamw"
SEEDS = 6


@dataclass(frozen=True)
class Score:
    """`losses`: seed -> held-out nats at the tuned rate `lr`. `tried`: rate -> nats of the seed that is not reported."""

    name: str
    bytes: float
    lr: float
    losses: dict[int, float]
    tried: dict[float, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses.values())


def read(lines: Iterable[str], task: str) -> list[Score]:
    """Those with enough seeds, of one task, from the fewest bytes on."""
    settings = {**asdict(TASKS[task]), "device": "cpu"}
    rows = [row for row in map(json.loads, lines) if row["task"] == settings]
    scores = []
    for name in METHODS:
        mine = [row for row in rows if row["variant"] == name]
        tried = {row["lr"]: row["result"]["loss"] for row in mine if row["seed"] == TUNING_SEED}
        reported = [row for row in mine if row["seed"] != TUNING_SEED]
        if len({row["lr"] for row in reported}) > 1:
            raise SystemExit(f"{name} has reported seeds at several rates: remove the lines of all but one")
        if len(reported) >= SEEDS:
            losses = {row["seed"]: row["result"]["loss"] for row in reported}
            scores.append(Score(name, reported[0]["result"]["bytes"], reported[0]["lr"], losses, tried))
    return sorted(scores, key=lambda score: score.bytes)


def frontier(scores: list[Score]) -> set[str]:
    """The names that no method of fewer or as many bytes has a lower mean loss than."""
    best, names = float("inf"), set()
    for score in sorted(scores, key=lambda score: (score.bytes, score.mean)):
        if score.mean < best:
            best = score.mean
            names.add(score.name)
    return names


def difference(score: Score, base: Score) -> str:
    """The mean of the pairs and its 95 % interval."""
    seeds = sorted(score.losses.keys() & base.losses.keys())
    if score.name == base.name or len(seeds) < 2:
        return "–"
    mean, _, _, half = paired([score.losses[seed] for seed in seeds], [base.losses[seed] for seed in seeds])
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def measured(scores: list[Score], costs: Mapping[str, Any]) -> str:
    base = next(score for score in scores if score.name == BASE)
    best = frontier(scores)
    header = ["", "method", "state, bytes an element", "loss, nats", "± s.d.", "less AdamW's, 95 % interval"]
    header += ["step, of fused AdamW's, at width 512; 1024", "slowest, of its median", "all memory, bytes an element", "lr (tried)"]
    rows = []
    for number, score in enumerate(scores, 1):
        cost, label = costs.get(score.name, {}), METHODS[score.name].label
        rows.append(
            [
                str(number),
                f"**{label}**" if score.name in best else label,
                cell(score.bytes),
                cell(score.mean, 3),
                cell(statistics.stdev(score.losses.values()), 3),
                difference(score, base),
                each_width(cost, "of_adamw"),
                each_width(cost, "slowest"),
                cell(cost.get("all_in"), 1) + (f", {cost['mode']}" if "mode" in cost else ""),
                f"{score.lr:g} ({', '.join(f'{lr:g}' for lr in sorted(score.tried))})",
            ]
        )
    return table(header, rows)


def each_width(cost: Mapping[str, Any], key: str) -> str:
    return "; ".join(cell(row[key]) for row in cost.get("steps", {}).values()) or cell(None)


def picture(path: Path, scores: list[Score], costs: Mapping[str, Any]) -> None:
    """Loss against bytes of state, and against the time of a step where that was measured, by the numbers of the table; those on the
    frontier are joined, and named.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    timed = [score for score in scores if costs.get(score.name, {}).get("steps")]
    panels = 2 if timed else 1
    figure, every = plt.subplots(1, panels, figsize=(7.5 * panels, 7.5), sharey=True, squeeze=False)
    axes = every[0]
    costs_of = (scores, lambda score: score.bytes), (timed, lambda score: costs[score.name]["steps"]["1024"]["of_adamw"])
    best, numbers = frontier(scores), {score.name: str(number) for number, score in enumerate(scores, 1)}
    for axis, (some, at) in zip(axes, costs_of, strict=False):
        for score in some:
            method = METHODS[score.name]
            colour = PALETTE[0] if method.ours else PALETTE[1]
            axis.errorbar(
                [at(score)],
                [score.mean],
                yerr=[statistics.stdev(score.losses.values()) / len(score.losses) ** 0.5],
                fmt="o",
                color=colour,
                markersize=5,
                linewidth=1,
            )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#EEEEEE", zorder=0)
    line = [score for score in scores if score.name in best]
    axes[0].plot(
        [score.bytes for score in line], [score.mean for score in line], color=PALETTE[2], linewidth=1, zorder=1, drawstyle="steps-post"
    )
    axes[0].set_xscale("symlog", linthresh=0.25)
    axes[0].set_xlim(right=14)  # room for AdamW's name
    axes[0].set_xticks([0, 0.25, 0.5, 1, 2, 4, 8], ["0", "¼", "½", "1", "2", "4", "8"])
    axes[0].set_xlabel("optimizer state of the matrices, bytes an element; green: the frontier", fontsize=9)
    axes[0].set_ylabel("held-out loss, nats a token: mean and standard error", fontsize=9)
    if timed:
        axes[1].set_xscale("log")
        axes[1].set_xlabel("time of a step, of fused AdamW's (one thread, width 1024)", fontsize=9)
    figure.suptitle("Loss against cost: blue this package, orange others", fontsize=11)
    figure.tight_layout()
    for axis, (some, at) in zip(axes, costs_of, strict=False):  # now that the scales are what they are
        texts = {score.name: numbers[score.name] for score in some}
        texts |= {score.name: f"{numbers[score.name]} {METHODS[score.name].label}" for score in some if score.name in {*best, BASE}}
        name_points(axis, [(at(score), score.mean, texts[score.name]) for score in some])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def name_points(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Each text beside its point (x, y), at the first of some places where it covers neither a point nor another text."""
    pixel, height = axis.figure.dpi / 72, 9  # pixels a point; points of a line of text
    spots = [axis.transData.transform((x, y)) / pixel for x, y, _ in points]
    taken = [(left - 3, bottom - 4, left + 3) for left, bottom in spots]  # left, bottom and right of what is there, in points
    for (x, y, text), (left, bottom) in zip(points, spots, strict=True):
        width = 4.6 * len(text)
        places = [(dx, dy) for dx in (5, -5 - width) for dy in (4, -11)]
        free = (
            (dx, dy)
            for dx, dy in places
            if not any(left + dx < r and left + dx + width > l and abs(bottom + dy - b) < height for l, b, r in taken)
        )
        dx, dy = next(free, places[0])
        taken.append((left + dx, bottom + dy, left + dx + width))
        axis.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=8, color=INK)


def report(task: str, scores: list[Score], costs: Mapping[str, Any]) -> str:
    given, bf16 = TASKS[task], ", products in bf16" if task in IN_BF16 else ""
    settings = (
        f"LLaMA of width {given.hidden}, {given.layers} layers, vocabulary {given.vocab}; {given.steps} updates of {given.batch} x "
        f"{given.length} tokens{bf16}; warm-up over a tenth, cosine to {given.floor:.0%}; n/4 is rank {given.rank}, gap {given.gap}; seeds "
        f"{', '.join(map(str, sorted(scores[0].losses)))}, rates tuned on seed {TUNING_SEED}"
    )
    return f"{settings}\n\n{measured(scores, costs)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="small")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--costs", type=Path, default=COSTS)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the picture")
    arguments = parser.parse_args()
    costs = json.loads(arguments.costs.read_text(encoding="utf-8")) if arguments.costs.exists() else {}
    scores = read(arguments.results.read_text(encoding="utf-8").splitlines(), arguments.task)
    if not any(score.name == BASE for score in scores):
        raise SystemExit(f"{arguments.results} has not {SEEDS} seeds of {BASE} yet: run.py --task {arguments.task} makes them")
    picture(arguments.out / f"{arguments.task}.png", scores, costs)
    print(report(arguments.task, scores, costs))


if __name__ == "__main__":
    main()
