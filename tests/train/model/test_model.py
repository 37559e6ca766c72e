"""Presets have the published parameter counts; config files are read, and refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch.train.errors import UserError
from galore_torch.train.model.llama import PRESETS, build_model, model_shape
from support.memory import peak_bytes

# Millions of parameters of the published configs at vocabulary 32,000 (100m: 32,100).
SIZES = "9m 20m 35m 40m 60m 71m 100m 130m 250m 350m 1b 3b 7b"
MILLIONS = (9.00, 19.55, 35.20, 42.39, 58.07, 70.58, 100.12, 134.11, 247.37, 367.97, 1339.08, 2685.83, 6738.42)
PUBLISHED = dict(zip(SIZES.split(), MILLIONS, strict=True))


def build(shape: Any, seed: int = 0, **changes: Any) -> Any:
    settings = {"dtype": "float32", "bos_token_id": None, "eos_token_id": 0, "activation_checkpointing": False}
    return build_model(shape, seed=seed, **(settings | changes))


# Of these, millions in the attention and MLP matrices, and in embedding and head.
PROJECTED = (0.80, 3.16, 10.62, 15.76, 25.30, 37.80, 59.01, 84.93, 198.18, 302.38, 1207.91, 2521.83, 6476.01)
ENDS = (8.19, 16.38, 24.58, 26.62, 32.77, 32.77, 41.09, 49.15, 49.15, 65.54, 131.07, 163.84, 262.14)
PARTS = dict(zip(SIZES.split(), zip(PROJECTED, ENDS, strict=True), strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = build(model_shape(name))
    sizes = {key: p.numel() / 1e6 for key, p in model.named_parameters()}
    assert sum(sizes.values()) == pytest.approx(PUBLISHED[name], abs=0.005)
    layers = sum(size for key, size in sizes.items() if "self_attn" in key or "mlp" in key)
    assert (layers, sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"]) == pytest.approx(PARTS[name], abs=0.006)


def test_llama3_8b_is_the_published_model() -> None:
    """8,030,261,248 parameters, four queries to a key, positions turned at base 500,000."""
    with torch.device("meta"):
        model = build(model_shape("llama3-8b"))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert tuple(model.model.layers[0].self_attn.k_proj.weight.shape) == (1024, 4096)
    assert (model.config.rope_parameters["rope_theta"], model.config.rms_norm_eps, model.config.vocab_size) == (500000.0, 1e-5, 128256)


def test_every_preset_is_counted() -> None:
    assert set(PUBLISHED) | {"demo", "llama3-8b"} == set(PRESETS)


@pytest.mark.parametrize("name", ["60M", "llama_60m", "LLaMA-60m", "configs/llama_60m.json", "llama_60m.json"])
def test_published_names_mean_the_preset(name: str) -> None:
    assert model_shape(name) == PRESETS["60m"]


def test_file_that_is_there_wins_over_the_preset(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "llama_60m.json"
    model_file.rename(path)
    assert model_shape(str(path)).hidden_size == 16


def test_folder_in_the_name_of_a_preset_is_no_preset() -> None:
    with pytest.raises(UserError, match="neither a preset nor a config file"):
        model_shape("mine/60m")


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


def test_dtype_is_the_weights_and_not_the_rotary_frequencies(model_file: Path) -> None:
    model = build(model_shape(str(model_file)), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frequencies = build(model_shape(str(model_file))).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert torch.get_default_dtype() == torch.float32


def test_building_in_bf16_takes_no_memory_beyond_the_weights() -> None:
    """The whole model in fp32 first would take three times as much."""
    built: list[nn.Module] = []
    shape = replace(PRESETS["9m"], num_hidden_layers=12)
    peak = peak_bytes(lambda: built.append(build(shape, dtype="bfloat16")))
    weights = sum(p.nbytes for p in built[0].parameters())
    assert weights <= peak < 1.1 * weights


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
