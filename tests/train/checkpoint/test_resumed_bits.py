"""A checkpoint gives back every bit of every optimizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch.train.checkpoint.storage import (
    checkpoints_in,
    newest_whole,
)
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.loop.result import RunResult
from galore_torch.train.loop.trainer import train
from galore_torch.train.optimizers.registry import OPTIMIZERS

Make = Callable[..., PretrainConfig]


class Until:
    """A watcher that stops the run after step `last`."""

    def __init__(self, last: int = 10**9) -> None:
        self.last, self.at = last, 0

    def step(self, row: dict[str, Any], total: int) -> None:
        self.at = row["step"]

    def evaluated(self, row: dict[str, Any]) -> None:
        pass

    def should_stop(self) -> bool:
        return self.at >= self.last


def curve(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock or the system's memory decides."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens_seen", "eval_loss", "skipped")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in keys if key in row} for row in rows]


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"total_batch_size": 8, "grad_clipping": 0.5},
    "bf16": {"dtype": "bf16"},
}
EXTRAS = {
    "dropout": {"attention_dropout": 0.2},  # draws from the global generator
    "tied": {"tie_word_embeddings": True},  # one tensor under two names
}
GAPS = {"own gaps": {"gap_range": (1, 12)}}


# Each way to keep state: whole and inside the backward pass, quantised, factored, dense, of two optimizers, of changed layers.
QUICK = {("adamw", "plain"), ("galore_adamw8bit", "plain"), ("galore_adafactor", "plain"), ("muon", "plain"), ("low_rank", "plain")}
QUICK |= {("qgalore_adamw8bit", "plain"), ("qgalore_adamw8bit_per_layer", "bf16")}
QUICK |= {("galore_adamw", mode) for mode in MODES} | {("galore_adamw_per_layer", mode) for mode in MODES}


CASES = [
    *(pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in itertools.product(OPTIMIZERS, MODES)),
    *itertools.product(["adamw"], EXTRAS),
    *itertools.product(["galore_adamw"], GAPS),
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_resumed_run_is_bit_equal(name: str, mode: str, make_config: Make, model_file: Path, token_data: TokenData, tmp_path: Path) -> None:
    """Losses, norms, rates, evaluations and weights; stopped in the middle of a gap, of a pass over the data, before an evaluation."""

    def run(folder: str, watcher: Until, start: Path | None = None) -> tuple[RunResult, torch.nn.Module]:
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.rand(len(folder))  # the global generator is elsewhere each time: it must not matter
        return train(config, name, 0.01, token_data, tmp_path / folder, watcher, start)

    if mode in EXTRAS:
        model_file.write_text(json.dumps(json.loads(model_file.read_text()) | EXTRAS[mode]))
    if name in ("lora", "relora"):
        pytest.importorskip("peft", reason="lora and relora need the extra peft")
    merges = {"cycle_length": 3} if name == "relora" else {}
    config = make_config(optimizer=name, num_training_steps=9, eval_every=4, update_proj_gap=3, **(MODES | GAPS).get(mode, {}), **merges)
    whole, model = run("whole", Until())
    run("parts", Until(4))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")[:5], "stopped before the evaluation after step 4"
    checkpoint, broken = newest_whole(tmp_path / "parts" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.name, broken) == ("step-000004", [])
    resumed, again = run("parts", Until(), checkpoint)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert (resumed.losses, resumed.evals, resumed.state_bytes) == (whole.losses, whole.evals, whole.state_bytes)
    for (key, mine), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key


def test_checkpoint_loads_as_a_model_and_holds_no_pickle(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, model = train(make_config(), "galore_adamw", 0.01, token_data, tmp_path, Until())
    (checkpoint,) = checkpoints_in(tmp_path / "checkpoints")
    assert {path.suffix for path in checkpoint.iterdir()} <= {".safetensors", ".json", ".jsonl", ".jinja"}
    for mine, theirs in zip(AutoModelForCausalLM.from_pretrained(checkpoint).parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert AutoTokenizer.from_pretrained(checkpoint)("a cat")["input_ids"] == token_data.tokenizer.fast("a cat")["input_ids"]
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    assert (trainer["steps"], trainer["sequences_drawn"], trainer["tokens_seen"]) == (6, 24, 24 * 16)
    assert trainer["best_eval"][1] <= trainer["last_eval"][1]


def test_saving_changes_nothing(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    for every in (0, 1):
        (tmp_path / str(every)).mkdir()
        train(make_config(save_every=every, keep=1), "galore_adamw8bit", 0.01, token_data, tmp_path / str(every), Until())
    assert curve(tmp_path / "0") == curve(tmp_path / "1")
