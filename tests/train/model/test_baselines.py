"""The paper's baselines: which weights learn, what is merged when, and that the saved model is an ordinary one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.flags import config_from
from galore_torch.train.errors import UserError
from galore_torch.train.model import baselines
from galore_torch.train.model.baselines import LowRankLinear, to_dense
from galore_torch.train.model.llama import build_model, model_shape
from galore_torch.train.optimizers.registry import build_optimizer

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS: dict[str, Any] = {"rank": 4, "weight_decay": 0.0, "beta1": None, "cycle_length": 3}


@pytest.fixture
def model(model_file: Path) -> nn.Module:
    settings: dict[str, Any] = {"dtype": "float32", "bos_token_id": None, "eos_token_id": 0, "activation_checkpointing": False}
    return build_model(model_shape(str(model_file)), seed=0, **settings)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="lora and relora need the extra peft")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    tokens = torch.arange(32).view(2, 16)
    for _ in range(steps):
        logits = model(input_ids=tokens[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16)[None]).logits


def test_low_rank_weights_are_products_of_the_right_size(model: nn.Module) -> None:
    before = dict(model.named_parameters())
    build_optimizer("low_rank", model, lr=0.01, settings=SETTINGS)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    assert [name.split(".")[-1] for name in layers] == list(NAMES)
    for name, layer in layers.items():
        assert (layer.up @ layer.down).shape == before[f"{name}.weight"].shape
    products = torch.cat([(layer.up @ layer.down).flatten() for layer in layers.values()])
    assert products.std().item() == pytest.approx(0.02, rel=0.15), "the deviation of a LLaMA's initial weights"


@pytest.mark.parametrize("name", ["low_rank", "lora", "relora"])
def test_dense_model_computes_the_same_and_loads(name: str, model: nn.Module, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    if name != "low_rank":
        request.getfixturevalue("peft")
    optimizer = build_optimizer(name, model, lr=0.01, settings=SETTINGS)
    train(model, optimizer, 4)
    expected = logits(model)
    assert torch.allclose(logits(to_dense(model)), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), expected, atol=1e-5)


def test_lora_trains_adapters_embeddings_head_and_norms(model: nn.Module, peft: Any) -> None:
    optimizer = build_optimizer("lora", model, lr=0.01, settings=SETTINGS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)  # lora_A moves once lora_B has left zero
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name in before if "base_layer" in name}
    assert len(same) == len(NAMES)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 32 / 4


def test_adapters_have_the_weights_dtype(model: nn.Module, peft: Any) -> None:
    build_optimizer("lora", model.to(torch.bfloat16), lr=0.01, settings=SETTINGS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_relora_merges_every_third_update_and_computes_on(model: nn.Module, peft: Any) -> None:
    """Oracle: a merge moves the adapters' product into the frozen weight, so the model's outputs stay."""
    optimizer = build_optimizer("relora", model, lr=0.01, settings=SETTINGS)
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    frozen = [layer.base_layer.weight.detach().clone()]
    merged: list[int] = []
    original = baselines._merge

    def merge(layer: Any) -> None:
        merged.append(optimizer.param_groups[0]["updates"])
        original(layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_merge", merge)
        for _ in range(7):
            train(model, optimizer)
            frozen.append(layer.base_layer.weight.detach().clone())
            if len(merged) == len(NAMES) and not torch.equal(frozen[-1], frozen[-2]):
                assert layer.lora_B["default"].weight.abs().max() == 0
                assert layer.lora_A["default"].weight not in optimizer.state
    assert merged == [3] * len(NAMES) + [6] * len(NAMES)
    moved = [not torch.equal(now, before) for before, now in pairwise(frozen)]
    assert moved == [False, False, True, False, False, True, False]


def test_merge_leaves_the_outputs(model: nn.Module, peft: Any) -> None:
    optimizer: Any = build_optimizer("relora", model, lr=0.01, settings={**SETTINGS, "cycle_length": 1000})
    train(model, optimizer, 3)
    expected = logits(model)
    optimizer.param_groups[0]["updates"] = 999
    optimizer.step()  # no gradients: nothing but the merge happens
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert optimizer.adapted[0].lora_B["default"].weight.abs().max() == 0


def test_count_of_updates_is_in_the_checkpoint(model: nn.Module, peft: Any) -> None:
    optimizer = build_optimizer("relora", model, lr=0.01, settings=SETTINGS)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["updates"] = 0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["updates"] == 2


def test_missing_peft_says_what_to_install(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "galore-torch\[peft\]"'):
        build_optimizer("lora", model, lr=0.01, settings=SETTINGS)


def test_relora_without_a_cycle_is_refused() -> None:
    with pytest.raises(UserError, match="relora needs --cycle_length"):
        config_from({"optimizer": "relora"})


def test_the_papers_table_in_one_command(make_config: Callable[..., PretrainConfig], tmp_path: Path, peft: Any) -> None:
    """All methods one after the other from the same weights; relora's rate restarts where it merges, the others' do not."""
    names = ("adamw", "galore_adamw", "low_rank", "lora", "relora")
    settings: dict[str, Any] = {"num_training_steps": 6, "warmup_steps": 1, "cycle_length": 3, "rank": 4, "dtype": "bfloat16"}
    assert pretrain(make_config(compare=names, activation_checkpointing=True, grad_clipping=1.0, lr=0.01, **settings)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["status"] for row in summary] == ["finished"] * len(names)
    assert len({row["parameters"] for row in summary}) == 1
    assert len({row["perplexity_before"] for row in summary if row["optimizer"] != "low_rank"}) == 1
    rates = {name: [row["lr"] for row in metrics(tmp_path / "run" / name) if "lr" in row] for name in names}
    assert rates["lora"] == rates["galore_adamw"] == rates["adamw"]
    assert rates["relora"] == rates["adamw"], "a cycle of three warms up in one step"
    wide = make_config(optimizer="relora", restart_warmup_steps=2, save_dir=str(tmp_path / "wide"), **settings)
    assert wide.lr_factor(3, "relora") == wide.lr_factor(3) / 2


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_low_rank_in_a_whole_run(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """Beside AdamW from the same command: less state, and a model folder without a trace of the factors."""
    assert pretrain(make_config(compare=("adamw", "low_rank"), rank=4)) == 0
    adamw, low_rank = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert low_rank["optimizer_state_mb"] < adamw["optimizer_state_mb"]
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / "low_rank" / "model" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.up_proj.weight" in set(file.keys())
