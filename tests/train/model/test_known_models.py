"""The table of known models against what transformers makes of it, and its names as people type them."""

from __future__ import annotations

import pytest
import torch

from galore_torch.train.model.known_models import KNOWN_MODELS, KnownModel, did_you_mean, known_model


@pytest.mark.parametrize("row", KNOWN_MODELS, ids=lambda row: row.name)
def test_fields_make_a_model_of_the_published_size(row: KnownModel) -> None:
    """The published number of parameters is the oracle; a wrong width, layer or tie misses it by more than .1 %."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(row.family, **row.fields))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(row.parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        *((row.name, row.name) for row in KNOWN_MODELS),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("Llama 3.1 8B", "meta-llama/Llama-3.1-8B"),
        ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B"),
        ("gemma-2-9b-it", "google/gemma-2-9b"),
        ("gemma-3-4b", "google/gemma-3-4b-pt"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("mixtral_8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("deepseek-v3", "deepseek-ai/DeepSeek-V3-Base"),
    ],
)
def test_names_as_they_are_typed(typed: str, name: str) -> None:
    row = known_model(typed)
    assert row is not None
    assert row.name == name


@pytest.mark.parametrize("typed", ["", "/", "qwen3", "qwen3-7b", "other/Qwen3-8B", "llama-3.1-8b-v2"])
def test_other_names_are_not_known(typed: str) -> None:
    assert known_model(typed) is None


def test_did_you_mean() -> None:
    assert "Qwen3-8B" in did_you_mean("Qwen3-8", [row.name for row in KNOWN_MODELS])
    assert did_you_mean("zzzz", ["7b"]) == ""
