"""PEFT under Trainer: LoRA's factors train, frozen weights have no state. Oracles: an uninterrupted run, and AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import galore_torch as g
from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import llama, run

FRAMEWORK, PACKAGE = "PEFT", "peft"
SIZE: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS // 2, "count": WINDOWS}


def adapted(**options: Any) -> nn.Module:
    """The tiny LLaMA with trainable factors of rank 16 beside frozen weights, and a head that trains in full."""
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    model = llama()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options}))


def make(model: nn.Module) -> Any:
    return g.GaLoreAdamW(g.galore_param_groups(model, rank=4, update_proj_gap=4, scale=1.0), lr=0.01)


@pytest.mark.parametrize(("feature", "options"), [("LoRA's factors", {}), ("DoRA", {"use_dora": True}), ("rsLoRA", {"use_rslora": True})])
def test_adapter(feature: str, options: dict[str, Any], tmp_path: Path, record: Any) -> None:
    straight = run(tmp_path, make, model=adapted(**options), **SIZE)
    resumed = run(tmp_path, make, model=adapted(**options), resume=True, **SIZE)
    optimizer = straight.optimizer.optimizer
    trained = [p for p in straight.model.parameters() if p.requires_grad]
    assert {p for p, state in optimizer.state.items() if state} == set(trained)
    assert sum("basis" in optimizer.state[p] for p in trained) >= 2 * 2 * 7
    before = dict(adapted(**options).named_parameters())
    for name, p in straight.model.named_parameters():
        assert torch.equal(p, before[name]) is not p.requires_grad, name
    adamw = run(tmp_path / "adamw", optim="adamw_torch", model=adapted(**options), **SIZE).model
    compare(record, feature, straight.model, resumed.model, adamw)


def test_factors_not_above_the_rank_are_trained_in_full_and_said_so(record: Any) -> None:
    with pytest.warns(UserWarning, match="rank=16 is not smaller than the short side"):
        g.GaLoreAdamW(g.galore_param_groups(adapted(), rank=16), lr=0.01)
    record("factors not above the rank train in full, with a warning")
