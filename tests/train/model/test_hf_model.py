"""--hf_model: any causal language model goes on from its own weights, with its own tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galore_torch.train.commands.export import export
from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import load_data
from galore_torch.train.data.tokenize import choose_tokenizer
from galore_torch.train.data.tokenizer import trained_tokenizer
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import hf_shape, load_model


@pytest.fixture
def first_run(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> Path:
    """The model folder that a short pre-training leaves: weights and tokenizer."""
    assert pretrain(make_config(num_training_steps=20, lr=0.01)) == 0
    return tmp_path / "run" / "model"


def gpt2(folder: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=48, vocab_size=300)).save_pretrained(folder)
    return str(folder)


def test_training_goes_on_where_the_weights_stand(first_run: Path, make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """The perplexity before the second run is the one after the first: same weights, same tokenizer, same validation text."""
    again = make_config(model_config="demo", hf_model=str(first_run), save_dir=str(tmp_path / "again"), optimizer="galore_adamw", rank=4)
    assert pretrain(again) == 0
    (before,) = json.loads((first_run.parent / "summary.json").read_text())
    (after,) = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert after["perplexity_before"] == pytest.approx(before["perplexity_after"], rel=1e-5)
    assert after["perplexity_after"] != after["perplexity_before"]


def test_tokenizer_that_is_too_large_for_the_model_names_the_cure(tmp_path: Path) -> None:
    """--vocab_size is no cure here: it is refused beside --hf_model."""
    trained_tokenizer(iter(["some words to make ids of"]), 300).fast.save_pretrained(tmp_path / "words")
    small = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(small))
    config = PretrainConfig(hf_model=str(tmp_path), tokenizer=str(tmp_path / "words"), max_length=16)
    with pytest.raises(UserError, match=f"leave --tokenizer out: {tmp_path} has its own") as caught:
        choose_tokenizer(config, lambda: iter(()))
    assert "--vocab_size" not in str(caught.value)


def test_other_families_are_trained_too(tmp_path: Path, make_config: Callable[..., PretrainConfig], first_run: Path) -> None:
    """GPT-2: other names in the config, Conv1D layers, tied embeddings."""
    config = make_config(
        hf_model=gpt2(tmp_path / "gpt2"),
        tokenizer=str(first_run),
        model_config="demo",
        optimizer="galore_adamw",
        save_dir=str(tmp_path / "more"),
    )
    assert (config.shape.hidden_size, config.shape.max_position_embeddings, config.embedding_rows) == (32, 48, 300)
    assert config.resolved_rank == 8
    assert load_data(config).vocab_size == 300
    assert pretrain(config) == 0
    assert json.loads((tmp_path / "more" / "model" / "config.json").read_text())["model_type"] == "gpt2"


def test_gpt2_trains_with_int8_weights(tmp_path: Path, make_config: Callable[..., PretrainConfig], first_run: Path) -> None:
    """Conv1D layers in INT8 beside a tied head; between the passes no more is kept than with floating weights."""
    kept = {}
    for optimizer in ("galore_adamw8bit", "qgalore_adamw8bit", "qgalore_adamw8bit_per_layer"):
        save_dir, start = tmp_path / optimizer, gpt2(tmp_path / "gpt2")
        settings: dict[str, Any] = {"optimizer": optimizer, "rank": 4, "save_dir": str(save_dir)}
        config = make_config(model_config="demo", hf_model=start, tokenizer=str(first_run), **settings)
        assert pretrain(config) == 0
        rows = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
        (kept[optimizer],) = [row["memory_mb"]["activations"] for row in rows if "memory_mb" in row]
    assert len(set(kept.values())) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "lora"])
def test_a_run_goes_on_where_transformers_renames_weights_on_their_way_to_a_file(
    tmp_path: Path, make_config: Callable[..., PretrainConfig], first_run: Path, optimizer: str
) -> None:
    """GPT-NeoX's head is lm_head in the model and embed_out on the hub. Oracle: the run's own weights, bit for bit, and as exported."""
    if optimizer == "lora":
        pytest.importorskip("peft", reason="lora needs the extra peft")
    from safetensors.torch import load_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=48)).save_pretrained(tmp_path / "neox")
    settings: dict[str, Any] = {"model_config": "demo", "hf_model": str(tmp_path / "neox"), "tokenizer": str(first_run)}
    settings |= {"optimizer": optimizer, "num_training_steps": 3, "save_every": 2, "save_dir": str(tmp_path / "more")}
    assert pretrain(make_config(**settings)) == 0
    file = tmp_path / "more" / "model" / "model.safetensors"
    trained = load_file(file)
    assert "embed_out.weight" in trained
    shutil.rmtree(tmp_path / "more" / "checkpoints" / "step-000003")
    shutil.rmtree(file.parent)
    assert pretrain(make_config(**settings, resume="auto")) == 0
    export(str(tmp_path / "more"), str(tmp_path / "exported"))
    for found in (load_file(file), load_file(tmp_path / "exported" / "model.safetensors")):
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def test_loaded_model_trains_in_its_dtype_with_recomputed_layers(tmp_path: Path) -> None:
    model = load_model(gpt2(tmp_path / "gpt2"), dtype="bfloat16", activation_checkpointing=True)
    assert model.training
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.config.use_cache
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_rotary_frequencies_of_a_loaded_model_stay_in_fp32(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    saved = LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16", activation_checkpointing=False)
    assert torch.equal(model.model.rotary_emb.inv_freq, saved.model.rotary_emb.inv_freq)


def test_length_is_checked_against_the_models_positions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max_length 64 is more than the 48 positions of .*gpt2"):
        PretrainConfig(hf_model=gpt2(tmp_path / "gpt2"), max_length=64)


@pytest.mark.parametrize("name", ["nowhere/at/all", "no-such-model"])
def test_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"--hf_model {name} is neither a folder with a model nor a name that the hub gives"):
        hf_shape(name)


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    gpt2(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model(str(folder), dtype="float32", activation_checkpointing=False)


def test_low_rank_would_throw_the_weights_away(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hf_model": gpt2(tmp_path / "gpt2"), "max_length": 16, "optimizer": "low_rank"}
    with pytest.raises(UserError, match="low_rank starts from random factors, not from the weights of --hf_model"):
        PretrainConfig(**settings)
