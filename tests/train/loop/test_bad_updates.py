"""Steps that would not be finite are skipped; too many end the run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.commands import pretrain as module
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.loop.trainer import _Loop, train
from galore_torch.train.report.progress import Display
from support.whole_runs import Silent, command, rows

Make = Callable[..., PretrainConfig]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        *[("adamw", "loss"), ("adamw", "gradient norm"), ("galore_adamw", "loss"), ("galore_adamw", "gradient norm")],
        *[("galore_adamw_per_layer", "loss"), ("galore_adamw_per_layer", "gradient norm")],
    ],
)
def test_bad_update_is_skipped_and_counted(
    name: str, broken: str, make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 meet NaN: the weights stay as step 2 left them, and the run learns on."""
    loss = _Loop.loss

    def sometimes(self: _Loop, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = loss(self, inputs, targets)
        seen[self.result.steps] = [p.clone() for p in self.model.parameters()]
        if self.result.steps not in (2, 3):
            return value
        if broken == "loss":
            return value * torch.nan
        value.register_hook(lambda grad: grad * torch.inf)
        return value

    seen: dict[int, list[torch.Tensor]] = {}
    monkeypatch.setattr(_Loop, "loss", sometimes)
    result, _ = train(make_config(optimizer=name, eval_every=2), name, 0.01, token_data, tmp_path, Silent())
    assert (result.status, result.skipped, result.skipped_in_a_row) == ("finished", 2, 0)
    assert all(torch.equal(one, other) for one, other in zip(seen[2], seen[4], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(seen[4], seen[5], strict=True))
    updates = [row for row in rows(tmp_path) if "lr" in row]
    assert [row["step"] for row in updates if "skipped" in row] == [3, 4]
    assert all(row["skipped"].startswith(f"the {broken} is ") for row in updates if "skipped" in row)
    assert ["refreshes" in row for row in updates] == [name != "adamw" and "skipped" not in row for row in updates]
    assert [step for step, _ in result.losses] == ([1, 2, 5, 6] if broken == "loss" else [1, 2, 3, 4, 5, 6])


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted across a resume; doubtful checkpoints do not push out the last good one."""
    loss = _Loop.loss
    monkeypatch.setattr(_Loop, "loss", lambda self, x, y: loss(self, x, y) * (torch.nan if self.result.steps > 1 else 1))

    def interrupt_at_4(self: Display, row: dict[str, Any], total: int) -> None:
        if row["step"] == 4:
            self.stopped_by = signal.SIGTERM

    config = make_config(save_every=1, keep=1, max_bad_steps=3, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", interrupt_at_4)
        assert command(config)[0] == 143
    code, printed = command(config)
    assert code == module.EXIT_STOPPED
    assert "adamw stopped: the loss is nan at step 5, 3 skipped in a row; lower the lr" in printed
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize("name", ["adamw", "galore_adamw_per_layer"])
def test_loss_that_jumps_is_skipped_where_that_is_asked_for(
    name: str, make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 56 reads 9 nats too much; step 3 does too, but then nothing is known yet."""
    loss = _Loop.loss
    monkeypatch.setattr(_Loop, "loss", lambda self, x, y: loss(self, x, y) + 9 * y.numel() * (self.result.steps in (2, 55)))
    settings: dict[str, Any] = {"optimizer": name, "num_training_steps": 58}
    result, _ = train(make_config(max_loss_rise=3.0, **settings), name, 0.01, token_data, tmp_path, Silent())
    (skipped,) = [row for row in rows(tmp_path) if "skipped" in row]
    assert (skipped["step"], result.skipped, result.finished) == (56, 1, True)
    assert skipped["loss"] > 9
    assert "above the median of the last 50" in skipped["skipped"]
    result, _ = train(make_config(**settings), name, 0.01, token_data, tmp_path, Silent())
    assert result.skipped == 0


def test_weights_that_are_not_finite_are_no_checkpoint(make_config: Make, tmp_path: Path) -> None:
    code, _ = command(make_config(optimizer="sgd", lr=1e38, save_every=1, warmup_steps=0))
    assert code == module.EXIT_STOPPED
    for path in checkpoints_in(tmp_path / "run" / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_sizes_are_measured_in_the_first_update_that_is_not_skipped(
    make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = _Loop.loss
    monkeypatch.setattr(_Loop, "loss", lambda self, x, y: loss(self, x, y) * (1 if self.result.steps else torch.nan))
    train(make_config(), "adamw", 0.01, token_data, tmp_path, Silent())
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written if "memory_mb" in row] == [2]
