"""The table and the picture of `run.py`: by windows of 2,000 steps, each line's gap to AdamW, its norms and its bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from report import cell, table

from galore_torch.train.report.palette import PALETTE

WINDOW = 2_000
BASE = "adamw"
Rows = Sequence[Mapping[str, Any]]
Curves = dict[str, dict[int, Mapping[str, Any]]]  # line -> step -> what was found there


def curves(names: Sequence[str], rows: Rows) -> Curves:
    """A run that was taken up again may have written a step twice, with the same numbers."""
    found: Curves = {name: {row["step"]: row for row in rows if row["line"] == name} for name in names}
    return {name: line for name, line in found.items() if line}


def gap(line: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], first: int, last: int) -> float | None:
    """Mean over the looks in (first, last] of the held-out loss less that of the base, in nats a token."""
    steps = [step for step in line if first < step <= last and step in base]
    return mean(line[step]["held_out"] - base[step]["held_out"] for step in steps) if steps else None


def report(labels: Mapping[str, str], rows: Rows) -> str:
    lines = curves(list(labels), rows)
    end = max(step for line in lines.values() for step in line)
    header = ["steps", *(f"{labels[name]}: {what}" for name in lines for what in (("loss",) if name == BASE else ("loss", "gap")))]
    body = []
    for last in range(WINDOW, end + 1, WINDOW):
        cells = [f"{last - WINDOW:,} to {last:,}"]
        for name, line in lines.items():
            losses = [row["held_out"] for step, row in line.items() if last - WINDOW < step <= last]
            cells.append(cell(mean(losses), 4) if losses else cell(None))
            if name != BASE:
                found = gap(line, lines.get(BASE, {}), last - WINDOW, last)
                cells.append("–" if found is None else f"{found:+.4f}")
        body.append(cells)
    ends = []
    for name, line in lines.items():
        steps = sorted(line)
        last_row, kept = line[steps[-1]], [row["kept"] for row in line.values() if row["kept"] is not None]
        ends.append(
            [
                labels[name],
                f"{last_row['held_out']:.4f}",
                *(f"{line[step]['norm_matrices']:.2f}" for step in (steps[0], steps[len(steps) // 2], steps[-1])),
                f"{max(row['orthogonality'] for row in line.values()):.1e}" if kept else "–",
                f"{sum(row['refreshes'] for row in line.values()):,}" if kept else "–",
                f"{mean(kept):.3f}, {min(kept):.3f}" if kept else "–",
                f"{last_row['seconds'] / 60:.0f}",
            ]
        )
    second = [
        "line",
        "last held-out loss",
        "norm of the matrices: first look",
        "half way",
        "end",
        "largest element of QᵀQ - I, of all looks",
        "refreshes",
        "share of the momentum carried: mean, least mean of a look",
        "minutes",
    ]
    return f"{table(header, body)}\n\n{table(second, ends)}\n"


PANELS = {
    "held_out": "held-out loss, nats a token",
    "gap": "held-out loss less AdamW's",
    "norm_matrices": "norm of the matrices",
    "orthogonality": "largest element of QᵀQ - I",
}


def picture(path: Path, labels: Mapping[str, str], rows: Rows) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    lines = curves(list(labels), rows)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (field, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (name, line) in enumerate(lines.items()):
            steps = sorted(line)
            if field == "gap":
                steps = [step for step in steps if name != BASE and step in lines.get(BASE, {})]
                values = [line[step]["held_out"] - lines[BASE][step]["held_out"] for step in steps]
            else:
                values = [line[step][field] for step in steps if field != "orthogonality" or line[step][field]]
            if values:
                axis.plot(steps, values, color=PALETTE[number], linewidth=1.2, label=labels[name])
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][1].axhline(0, color=PALETTE[-1], linewidth=0.8)
    axes[0][1].axvline(WINDOW, color=PALETTE[-1], linewidth=0.8, linestyle="--")
    axes[1][1].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
