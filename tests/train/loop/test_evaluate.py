"""The published convention of evaluation beside the right one: by hand, and never under the same name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData, windows_in_order
from galore_torch.train.loop.evaluate import published_loss
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.loss import TokenLoss
from support.whole_runs import Silent, command

Make = Callable[..., PretrainConfig]


def evals(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_loss" in row]


def test_legacy_figure_is_the_mean_of_batch_means_over_one_batch_more(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """By hand: batches of 7 windows and an uneven last one, each of the same weight, divided by their number + 1."""
    config = make_config(batch_size=7, num_training_steps=3, legacy_eval=True)
    _, model = train(config, "adamw", 0.01, token_data, tmp_path, Silent())
    means, sums, tokens = [], 0.0, 0
    with torch.no_grad():
        for inputs, targets in windows_in_order(token_data.held_out, 16, 7):
            mean = nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten()).item()
            means.append(mean)
            sums, tokens = sums + mean * targets.numel(), tokens + targets.numel()
    row = evals(tmp_path)[-1]
    assert (tokens // 16) % 7, "the last batch has to be uneven for this test to see anything"
    assert row["legacy_eval_loss"] == pytest.approx(sum(means) / (len(means) + 1), rel=1e-5)
    assert row["legacy_eval_perplexity"] == pytest.approx(math.exp(row["legacy_eval_loss"]))
    assert row["eval_loss"] == pytest.approx(sums / tokens, rel=1e-5)


def test_without_the_flag_there_is_no_legacy_figure(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    train(make_config(), "adamw", 0.01, token_data, tmp_path, Silent())
    assert not any("legacy" in key for row in evals(tmp_path) for key in row)


def test_it_stays_in_training_mode_until_the_last_evaluation() -> None:
    class Spy(TokenLoss):
        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            torch.rand(1)  # as dropout draws
            return targets.sum().float()

    seen: list[tuple[bool, bool]] = []
    spy = Spy(nn.Identity()).train()
    before = torch.get_rng_state()
    batch = [(torch.ones(1, 4, dtype=torch.long),) * 2]
    assert published_loss(spy, batch, "cpu", last=False) == published_loss(spy, batch, "cpu", last=True) == 0.5
    assert seen == [(True, False), (False, False)]
    assert spy.training
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers are its own"


@pytest.mark.parametrize("name", ["adamw", "lora"])
def test_the_flag_changes_no_weight(name: str, make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """LoRA's adapters have dropout, which draws random numbers in training mode."""
    losses = []
    for legacy in (False, True):
        config = make_config(optimizer=name, rank=4, eval_every=2, legacy_eval=legacy)
        result, model = train(config, name, 0.01, token_data, tmp_path, Silent())
        losses.append(result.losses + result.evals)
    assert losses[0] == losses[1]
    assert all("legacy_eval_loss" in row for row in evals(tmp_path))
    figures = [published_loss(TokenLoss(model), windows_in_order(token_data.held_out, 16, 4), "cpu", last=last) for last in (False, True)]
    assert (figures[0] == figures[1]) == (name == "adamw"), "dropout acts in all but the last"


def test_it_is_shown_under_its_own_name(make_config: Make) -> None:
    _, printed = command(make_config(legacy_eval=True, num_training_steps=2))
    assert printed.count("(as published: ") == 2
