"""LLaMA-Factory: `use_galore: true` from its own entry point. Oracles: an uninterrupted run, and AdamW."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import LENGTH, difference, llama, saved_llama

stub = ModuleType("torchaudio")  # it imports this for sounds alone
stub.__spec__ = ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", stub)

from llamafactory.train.tuner import run_exp  # noqa: E402

FRAMEWORK, PACKAGE = "LLaMA-Factory", "llamafactory"
GALORE: dict[str, Any] = {
    "use_galore": True,
    "galore_target": "attn,mlp",
    "galore_rank": 8,
    "galore_update_interval": 4,
    "galore_scale": 1.0,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the data."""
    folder = tmp_path_factory.mktemp("shared")
    texts = saved_llama(folder / "model", WINDOWS)
    rows = [{"text": text, "instruction": text[:12], "input": "", "output": text[12:24]} for text in texts]
    (folder / "tiny.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {"tiny": {"file_name": "tiny.json", "columns": {"prompt": "text"}}, "pairs": {"file_name": "tiny.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def trained(shared: Path, folder: Path, resume: bool = False, **options: Any) -> Any:
    """The model that a run leaves in ``folder``; ``resume``: one that goes on in another folder from its middle."""
    from transformers import LlamaForCausalLM

    standard = {
        "stage": "pt",
        "do_train": True,
        "model_name_or_path": str(shared / "model"),
        "finetuning_type": "full",
        "dataset": "tiny",
        "dataset_dir": str(shared),
        "cutoff_len": LENGTH,
        "output_dir": str(folder) + "-resumed" * resume,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "report_to": "none",
        "use_cpu": True,
        "optim": "adamw_torch",
        "disable_tqdm": True,
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
    }
    if resume:
        standard["resume_from_checkpoint"] = f"{folder}/checkpoint-{STEPS // 2}"
    chosen = {**standard, **options}
    run_exp(chosen)
    return LlamaForCausalLM.from_pretrained(chosen["output_dir"], dtype=torch.float32)


WAYS: dict[str, dict[str, Any]] = {
    "`use_galore`": {},
    "`use_galore` with `optim: adamw_8bit`": {"optim": "adamw_8bit"},
    "`use_galore` with `optim: adafactor`": {"optim": "adafactor"},
    "`use_galore` with accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("feature", WAYS)
def test_use_galore(feature: str, shared: Path, tmp_path: Path, record: Any) -> None:
    options = WAYS[feature]
    models = [trained(shared, tmp_path / "galore", resume, **GALORE, **options) for resume in (False, True)]
    adamw = trained(shared, tmp_path / "adamw", **{**options, "optim": "adamw_torch"})
    compare(record, feature, *models, adamw)


def test_supervised_fine_tuning(shared: Path, tmp_path: Path, record: Any) -> None:
    models = [
        trained(shared, tmp_path / "galore", resume, stage="sft", dataset="pairs", template="default", **GALORE) for resume in (False, True)
    ]
    assert difference(*models) == 0.0
    assert difference(models[0], llama()) > 0.01
    record("`use_galore`, stage `sft`", resume=0.0)


def test_its_default_optimizer_name_is_refused(shared: Path, tmp_path: Path, record: Any) -> None:
    with pytest.raises(NotImplementedError, match="Unknown optim"):
        trained(shared, tmp_path / "galore", **GALORE, optim="adamw_torch_fused")
    record("`use_galore` without `optim: adamw_torch`, `adamw_8bit` or `adafactor`", "refused")


def test_decay_reaches_the_optimizer_and_betas_do(shared: Path, tmp_path: Path, record: Any) -> None:
    base = trained(shared, tmp_path / "base", **GALORE)
    for options in ({"weight_decay": 0.5}, {"adam_beta1": 0.5}, {"adam_epsilon": 1e-3}):
        assert difference(base, trained(shared, tmp_path / "other", **GALORE, **options)) > 0.0
    record("`weight_decay`, `adam_beta1`, `adam_epsilon` reach the optimizer")


def test_layerwise_loses_state(shared: Path, tmp_path: Path, record: Any) -> None:
    """Its own doing: a failure here is good news."""
    options = {**GALORE, "galore_layerwise": True}
    models = [trained(shared, tmp_path / "galore", resume, **options) for resume in (False, True)]
    apart = difference(*models)
    assert apart > 0.0
    record("`galore_layerwise`", "wrong", note="state lost at a resume", resume=apart)
