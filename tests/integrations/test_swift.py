"""ms-swift, from its own entry point: names that it hands to Trainer, and a plugin. Oracles: an uninterrupted run, and AdamW."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import LENGTH, saved_llama

FRAMEWORK, PACKAGE = "ms-swift", "ms-swift"
HERE = Path(__file__).resolve().parent
NAMED = ["--optim_target_modules", ".*(attn|mlp).*", "--optim_args", "rank=8,update_proj_gap=4,scale=1.0"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    texts = saved_llama(folder / "model", WINDOWS)
    rows = [json.dumps({"messages": [{"role": "assistant", "content": text}]}) for text in texts]
    (folder / "tiny.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def trained(shared: Path, folder: Path, *options: str, resume: bool = False) -> Any:
    """The model that a run leaves; ``resume``: one that goes on in another folder from its middle."""
    from transformers import LlamaForCausalLM

    output = folder / ("resumed" if resume else "straight")
    settings: dict[str, Any] = {
        "model": shared / "model",
        "model_type": "llama",
        "template": "dummy",
        "dataset": shared / "tiny.jsonl",
        "split_dataset_ratio": 0,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "max_length": LENGTH,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "seed": 5,
        "add_version": "false",
        "output_dir": output,
    }
    if resume:
        settings["resume_from_checkpoint"] = folder / "straight" / f"checkpoint-{STEPS // 2}"
    environment = os.environ | {"USE_HF": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "swift.cli.pt", *(f"--{key}={value}" for key, value in settings.items()), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return LlamaForCausalLM.from_pretrained(output / f"checkpoint-{STEPS}", dtype=torch.float32)


@pytest.fixture(scope="module")
def adamw(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(shared, tmp_path_factory.mktemp("adamw"), "--optim", "adamw_torch")


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit"])
def test_name(name: str, shared: Path, tmp_path: Path, adamw: Any, record: Any) -> None:
    models = [trained(shared, tmp_path, "--optim", name, *NAMED, resume=resume) for resume in (False, True)]
    compare(record, f"`--optim {name}`", *models, adamw)


def test_plugin(shared: Path, tmp_path: Path, adamw: Any, record: Any) -> None:
    options = ["--external_plugins", str(HERE / "swift_plugin.py"), "--optimizer", "galore_torch"]
    models = [trained(shared, tmp_path, *options, resume=resume) for resume in (False, True)]
    compare(record, "a plugin with `QGaLoreAdamW8bit`", *models, adamw)


def test_its_own_flag_is_another_package(record: Any) -> None:
    """`--use_galore` trains by classes of swift's own, whatever is installed."""
    from swift.optimizers.galore import GaLoreAdamW

    import galore_torch

    assert GaLoreAdamW is not galore_torch.GaLoreAdamW
    assert GaLoreAdamW.__module__.startswith("swift.")
    record("`--use_galore`", "ignored", note="trains by swift's own copy of the published classes; this package is not asked")
