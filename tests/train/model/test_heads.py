"""Heads for tasks: what is new, what a method trains, and what the planner counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from galore_torch.train.errors import UserError
from galore_torch.train.model.freeze import new_head
from galore_torch.train.model.heads import classifier_sizes, load_classifier
from galore_torch.train.model.pretrained import load_model
from galore_torch.train.optimizers.registry import build_optimizer
from support import tasks

SETTINGS: dict[str, Any] = {"rank": 4, "weight_decay": 0.0, "beta1": None, "lora_alpha": 16.0, "lora_alone": True}


def names(model: nn.Module, chosen: nn.Module) -> set[str]:
    inside = {id(p) for p in chosen.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_head_is_what_the_checkpoint_does_not_have(family: str, tmp_path: Path) -> None:
    """Its weights are the seed's; all others are the checkpoint's. Of a language model there is no new head."""
    folder = getattr(tasks, family)(tmp_path)
    one, again, other = (load_classifier(folder, ("a", "b", "c"), seed=seed) for seed in (1, 1, 2))
    head = names(one, new_head(one))
    assert head == ({"classifier.weight", "classifier.bias"} if family == "bert" else {"score.weight"})
    for name, p in one.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        assert torch.equal(p, other.get_parameter(name)) == (name not in head or "bias" in name), name
    if family == "llama":
        from transformers import AutoModelForCausalLM

        assert not list(new_head(AutoModelForCausalLM.from_pretrained(folder)).parameters())


def test_head_of_several_layers_is_new_whole() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=60, **sizes))
    assert names(model, new_head(model)) == {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}


def test_lora_trains_its_adapters_and_the_new_head_alone(tmp_path: Path) -> None:
    """And at the published alpha where no fine-tuning says otherwise everything outside of the matrices, as before."""
    pytest.importorskip("peft", reason="lora needs the extra peft")
    model = load_classifier(tasks.bert(tmp_path), ("a", "b"))
    optimizer = build_optimizer("lora", model, lr=1e-3, settings=SETTINGS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or name.startswith("classifier.")}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for name, p in model.named_parameters() if name in trained
    )
    scaling = {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")}
    assert scaling == {4.0}, "alpha / rank"


def test_default_projects_the_body_and_not_the_head(tmp_path: Path) -> None:
    model = load_classifier(tasks.bert(tmp_path), ("a", "b"))
    settings = SETTINGS | {"update_proj_gap": 5, "gap_range": None, "galore_scale": 1.0, "proj_type": "std"}
    optimizer = build_optimizer("galore_adamw", model, lr=1e-3, settings=settings)
    (projected,) = [group for group in optimizer.param_groups if group.get("rank") is not None]
    mine = {id(p) for p in projected["params"]}
    layers = {name for name, p in model.named_parameters() if id(p) in mine}
    assert len(layers) == 12
    assert all(name.startswith("bert.encoder.layer.") for name in layers)


def test_sizes_are_those_of_the_model(tmp_path: Path) -> None:
    folder = tasks.bert(tmp_path)
    assert classifier_sizes(folder).parameters == sum(p.numel() for p in load_classifier(folder, ("a", "b")).parameters())
    assert not classifier_sizes(folder).like_llama


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--model_name_or_path .* cannot be loaded as a classifier"):
        load_classifier(str(tmp_path), ("a", "b"))


def spoil(folder: str, how: str) -> None:
    """Weights that the config does not speak of, or other sizes than theirs."""
    path = Path(folder)
    if how == "renamed":
        weights = load_file(path / "model.safetensors")
        save_file({f"other.{name}": weight for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"})
    else:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


@pytest.mark.parametrize("how", ["renamed", "resized"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_weights_that_are_not_the_models_are_refused(family: str, how: str, tmp_path: Path) -> None:
    """It would train from random weights and not say so."""
    folder = getattr(tasks, family)(tmp_path)
    spoil(folder, how)
    with pytest.raises(UserError, match=r"is no whole model: \d+ weights are missing or of another shape.*; give a folder whose config"):
        load_classifier(folder, ("a", "b"))
    with pytest.raises(UserError, match=r"--hf_model .* is no whole causal language model: \d+ weights are missing or of another shape"):
        load_model(folder, dtype="float32", activation_checkpointing=False)


def test_only_a_head_and_a_pooler_may_be_new(tmp_path: Path) -> None:
    """A language model's encoder has no pooler, a body no head, another task's head other classes; tied heads are in no file."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    saved: dict[str, Any] = {
        "encoder": BertForMaskedLM(BertConfig(**sizes)),
        "body": LlamaModel(LlamaConfig(**sizes)),
        "classes": BertForSequenceClassification(BertConfig(**sizes, num_labels=5)),
        "tied": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
    }
    for name, model in saved.items():
        model.save_pretrained(tmp_path / name)
        loaded = dict(load_classifier(str(tmp_path / name), ("a", "b", "c")).named_parameters())
        body = {key: p for key, p in model.named_parameters() if key.removeprefix("model.") in {k.removeprefix("model.") for k in loaded}}
        same = [torch.equal(p, loaded.get(key, loaded.get(f"model.{key}"))) for key, p in body.items() if "classifier" not in key]
        assert len(same) > 8, name
        assert all(same), name
    assert load_model(str(tmp_path / "tied"), dtype="float32", activation_checkpointing=False)
    with pytest.raises(UserError, match=r"is no whole causal language model: 1 weights .*, such as lm_head.weight"):
        load_model(str(tmp_path / "body"), dtype="float32", activation_checkpointing=False)
