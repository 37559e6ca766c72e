"""Schedules against closed formulas, written here in other words."""

from __future__ import annotations

import math

import pytest

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.optimizers.schedule import SCHEDULERS, Schedule

STEPS, WARMUP, FLOOR = 40, 5, 0.1


def factors(kind: str, **more: int) -> list[float]:
    schedule = Schedule(kind, STEPS, WARMUP, FLOOR, **more)
    return [schedule.factor(step) for step in range(STEPS)]


def cosine(step: int) -> float:
    """The half cosine from 1 at the first step after warm-up to the floor at the last."""
    return FLOOR + (1 - FLOOR) * math.cos(math.pi / 2 * (step - WARMUP) / (STEPS - 1 - WARMUP)) ** 2


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_warm_up_is_linear_and_its_last_update_is_at_the_peak(kind: str) -> None:
    assert factors(kind, decay=8, cycle=10, restart_warmup=3)[:WARMUP] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_cosine() -> None:
    assert factors("cosine")[WARMUP:] == pytest.approx([cosine(step) for step in range(WARMUP, STEPS)])


def test_linear() -> None:
    fall = (1 - FLOOR) / (STEPS - 1 - WARMUP)
    assert factors("linear")[WARMUP:] == pytest.approx([1 - fall * k for k in range(STEPS - WARMUP)])


def test_constant() -> None:
    assert set(factors("constant")[WARMUP:]) == {1.0}


def test_wsd_is_flat_and_then_falls_along_one_minus_the_root() -> None:
    found = factors("wsd", decay=8)
    assert set(found[WARMUP : STEPS - 8]) == {1.0}
    assert found[STEPS - 8 :] == pytest.approx([1 - (1 - FLOOR) * (k / 8) ** 0.5 for k in range(1, 9)])
    assert found[-1] == pytest.approx(FLOOR)


def test_restarts_multiply_one_cosine_by_a_short_warm_up() -> None:
    found = factors("cosine_restarts", cycle=10, restart_warmup=3)
    for step in range(WARMUP, STEPS):
        rise = {0: 1 / 3, 1: 2 / 3}.get(step % 10, 1.0) if step >= 10 else 1.0
        assert found[step] == pytest.approx(rise * cosine(step)), step


def test_factor_depends_on_the_update_alone() -> None:
    """Accumulation and per-layer updates leave the schedule as it is: the published script stepped it with every micro-batch."""
    plain = PretrainConfig(num_training_steps=30, batch_size=4)
    other = PretrainConfig(num_training_steps=30, batch_size=1, total_batch_size=32, optimizer="galore_adamw8bit_per_layer")
    assert [plain.lr_factor(step) for step in range(30)] == [other.lr_factor(step, other.optimizer) for step in range(30)]
    peaks = [step for step in range(30) if other.lr_factor(step) == 1.0]
    assert peaks == [2, 3], "one cycle: the last step of warm-up and the first after it"


def test_only_relora_turns_the_cosine_into_restarts() -> None:
    config = PretrainConfig(num_training_steps=40, warmup_steps=4, cycle_length=10, compare=("adamw", "relora"))
    assert config.schedule("adamw").kind == "cosine"
    assert config.schedule("relora").kind == "cosine_restarts"
    assert config.lr_factor(10, "relora") == config.lr_factor(10, "adamw")  # a tenth of ten: warm again at once
    constant = PretrainConfig(num_training_steps=40, scheduler="constant", cycle_length=10, optimizer="relora")
    assert constant.schedule("relora").kind == "constant"


def test_defaults_of_decay_and_restart() -> None:
    assert PretrainConfig(num_training_steps=100, scheduler="wsd").schedule().decay == 20
    restarts = PretrainConfig(num_training_steps=100, scheduler="cosine_restarts", cycle_length=30).schedule()
    assert (restarts.cycle, restarts.restart_warmup) == (30, 3)
