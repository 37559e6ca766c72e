"""What one run measured, and its way into a checkpoint and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

_TIMED = ("timed_tokens", "timed_seconds")
_COUNTERS = ("steps", "tokens_seen", "seconds", "state_bytes", "peak_memory_mb", "skipped", "skipped_in_a_row")


@dataclass
class RunResult:
    """What one run measured. Sizes in bytes, times in seconds, losses in nats per token."""

    optimizer: str
    lr: float
    parameters: int = 0
    state_bytes: int = 0
    adamw_state_bytes: int = 0
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0  # of steps alone, without evaluation
    timed_tokens: int = 0  # of the steps that tell a speed: not the first after a start, nor any that compiles
    timed_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    skipped: int = 0  # steps left out because the loss or the gradient was not finite
    skipped_in_a_row: int = 0  # the last ones
    status: str = "finished"  # or "interrupted", or why it stopped
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, training loss)
    evals: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (step, scores), where a task has some
    values: list[tuple[int, float]] = field(default_factory=list)  # (step, how good the model is), where a task keeps the best

    @property
    def tokens_per_s(self) -> float:
        """Of the steps that neither warm up nor compile; of all where there were no others."""
        tokens, seconds = (self.timed_tokens, self.timed_seconds) if self.timed_seconds else (self.tokens_seen, self.seconds)
        return tokens / seconds if seconds else 0.0

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best evaluation after a step, the first of equals; None where nothing says which that is."""
        return max((pair for pair in self.values if pair[0]), key=lambda pair: pair[1], default=None)

    def record(self) -> dict[str, Any]:
        """What a checkpoint has of this: the counters, and the best-known figures. The curves are in its metrics."""
        return {counter: getattr(self, counter) for counter in (*_COUNTERS, *_TIMED)} | {
            "last_loss": self.losses[-1] if self.losses else None,
            "values": self.values,
            "last_eval": self.evals[-1] if self.evals else None,
            "best_eval": min(self.evals, key=lambda pair: pair[1], default=None),
        }

    def go_on(self, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Become what this was when the checkpoint with `record` and the metrics `rows` was written."""
        for counter in _COUNTERS:
            setattr(self, counter, record[counter])
        for counter in _TIMED:
            setattr(self, counter, record.get(counter, 0))  # younger than some checkpoints
        self.losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        self.evals = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        self.scores = [(row["step"], row["scores"]) for row in rows if "scores" in row]
        self.values = [(step, value) for step, value in record.get("values", [])]


def perplexity(mean_loss: float) -> float:
    """exp of a loss in nats per token; infinity where that overflows."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
