"""The published commands, pasted: every flag acts, or a note says why it does not; and one runs under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.flags import config_from

SRC = Path(cli.__file__).resolve().parents[1]
GALORE = "--optimizer {} --lr {} --galore_scale 0.25 --rank {} --update_proj_gap {}"
LENGTH = (
    "--batch_size {} --total_batch_size 512 --num_training_steps {} --warmup_steps {} --weight_decay 0 --dtype bfloat16 --eval_every 1000"
)
COMMANDS = {
    "60m": f"{GALORE.format('galore_adamw', 0.01, 128, 200)} {LENGTH.format(256, 10000, 1000)}",
    "130m": f"{GALORE.format('galore_adamw', 0.01, 256, 200)} {LENGTH.format(256, 20000, 2000)}",
    "350m": f"{GALORE.format('galore_adamw', 0.01, 256, 200)} {LENGTH.format(128, 60000, 6000)}",
    "1b": f"{GALORE.format('galore_adamw', 0.01, 1024, 200)} {LENGTH.format(16, 100000, 10000)}",
    "7b": f"{GALORE.format('galore_adamw', 0.005, 1024, 500)} {LENGTH.format(8, 150000, 15000)} --grad_clipping 1.0",
    "7b-single-gpu": f"{GALORE.format('galore_adamw8bit_per_layer', 0.005, 1024, 500)} {LENGTH.format(1, 150000, 15000)} "
    "--grad_clipping 1.0 --single_gpu",
    "7b-single-gpu-checkpointing": f"{GALORE.format('galore_adamw8bit_per_layer', 0.005, 1024, 500)} {LENGTH.format(16, 150000, 15000)} "
    "--grad_clipping 1.0 --single_gpu --activation_checkpointing",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_pasted_command_is_the_recipe(name: str, parsed: Callable[[str], PretrainConfig]) -> None:
    """But for the text, which is C4 there in any case, and the validation tokens: the published script has no flag for them."""
    config = parsed(f"--model_config configs/llama_{name.split('-')[0]}.json {COMMANDS[name]}")
    recipe = config_from({"config": name, "data": (), "eval_tokens": 65536})

    def acting(c: PretrainConfig) -> dict[str, Any]:
        own = {"model_config": c.shape, "single_gpu": None, "given": None}
        return {key: own.get(key, value) for key, value in vars(c).items() if key not in ("single_gpu", "given")}

    assert acting(config) == acting(recipe)
    notes = " ".join(config.notes)
    assert "the preset " + name.split("-")[0] in notes
    assert ("--single_gpu has no effect" in notes) == ("single" in name)
    assert "on the source of Python's standard library, not on C4" in notes


def test_every_other_published_flag_acts_or_is_noted(parsed: Callable[[str], PretrainConfig]) -> None:
    config = parsed(
        "--model_config 60m --use_hf_model --batch_size 4 --gradient_accumulation 2 --max_length 64 --scheduler linear --min_lr_ratio 0.2 "
        "--max_train_tokens 100K --save_every 100 --save_dir x --tags a,b --workers 8 --seed 3 --name test --beta1 0.5 --proj_type left"
    )
    assert (config.sequences_per_update, config.max_length, config.num_training_steps) == (8, 64, 195)
    assert (config.scheduler, config.min_lr_ratio, config.seed, config.beta1, config.proj_type) == ("linear", 0.2, 3, 0.5, "left")
    noted = {note.split()[0] for note in config.notes if "has no effect" in note}
    assert noted == {"--use_hf_model", "--tags", "--workers", "--name"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_published_command_runs_under_torchrun(processes: int, text_file: Path, model_file: Path, tmp_path: Path) -> None:
    """The 60M command with the model, the data and the length exchanged: nothing else is."""
    small = ["--max_length", "16", "--rank", "4", "--batch_size", "2", "--total_batch_size", "4", "--device", "cpu"]
    less = ["--num_training_steps", "3", "--warmup_steps", "1", "--data", str(text_file), "--save_dir", "run"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "galore_torch.train",
    ]
    command = [*launcher, "--model_config", str(model_file), *COMMANDS["60m"].split(), *small, *less]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["optimizer"], saved["dtype"], saved["update_proj_gap"], saved["lr"]) == ("galore_adamw", "bfloat16", 200, 0.01)
