"""Presets have the published parameter counts; config files are read, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch.train.errors import UserError
from galore_torch.train.model import PRESETS, build_model, model_shape

# Millions of parameters of the published configs at vocabulary 32,000 (100m: 32,100).
SIZES = "9m 20m 35m 40m 60m 71m 100m 130m 250m 350m 1b 3b 7b"
MILLIONS = (9.00, 19.55, 35.20, 42.39, 58.07, 70.58, 100.12, 134.11, 247.37, 367.97, 1339.08, 2685.83, 6738.42)
PUBLISHED = dict(zip(SIZES.split(), MILLIONS, strict=True))


def build(shape: Any, seed: int = 0, **changes: Any) -> Any:
    settings = {"dtype": "float32", "bos_token_id": None, "eos_token_id": 0, "activation_checkpointing": False}
    return build_model(shape, seed=seed, **(settings | changes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = build(model_shape(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.005)


def test_every_preset_is_counted() -> None:
    assert set(PUBLISHED) | {"demo"} == set(PRESETS)


def test_same_seed_same_weights(model_file: Path) -> None:
    shape = model_shape(str(model_file))
    one, same, other = build(shape, 1), build(shape, 1), build(shape, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(("checkpointing", "forwards"), [(False, 1), (True, 2)])
def test_activation_checkpointing_runs_a_layer_again_in_the_backward_pass(model_file: Path, checkpointing: bool, forwards: int) -> None:
    model = build(model_shape(str(model_file)), activation_checkpointing=checkpointing)
    calls: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert len(calls) == forwards


def test_dtype_is_the_weights(model_file: Path) -> None:
    assert {p.dtype for p in build(model_shape(str(model_file)), dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_config_folder_and_published_key_names(tmp_path: Path) -> None:
    """The published files say max_sequence_length, and a pad token of -1 that must not reach the embedding."""
    raw = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    raw |= {"model_type": "llama", "vocab_size": 50, "max_sequence_length": 77, "pad_token_id": -1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shape = model_shape(str(tmp_path))
    assert shape.max_position_embeddings == 77
    model = build(shape)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.pad_token_id is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2'"),
        ("[]", "model_type 'list'"),
        ('{"model_type": "llama", "hidden_size": "16"}', "hidden_size is '16'"),
    ],
)
def test_unusable_config_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        model_shape(str(path))
    assert str(path) in str(caught.value)


def test_shape_that_cannot_be_built_is_a_user_error(tmp_path: Path) -> None:
    raw = {"hidden_size": 15, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**raw, "model_type": "llama", "vocab_size": 50}))
    with pytest.raises(UserError, match="--model_config cannot be built"):
        build(model_shape(str(path)))
