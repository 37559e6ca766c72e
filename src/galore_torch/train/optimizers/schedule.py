"""The learning rate as a share of its peak, a function of the step's number alone. Imports no torch.

Accumulation and per-layer updates do not enter: the number counts steps, not forward passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULERS = ("cosine", "linear", "constant", "wsd", "cosine_restarts")


@dataclass(frozen=True)
class Schedule:
    """One schedule over `steps` steps. Every kind warms up linearly over `warmup` steps, the last of which is at the peak.

    cosine, linear: from the peak to `floor`, which is the share of the last step.
    constant: the peak.
    wsd: the peak, then `floor` at the last of `decay` steps along 1 - sqrt (Hägele et al., arXiv 2405.18392, section 3).
    cosine_restarts: the cosine, multiplied at the start of every `cycle` steps but the first by a warm-up of
        `restart_warmup` steps (the "jagged" cosine of ReLoRA, arXiv 2307.05695, section 3).
    """

    kind: str
    steps: int
    warmup: int
    floor: float
    decay: int = 0
    cycle: int = 0
    restart_warmup: int = 0

    def factor(self, step: int) -> float:
        """Share of the peak at step `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self._after_warmup(step) * self._restart(step)

    def _after_warmup(self, step: int) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            share = 1 - math.sqrt(max(0, step - (self.steps - 1 - self.decay)) / self.decay)
        else:
            progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
            share = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.floor + (1 - self.floor) * share

    def _restart(self, step: int) -> float:
        if self.kind != "cosine_restarts" or step < self.cycle:
            return 1.0
        return min(1.0, (step % self.cycle + 1) / self.restart_warmup)
