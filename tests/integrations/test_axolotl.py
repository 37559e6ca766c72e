"""Axolotl, from its own entry point: names that it hands to Trainer, and a plugin. Oracles: an uninterrupted run, and AdamW."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import LENGTH, TARGETS, saved_llama

FRAMEWORK, PACKAGE = "Axolotl", "axolotl"
HERE = Path(__file__).resolve().parent
NAMED: dict[str, Any] = {"optim_target_modules": TARGETS, "optim_args": "rank=8,update_proj_gap=4,scale=1.0"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    rows = [json.dumps({"text": text}) for text in saved_llama(folder / "model", WINDOWS)]
    (folder / "tiny.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def trained(shared: Path, folder: Path, resume: bool = False, **options: Any) -> Any:
    from transformers import LlamaForCausalLM

    folder.mkdir(exist_ok=True)
    output = folder / ("resumed" if resume else "straight")
    config: dict[str, Any] = {
        "base_model": str(shared / "model"),
        "datasets": [{"path": str(shared / "tiny.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": LENGTH,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "optimizer": "adamw_torch",
        "output_dir": str(output),
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "val_set_size": 0,
        "seed": 5,
    }
    if resume:
        config["resume_from_checkpoint"] = str(folder / "straight" / f"checkpoint-{STEPS // 2}")
    (folder / "config.yml").write_text(yaml.safe_dump({**config, **options}), encoding="utf-8")
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "axolotl.cli.train", str(folder / "config.yml")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)


@pytest.fixture(scope="module")
def adamw(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(shared, tmp_path_factory.mktemp("adamw"))


def test_name(shared: Path, tmp_path: Path, adamw: Any, record: Any) -> None:
    """One of three: what it does with them is Trainer's, and tested there."""
    models = [trained(shared, tmp_path, resume, optimizer="galore_adamw_8bit", **NAMED) for resume in (False, True)]
    compare(record, "`optimizer: galore_adamw_8bit`", *models, adamw)


def test_plugin(shared: Path, tmp_path: Path, adamw: Any, record: Any) -> None:
    """Every argument is the user's, and Q-GaLore's optimizer needs no other package."""
    plugins = ["integrations.axolotl_plugin.GaLorePlugin"]
    models = [trained(shared, tmp_path, resume, plugins=plugins) for resume in (False, True)]
    compare(record, "a plugin with `QGaLoreAdamW8bit`", *models, adamw)


def test_q_galore_by_name_asks_for_the_published_package(shared: Path, tmp_path: Path, record: Any) -> None:
    assert find_spec("q_galore_torch") is None
    with pytest.raises(RuntimeError, match="No module named 'q_galore_torch'"):
        trained(shared, tmp_path, optimizer="q_galore_adamw8bit", qgalore_rank=8, optim_target_modules=TARGETS)
    record("`optimizer: q_galore_adamw8bit`", "refused", note="imports q_galore_torch; the plugin needs no such package")
