"""TRL's SFTTrainer, which is a Trainer: by name, fused, layer-wise. Oracles: an uninterrupted run, and AdamW."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

import galore_torch as g
from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import RANK, TARGETS, byte_tokenizer, run, windows

FRAMEWORK, PACKAGE = "TRL SFTTrainer", "trl"
NAMED: dict[str, Any] = {"optim_target_modules": TARGETS, "optim_args": "rank=8,update_proj_gap=4,scale=1.0"}


def sft(folder: Path, make: Any = None, resume: bool = False, kind: type = SFTTrainer, **options: Any) -> Any:
    data = Dataset.from_list([{"input_ids": each["input_ids"]} for each in windows(WINDOWS)])
    own = {"kind": SFTConfig, "bf16": False, "gradient_checkpointing": False, "data": data, "max_steps": STEPS, "save_steps": STEPS // 2}
    trainer = partial(kind, processing_class=byte_tokenizer())
    return run(folder, make, trainer, resume, **{**own, **options}).model


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda **options: sft(tmp_path_factory.mktemp("adamw"), optim="adamw_torch", **options))


def make(model: nn.Module) -> Any:
    return g.GaLoreAdamW(g.galore_param_groups(model, **RANK, scale=1.0), lr=0.01)


def direct(model: nn.Module) -> Any:
    optimizer = make(model)
    g.fused_backward(model, optimizer, "direct")
    return optimizer


class LayerwiseSFT(g.LayerwiseMixin, SFTTrainer):
    pass


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "galore_adafactor"])
def test_name(name: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    models = [sft(tmp_path, resume=resume, optim=name, **NAMED) for resume in (False, True)]
    compare(record, f"`{name}`", *models, adamw())


WAYS: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "`optimizers=(optimizer, None)`": (make, SFTTrainer, {}),
    "`fused_backward` direct with accumulation": (direct, SFTTrainer, {"gradient_accumulation_steps": 2}),
    "`LayerwiseMixin` update": (make, LayerwiseSFT, {"max_grad_norm": 0.0}),
    "bf16 autocast": (make, SFTTrainer, {"bf16": True}),
}


@pytest.mark.parametrize("feature", WAYS)
def test_own_optimizer(feature: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    maker, kind, options = WAYS[feature]
    models = [sft(tmp_path, maker, resume, kind, **options) for resume in (False, True)]
    compare(record, feature, *models, adamw(**options))
