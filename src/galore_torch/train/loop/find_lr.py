"""A short sweep that proposes learning rates: the matrices' (lr x scale, of a low-rank optimizer) and that of everything else.

Every rate is tried by an ordinary run of a few steps, from the same weights on the same batches, so that losses compare pair by pair.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.tasks import TaskData
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from galore_torch.train.optimizers.registry import optimizer_spec, settled_settings

STEPS = 30
_WARMUP = 3
_PLACES = range(-2, 3)  # of the grid ..., 0.1, 0.3, 1, 3, 10, ... of factors on the rate that a sweep begins with
_FURTHER = 3  # more steps of the grid where the best one is at its end


@dataclass(frozen=True)
class Tried:
    """One short run: `loss`, the mean of its last third; infinite where it stopped. `rate`: of what is swept, `of` it."""

    of: str  # "matrices" or "rest", or "all" of an optimizer that has one rate
    rate: float
    lr: float
    scale: float
    loss: float

    def record(self) -> dict[str, Any]:
        """As JSON has it: there an infinite loss is none."""
        return vars(self) | {"loss": self.loss if math.isfinite(self.loss) else None}


def find_lr(config: FinetuneConfig, data: TaskData, say: Callable[[str], None]) -> tuple[FinetuneConfig, list[Tried]]:
    """(`config` at the rates found, what was tried in order).

    Of a low-rank optimizer first the matrices' rate at the lr that is given, then the lr at the matrices' rate that was found.
    """
    ((name, lr),) = config.contenders
    scale = settled_settings(optimizer_spec(name), config.optimizer_settings)["galore_scale"]
    tried: list[Tried] = []

    def sweep(of: str, first: float, settings: Callable[[float], tuple[float, float]]) -> Tried:
        found: dict[int, Tried] = {}

        def attempt(place: int) -> None:
            rate = first * _factor(place)
            own_lr, own_scale = settings(rate)
            found[place] = Tried(of, rate, own_lr, own_scale, short_run(config, name, own_lr, own_scale, data))
            tried.append(found[place])
            say(f"rate of {_WORDS[of]} {rate:.3g}: loss {found[place].loss:.4f} over the last {STEPS // 3} of {STEPS} steps")

        for place in _PLACES:
            attempt(place)
        for _ in range(_FURTHER):
            best = min(found, key=lambda place: (found[place].loss, place))
            if best not in (min(found), max(found)):
                break
            attempt(best - 1 if best == min(found) else best + 1)
        least = min(found.values(), key=lambda one: (one.loss, one.rate))
        if not math.isfinite(least.loss):
            rates = sorted(one.rate for one in found.values())
            raise UserError(
                f"--find_lr: no rate of {_WORDS[of]} from {rates[0]:.3g} to {rates[-1]:.3g} trains {STEPS} steps with finite losses; give "
                "a much smaller --lr to begin with, and look at the model and the examples"
            )
        return least

    if not optimizer_spec(name).low_rank:
        best = sweep("all", lr, lambda rate: (rate, scale))
        return replace(config, lr=best.lr), tried
    matrices = sweep("matrices", lr * scale, lambda rate: (lr, rate / lr)).rate
    best = sweep("rest", lr, lambda rate: (rate, matrices / rate))
    return replace(config, lr=best.lr, galore_scale=best.scale), tried


def short_run(config: FinetuneConfig, name: str, lr: float, scale: float, data: TaskData) -> float:
    """The mean loss of the last third of a run's first steps."""
    short: dict[str, Any] = {
        "num_training_steps": STEPS,
        "scheduler": "constant",
        "warmup_steps": _WARMUP,
        "decay_steps": None,
        "cycle_length": min(max(config.cycle_length or 0, _WARMUP + 1), STEPS - 1) if name == "relora" else None,
        "restart_warmup_steps": None,
        "random_after": None if config.random_after is None else min(config.random_after, STEPS - 1),
        "throwaway": True,
    }
    given = config.given - short.keys() - {"num_train_epochs", "min_lr_ratio"}
    probe = replace(config, **short, lr=lr, galore_scale=scale, given=given)
    with tempfile.TemporaryDirectory(prefix="galore-find-lr-") as folder:
        result, _ = train(probe, name, lr, data, Path(folder), _Nobody())
    return fmean(loss for _, loss in result.losses[-(STEPS // 3) :]) if result.steps == STEPS and result.losses else math.inf


class _Nobody:
    """A watcher that does not look."""

    def step(self, row: dict[str, Any], total: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def warn(self, message: str) -> None: ...
    def should_stop(self) -> bool:
        return False


_WORDS = {"matrices": "the matrices (lr x scale)", "rest": "the rest (lr)", "all": "all (lr)"}


def _factor(place: int) -> float:
    tens, odd = divmod(place, 2)
    return 10.0**tens * (3.0 if odd else 1.0)
