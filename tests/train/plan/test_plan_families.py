"""Families of transformers: every one is planned, its weights and state to the byte, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch import cli
from galore_torch.optim.param_groups import chosen_weights
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import load_model
from galore_torch.train.optimizers.registry import as_targets, build_optimizer, state_bytes
from galore_torch.train.plan.answer import plan_request, planned, planned_peak_bytes
from galore_torch.train.plan.search import best_that_fits

_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
_SMALL |= {"vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA = {"state_size": 8, "time_step_rank": 8, "expand": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4},
    "rwkv": {"attention_hidden_size": 64},
    "mamba": _MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "falcon_mamba": _MAMBA,
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8},
    "recurrent_gemma": {"lru_width": 64},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gemma2": {"head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
RECURRENT = {"rwkv", "mamba", "mamba2", "falcon_mamba", "jamba", "recurrent_gemma"}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(family, its folder with a config and no weights)."""
    family: str = request.param
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **_SMALL, **FAMILIES[family]}))
    return family, str(tmp_path)


def config_of(path: str, **more: Any) -> PretrainConfig:
    settings = {"hf_model": path, "optimizer": "galore_adamw8bit", "rank": 8, "dtype": "bfloat16", "max_length": 32, "batch_size": 2}
    return PretrainConfig(**{**settings, "device": "cpu", **more})


@pytest.mark.filterwarnings("ignore:rank=8 is not smaller", "ignore:no layer of")
def test_weights_and_state_are_those_of_the_real_model(folder: tuple[str, str]) -> None:
    """Oracle: the storages of an optimizer on the model itself, on the meta device's twin of it."""
    family, path = folder
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).to(torch.bfloat16)
    for name in ("galore_adamw8bit", "adam8bit"):
        config = config_of(path, optimizer=name)
        request = plan_request(config, device="cpu")
        optimizer = build_optimizer(name, model, lr=1e-3, settings=config.optimizer_settings)
        assert request.total("weight") == sum(p.nbytes for p in model.parameters()), family
        assert request.total("basis") + request.total("moments") == state_bytes(optimizer), family


@pytest.mark.parametrize("words", ["--optimizer adamw", "--checkpointing"])
def test_the_command_answers_or_says_why_not(folder: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, path = folder
    code = cli.main(["plan", "--model", path, "--seq", "32", *words.split()])
    shown = capsys.readouterr()
    if code:
        assert (code, shown.err.count("\n")) == (2, 1)
        pytest.fail(f"{family}: {shown.err}")
    assert "needed" in shown.out
    assert ("by formulas" in shown.out) == (family in RECURRENT)


def test_adamw_on_a_model_without_attention_has_a_planned_peak_or_none(tmp_path: Path) -> None:
    """What `galore pretrain` asks for its display: a traceback once."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", **_SMALL, **_MAMBA}))
    assert planned_peak_bytes(config_of(str(tmp_path), optimizer="adamw"), 300, "adamw") is None


@pytest.mark.parametrize("targets", [None, ("experts",), ("q_proj",)])
def test_default_rank_is_below_the_short_side_of_what_is_projected(targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Experts of 32 x 64 and 64 x 16: a quarter of the width, 16, is not below the second's side, and leaves it at full rank."""
    narrow = {"model_type": "mixtral", **_SMALL, "intermediate_size": 16, "num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(narrow))
    config = config_of(str(tmp_path), rank=None, targets=targets)
    assert config.resolved_rank == (16 if targets == ("q_proj",) else 4)
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path))).to(torch.bfloat16)
    optimizer = build_optimizer("galore_adamw8bit", model, lr=1e-3, settings=config.optimizer_settings)
    chosen = chosen_weights(model, as_targets(targets))
    assert all(any(key.startswith("basis") for key in optimizer.state[weight.parameter]) for weight in chosen)
    request = plan_request(config, device="cpu")
    assert request.total("basis") + request.total("moments") == state_bytes(optimizer)
    largest = best_that_fits({"hf_model": str(tmp_path), "targets": targets, "max_length": 16}, 10**10, "cpu", traced=False)
    assert largest is not None
    assert largest[0].rank == 2 * config.resolved_rank, "the planner tries half of that side first"


def test_experts_are_refused_where_the_optimizer_refuses_them(tmp_path: Path) -> None:
    name = "lora"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **_SMALL, "num_local_experts": 4}))
    config = config_of(str(tmp_path), optimizer=name)
    with pytest.raises(UserError, match="choose galore_adamw"):
        planned(plan_request(config, device="cpu"), traced=False)
    with torch.device("meta"):
        model = load_model(str(tmp_path), dtype="bfloat16", activation_checkpointing=False)
    with pytest.raises(UserError, match="choose galore_adamw"):
        build_optimizer(name, model, lr=1e-3, settings=config.optimizer_settings)


@pytest.mark.parametrize("model_type", ["t5", "musicgen", "no_such_family"])
def test_what_is_no_causal_language_model_is_one_line(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert cli.main(["plan", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
