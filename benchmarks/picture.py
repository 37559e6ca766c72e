"""Tables as pictures: horizontal bars of ratios, ours in colour, the line that a claim is about marked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galore_torch.train.report.palette import PALE, PALETTE

ROOM = 2.5  # the axis ends at this multiple of our longest bar; a longer one is cut there and marked with an arrow


@dataclass(frozen=True)
class Panel:
    """Bars under one title. ``claim``: where the line stands; ``unit``: what the axis counts."""

    title: str
    unit: str
    values: Mapping[str, float]
    claim: float = 1.0


def draw(path: str | Path, title: str, panels: Sequence[Panel], ours: Collection[str]) -> None:
    """One panel beside the other, the contenders in the order of the tables, from the top."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    panels = [panel for panel in panels if panel.values]
    if not panels:
        return
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    height = 1.5 + 0.34 * len(names)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 + 4.2 * len(panels), height), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        cut = ROOM * max(panel.claim, *(panel.values[name] for name in panel.values if name in ours), 0.0)
        shown = [min(panel.values.get(name, 0.0), cut) for name in names]
        longest = max(*shown, panel.claim)
        axis.barh(names, shown, height=0.66, color=[PALETTE[0] if name in ours else PALE for name in names], zorder=2)
        for row, (name, value) in enumerate(zip(names, shown, strict=True)):
            label = f"{panel.values[name]:.2f}{' →' * (panel.values[name] > cut)}" if name in panel.values else "–"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the number readable where the line is behind it
            axis.text(value + 0.015 * longest, row, label, va="center", fontsize=9, zorder=3, bbox=box)
        axis.axvline(panel.claim, color=PALETTE[1], linewidth=1.2, linestyle="--", zorder=2.5)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.unit, fontsize=9)
        axis.set_xlim(0, 1.18 * longest)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
