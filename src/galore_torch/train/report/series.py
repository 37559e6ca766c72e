"""Arithmetic on series of metrics: smoothing, thinning, and the share of time that refreshes take. Plain Python, draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_SMOOTHING = 0.8  # of the bold curves
_POINTS = 800  # more than this on one curve is beyond what a screen shows
_LEAST_UPDATES = 10  # before a share is told


def number(value: object) -> float | None:
    """A finite number, or None for anything else that a metrics file may hold."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def reading(value: object, how: str = ",.2f") -> str:
    """A number for people; a dash for no reading, and for one that is not finite."""
    found = number(value)
    return "-" if found is None else format(found, how)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean with the start's bias taken out."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def thin(xs: Sequence[float], ys: Sequence[float], points: int = _POINTS) -> tuple[list[float], list[float]]:
    """At most `points` points: means of neighbours; the last point stays where it is."""
    width = -(-len(xs) // points)
    if width <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs) - 1, width)
    parts = [(xs[i : min(i + width, len(xs) - 1)], ys[i : min(i + width, len(ys) - 1)]) for i in starts]
    return [*(sum(x) / len(x) for x, _ in parts), xs[-1]], [*(sum(y) / len(y) for _, y in parts), ys[-1]]


class RefreshShare:
    """Share of the training time spent on refreshes, estimated from outside the optimizer.

    Least squares of a step's seconds on its number of refreshes: the slope is what one refresh costs. The optimizer's own
    seconds are used where they are known (with per-layer updates they hide in the backward pass). The first step, which makes
    every basis and warms everything up, counts in the totals and not in the slope.
    """

    def __init__(self) -> None:
        self.refreshes = 0.0
        self._seconds = 0.0
        self._n = 0
        self._x = self._y = self._xx = self._xy = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """One step's row of metrics; a row without `refreshes` (no low-rank optimizer) says nothing."""
        x, seconds = number(row.get("refreshes")), number(row.get("seconds"))
        if x is None or seconds is None:
            return
        y = number(row.get("optimizer_s")) or seconds
        self.refreshes += x
        self._seconds += seconds
        if row["step"] > 1:
            self._n += 1
            self._x, self._y = self._x + x, self._y + y
            self._xx, self._xy = self._xx + x * x, self._xy + x * y

    @property
    def value(self) -> float | None:
        """Between 0 and 1; None where too little was seen to tell."""
        spread = self._n * self._xx - self._x * self._x
        if self._n < _LEAST_UPDATES or spread <= 0 or not self._seconds:
            return None
        slope = (self._n * self._xy - self._x * self._y) / spread
        return min(1.0, max(0.0, slope * self.refreshes / self._seconds))
