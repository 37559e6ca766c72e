"""The loop against a loop written out by hand, its measurements, and its ways to stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch.engine import step as engine
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData, batches, load_data, windows_in_order
from galore_torch.train.device import memory_mb, pick_device
from galore_torch.train.errors import UserError
from galore_torch.train.loop.build import model_for
from galore_torch.train.loop.result import RunResult, perplexity
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.loss import TokenLoss
from galore_torch.train.optimizers.registry import OPTIMIZERS, build_optimizer

Make = Callable[..., PretrainConfig]


class Silent:
    """A watcher that stops the run after `steps` steps."""

    def __init__(self, steps: int | None = None) -> None:
        self.left = steps

    def step(self, row: dict[str, Any], total: int) -> None:
        if self.left is not None:
            self.left -= 1

    def evaluated(self, row: dict[str, Any]) -> None:
        pass

    def should_stop(self) -> bool:
        return self.left is not None and self.left <= 0


def run(config: PretrainConfig, data: TokenData, folder: Path, steps: int | None = None) -> tuple[RunResult, nn.Module]:
    name, lr = config.contenders[0]
    return train(config, name, lr, data, folder, Silent(steps))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_matches_a_loop_by_hand(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """AdamW, clipping and the schedule, written out with torch's own pieces: the same losses and weights."""
    from transformers import LlamaForCausalLM

    config = make_config(lr=0.01, weight_decay=0.1, beta1=0.8, grad_clipping=0.5, num_training_steps=5, warmup_steps=2)
    result, model = run(config, token_data, tmp_path)

    torch.manual_seed(config.seed)
    by_hand = LlamaForCausalLM(model.config)
    adamw = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.999))
    shares = [0.5, 1.0, 1.0, 0.55, 0.1]  # two of warm-up, then a cosine from 1 to 0.1 over three
    losses = []
    for share, (inputs, targets) in zip(shares, batches(token_data.train, 16, 4, config.seed), strict=False):
        loss = nn.functional.cross_entropy(by_hand(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        adamw.param_groups[0]["lr"] = 0.01 * share
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert [loss for _, loss in result.losses] == pytest.approx(losses, rel=1e-6)
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("name", "gradients"), [("adamw", None), ("galore_adamw", "full"), ("galore_adamw", None), ("galore_adamw_per_layer", None)]
)
def test_accumulated_batches_equal_one_large_batch(
    name: str, gradients: str | None, make_config: Make, token_data: TokenData, tmp_path: Path
) -> None:
    """Losses over four steps. Low-rank gradients take the basis from the first small batch, so their losses stay near, not equal."""
    common: dict[str, Any] = {"optimizer": name, "gradients": gradients, "lr": 0.01, "num_training_steps": 4, "total_batch_size": 8}
    tolerance = 2e-2 if "galore" in name and gradients is None else 1e-5
    small, _ = run(make_config(**common, batch_size=2), token_data, tmp_path)
    large, _ = run(make_config(**common, batch_size=8), token_data, tmp_path)
    assert [loss for _, loss in small.losses] == pytest.approx([loss for _, loss in large.losses], rel=tolerance)
    assert small.tokens_seen == large.tokens_seen == 4 * 8 * 16


def test_per_layer_is_the_same_optimizer(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """Without accumulation and clipping, updating inside the backward pass changes nothing but memory."""
    losses = []
    for name in ("galore_adamw", "galore_adamw_per_layer"):
        result, _ = run(make_config(optimizer=name, rank=4), token_data, tmp_path)
        losses.append([loss for _, loss in result.losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_clipping_works_with_per_layer_updates(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    config = make_config(optimizer="galore_adamw8bit_per_layer", grad_clipping=0.01)
    result, _ = run(config, token_data, tmp_path)
    assert result.finished
    assert all(row["grad_norm"] > 0.01 for row in rows(tmp_path) if "loss" in row)


def test_compared_runs_start_from_the_same_weights_and_see_the_same_batches(
    make_config: Make, token_data: TokenData, tmp_path: Path
) -> None:
    results = [run(make_config(optimizer=name), token_data, tmp_path)[0] for name in ("sgd", "galore_adamw", "adamw")]
    assert len({result.evals[0] for result in results}) == 1
    assert len({result.losses[0] for result in results}) == 1
    assert len({result.losses[-1] for result in results}) == 3


def test_evaluation_is_the_mean_over_tokens(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """By hand, window by window; an uneven last batch must not weigh more."""
    config = make_config(batch_size=7, num_training_steps=3)
    result, model = run(config, token_data, tmp_path)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for inputs, targets in windows_in_order(token_data.held_out, 16, 1):
            logits = model(input_ids=inputs).logits
            total += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() * 16
            tokens += 16
    assert (tokens // 16) % 7, "the last batch has to be uneven for this test to see anything"
    assert result.evals[-1][1] == pytest.approx(total / tokens, rel=1e-5)
    assert rows(tmp_path)[-1]["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_evaluates_in_eval_mode_and_returns_to_training(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    evaluations: list[int] = []
    seen: set[tuple[bool, bool]] = set()
    forward = TokenLoss.forward

    class Spy(Silent):
        def evaluated(self, row: dict[str, Any]) -> None:
            evaluations.append(row["step"])

    def watched(loss: TokenLoss, *args: torch.Tensor) -> torch.Tensor:
        seen.add((loss.model.training, torch.is_grad_enabled()))
        return forward(loss, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenLoss, "forward", watched)
        train(make_config(eval_every=2), "adamw", 0.01, token_data, tmp_path, Spy())
    assert seen == {(False, False), (True, True)}
    assert evaluations == [0, 2, 4, 6]


def test_metrics_have_one_line_an_update(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    run(make_config(eval_every=4), token_data, tmp_path)
    lines = rows(tmp_path)
    updates = [row for row in lines if "loss" in row]
    assert [row["step"] for row in updates] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens_seen"] for row in updates] == [64 * n for n in range(1, 7)]
    assert all("warm_up" in row or row["tokens_per_s"] > 0 for row in updates)
    assert all(row["lr"] > 0 and 20 < row["rss_mb"] < 1e6 for row in updates)
    assert [row["step"] for row in lines if "eval_loss" in row] == [0, 4, 6]


def test_interrupted_run_keeps_what_it_has(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    result, _ = run(make_config(), token_data, tmp_path, steps=2)
    assert (result.status, result.steps, len(result.losses)) == ("interrupted", 2, 2)


@pytest.mark.parametrize("name", ["sgd", "galore_sgd"])
def test_non_finite_loss_names_step_and_cure(name: str, make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    result, _ = run(make_config(optimizer=name, lr=1e30, warmup_steps=0, max_bad_steps=1), token_data, tmp_path)
    assert "the loss is nan at step 2" in result.status
    assert "lower the lr (now 1e+30)" in result.status
    assert len([row for row in rows(tmp_path) if "loss" in row]) == 1


def test_weights_that_break_in_the_last_update_are_noticed(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    result, _ = run(make_config(optimizer="sgd", lr=1e30, num_training_steps=1), token_data, tmp_path)
    assert "the validation loss is nan after step 1" in result.status


def test_bf16_weights_learn(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    config = make_config(dtype="bf16", optimizer="galore_adamw8bit", num_training_steps=12)
    result, model = run(config, token_data, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert result.evals[-1][1] < result.evals[0][1]


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert perplexity(math.log(300)) == pytest.approx(300)
    assert perplexity(1e6) == math.inf


def test_missing_device_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(UserError, match=r"--device cuda.*--device cpu"):
        pick_device("cuda")


def test_memory_grows_with_what_is_held() -> None:
    before = memory_mb("cpu")
    held = torch.ones(50_000_000)  # 200 MB
    after = memory_mb("cpu")
    assert after["rss_mb"] - before["rss_mb"] > 150
    assert after["peak_rss_mb"] >= after["rss_mb"] * 0.99
    del held


def test_data_for_all_is_read_once(make_config: Make) -> None:
    """The stream is a tensor, so a second run cannot see other batches than the first."""
    data = load_data(make_config())
    first, second = (list(islice(batches(data.train, 16, 4, 0), 9)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


PER_LAYER = sorted(name for name in OPTIMIZERS if name.endswith("_per_layer"))


@pytest.mark.parametrize("name", PER_LAYER)
def test_clipped_per_layer_updates_are_plain_ones_of_scaled_gradients(
    name: str, make_config: Make, token_data: TokenData, tmp_path: Path
) -> None:
    """--grad_clipping with every per-layer optimizer. Oracle: the same optimizer without a fused backward pass, on whole gradients
    scaled by hand; the norm is that of the projected ones, by hand from the bases in use, so at most the whole norm, which it is where the
    method reads whole gradients."""
    config = make_config(optimizer=name, lr=0.01, grad_clipping=0.05, num_training_steps=4, **({"rank": 8} if "galore" in name else {}))
    result, _ = run(config, token_data, tmp_path)
    told = [row["grad_norm"] for row in rows(tmp_path) if "loss" in row]

    model = model_for(config, token_data)
    optimizer = build_optimizer(name, model, lr=0.01, settings=config.optimizer_settings)
    losses = []
    for step, (inputs, targets) in zip(range(4), batches(token_data.train, 16, 4, config.seed), strict=False):
        loss = nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        losses.append(loss.item())
        whole = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        for p in model.parameters():
            p.grad *= 0.05 / (told[step] + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * config.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad()
        square = 0.0
        owned = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        for (p, own), grad in zip(owned, whole, strict=True):
            for axis, basis in engine.layout_of(p, own).bases.items() if OPTIMIZERS[name].low_rank_gradients else ():
                grad = basis.decode(optimizer.state[p]).mT @ grad.movedim(axis, 0)
            square += grad.square().sum().item()
        assert told[step] == pytest.approx(square**0.5, rel=1e-4)
        assert told[step] > 0.05, "clipping has to act for this test to see anything"
    rel = 1e-3 if "8bit" in name else 1e-5  # 8-bit moments may take the neighbouring code
    assert [loss for _, loss in result.losses] == pytest.approx(losses, rel=rel)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw8bit_per_layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_is_the_same_run_to_the_bit(name: str, dtype: str, make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """Losses, norms and weights of two runs; another seed is another run."""
    runs = []
    for seed in (3, 3, 4):
        _, model = run(make_config(optimizer=name, dtype=dtype, seed=seed, eval_every=2), token_data, tmp_path)
        told = [{key: row[key] for key in ("loss", "eval_loss", "grad_norm", "lr") if key in row} for row in rows(tmp_path)]
        runs.append((told, [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


def test_losses_of_bf16_weights_are_summed_in_float32(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """By hand in float64 from the model's bf16 logits: a sum of 64 losses in bf16 would be off by up to a part in 250."""
    config = make_config(dtype="bfloat16", num_training_steps=1)
    result, _ = run(config, token_data, tmp_path)
    model = model_for(config, token_data)
    inputs, targets = next(batches(token_data.train, 16, 4, config.seed))
    exact = nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1).double(), targets.flatten()).item()
    assert result.losses[0][1] == pytest.approx(exact, rel=1e-6)
