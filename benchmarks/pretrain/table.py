"""What the contest prints: the measured table, the paper's beside it, and the picture of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contest import METHODS, Task
from paper import CONVENTIONS, SIZES, TABLE_2
from report import cell, count, table

from galore_torch.train.report.palette import PALETTE

MB = 1e6
FULL = "adamw"


@dataclass
class Score:
    """A method's tuned learning rates with those tried, and its result for each seed."""

    method: str
    lr: float
    tried: Sequence[float]
    rest_lr: float
    rest_tried: Sequence[float]
    results: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def perplexities(self) -> list[float]:
        return [math.exp(result["loss"]) for result in self.results.values()]

    def mean(self, key: str) -> float:
        return statistics.mean(result[key] for result in self.results.values())

    @property
    def state_mb(self) -> float:
        (state,) = {sum(result["state"].values()) for result in self.results.values()}  # a seed changes no size
        return state / MB

    @property
    def weights_mb(self) -> float:
        return self.mean("weights") / MB


def ratios(score: Score, base: Score | None) -> list[float]:
    """Perplexity over that of full rank, seed by seed."""
    return [] if base is None else [mine / full for mine, full in zip(score.perplexities, base.perplexities, strict=True)]


def report(task: Task, scores: Sequence[Score]) -> str:
    """The whole of results.md."""
    return "\n".join([_heading(task, scores), _measured(scores), "", _tuned(scores), "", CONVENTIONS, _published(), ""])


def _heading(task: Task, scores: Sequence[Score]) -> str:
    results = [result for score in scores for result in score.results.values()]
    when, machines = max(result["date"] for result in results), sorted({result["machine"] for result in results})
    matrices, total = parameters(task)
    model = f"LLaMA of width {task.hidden}, {count(task.layers, 'layer')}, vocabulary {task.vocab}, {task.dtype}, "
    model += f"{total / 1e6:.2f} million parameters, {matrices / total:.0%} of them in the matrices of attention and MLP"
    tokens = f"{task.steps} updates of {task.batch} x {task.length} tokens ({task.steps * task.batch * task.length / 1e6:.2f} million)"
    tokens += f"; warm-up over a tenth, cosine to {task.floor:.0%}"
    low_rank = f"rank {task.rank}, gap {task.gap}, scale {task.scale:g}; ReLoRA merges every {task.cycle} updates"
    seeds = f"seeds {', '.join(map(str, scores[0].results))}"
    return f"# Pre-training at equal tokens\n\n{when}, {'; '.join(machines)}; {model}; {tokens}; {low_rank}; {seeds}\n"


def parameters(task: Task) -> tuple[int, int]:
    """(in the matrices, in all)"""
    layer = 4 * task.hidden**2 + 3 * task.hidden * task.inner
    norms_and_ends = (2 * task.layers + 1) * task.hidden + 2 * task.vocab * task.hidden
    return layer * task.layers, layer * task.layers + norms_and_ends


def _measured(scores: Sequence[Score]) -> str:
    header = ["method", "held-out perplexity, mean", "± s.d.", "each seed", "of full rank", "least, most", "nats"]
    header += ["lr of the matrices", "optimizer state MB", "weights MB", "peak resident MB", "of it before training"]
    on_cuda = any("cuda_peak_mb" in result for score in scores for result in score.results.values())
    header += ["peak CUDA MB"] * on_cuda
    base = next((score for score in scores if score.method == FULL), None)
    rows = []
    for score in scores:
        values, over = score.perplexities, ratios(score, base)
        rows.append(
            [
                METHODS[score.method].label,
                cell(statistics.mean(values)),
                cell(statistics.stdev(values) if len(values) > 1 else None),
                ", ".join(map(cell, values)),
                cell(statistics.mean(over) if over else None, 3),
                f"{cell(min(over), 3)}, {cell(max(over), 3)}" if over else "–",
                cell(score.mean("loss"), 3),
                f"{score.lr:g}" if score.method != "frozen" else "–",
                cell(score.state_mb),
                cell(score.weights_mb),
                cell(score.mean("peak_rss_mb"), 0),
                cell(score.mean("start_mb"), 0),
                *([cell(score.mean("cuda_peak_mb"), 0)] if on_cuda else []),
            ]
        )
    return table(header, rows)


def _tuned(scores: Sequence[Score]) -> str:
    def values(tried: Sequence[float]) -> str:
        return ", ".join(f"{value:g}" for value in tried) or "given, not tuned"

    first = scores[0]
    lines = [f"Learning rate of embeddings, head and norms in every row: {first.rest_lr:g} (tried: {values(first.rest_tried)})."]
    lines += [
        f"- {METHODS[score.method].label}: {score.lr:g} for the matrices (tried: {values(score.tried)})"
        for score in scores
        if score.method != "frozen"
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _published() -> str:
    rows = []
    for method, columns in TABLE_2.items():
        over = (perplexity / full for (perplexity, _), (full, _) in zip(columns, TABLE_2[FULL], strict=True))
        cells = [f"{perplexity:.2f} ({ratio:.3f}), {gb:.2f}" for (perplexity, gb), ratio in zip(columns, over, strict=True)]
        rows.append([METHODS[method].label, *cells])
    return table(["method", *SIZES], rows)


def picture(path: Path, scores: Sequence[Score]) -> None:
    """Each seed's perplexity and the mean; beside it the memory of weights and optimizer state."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    names = [METHODS[score.method].label for score in scores]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.42 * len(names)), sharey=True)
    for row, score in enumerate(scores):
        colour = PALETTE[0] if "galore" in score.method else "#606060"
        values = score.perplexities
        left.scatter(values, [row] * len(values), s=22, color=colour, alpha=0.55, linewidths=0, zorder=3)
        left.scatter([statistics.mean(values)], [row], marker="|", s=260, linewidths=2, color=colour, zorder=4)
        left.annotate(
            f"{statistics.mean(values):.2f}", (max(values), row), (8, 0), textcoords="offset points", va="center", fontsize=9, zorder=5
        )
        if score.method == FULL:
            left.axvline(statistics.mean(values), color=PALETTE[1], linewidth=1.2, linestyle="--", zorder=2)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("held-out perplexity: each seed, and their mean; dashed: full rank's mean", fontsize=9)
    left.margins(x=0.12)
    weights, states = [score.weights_mb for score in scores], [score.state_mb for score in scores]
    right.barh(names, weights, height=0.62, color="#C8C8C8", label="weights", zorder=2)
    right.barh(names, states, left=weights, height=0.62, color="#56B4E9", label="optimizer state", zorder=2)
    for row, (weight, state) in enumerate(zip(weights, states, strict=True)):
        right.text(weight + state, row, f" {weight + state:.2f}", va="center", fontsize=9)
    right.set_xlabel("MB held (bytes of storages)", fontsize=9)
    right.margins(x=0.14)
    right.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#EEEEEE", zorder=0)
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
