"""Sizes of models that people ask for, so that `galore plan` needs no network. Imports no torch and no transformers.

A row: name on the hub, family, fields of its published config.json where they differ from the family's defaults in transformers, and the
published number of parameters, which tests/train/model/test_known_models.py compares with the model that the fields make. The source of
a row is https://huggingface.co/NAME/blob/main/config.json; of gemma-3's larger models its text_config (the vision tower is left out).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """``parameters`` in billions; ``fields`` for transformers' `AutoConfig.for_model(family, **fields)`."""

    name: str
    family: str
    parameters: float
    fields: dict[str, Any]


def _row(name: str, family: str, parameters: float, sizes: tuple[int, int, int, int, int, int], **more: Any) -> KnownModel:
    """``sizes``: width, the MLP's width, layers, heads, key-value heads, vocabulary."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return KnownModel(name, family, parameters, dict(zip(keys, sizes, strict=True)) | more)


_L3: dict[str, Any] = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_Q25: dict[str, Any] = {"max_position_embeddings": 32768, "tie_word_embeddings": False}
_Q3: dict[str, Any] = {"max_position_embeddings": 40960, "head_dim": 128, "tie_word_embeddings": False}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_G3: dict[str, Any] = {"max_position_embeddings": 131072, "head_dim": 256}
_MISTRAL: dict[str, Any] = {"max_position_embeddings": 32768, "head_dim": 128}
_SMOL: dict[str, Any] = {"max_position_embeddings": 2048, "tie_word_embeddings": True}
_MLA: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_OSS: dict[str, Any] = {"head_dim": 64, "num_experts_per_tok": 4, "max_position_embeddings": 131072}

KNOWN_MODELS: tuple[KnownModel, ...] = (
    _row("meta-llama/Llama-2-7b-hf", "llama", 6.738, (4096, 11008, 32, 32, 32, 32000), max_position_embeddings=4096),
    _row("meta-llama/Llama-2-13b-hf", "llama", 13.016, (5120, 13824, 40, 40, 40, 32000), max_position_embeddings=4096),
    _row("meta-llama/Llama-3.2-1B", "llama", 1.236, (2048, 8192, 16, 32, 8, 128256), **{**_L3, **_TIED}, head_dim=64),
    _row("meta-llama/Llama-3.2-3B", "llama", 3.213, (3072, 8192, 28, 24, 8, 128256), **{**_L3, **_TIED}, head_dim=128),
    _row("meta-llama/Meta-Llama-3-8B", "llama", 8.030, (4096, 14336, 32, 32, 8, 128256), **{**_L3, "max_position_embeddings": 8192}),
    _row("meta-llama/Llama-3.1-8B", "llama", 8.030, (4096, 14336, 32, 32, 8, 128256), **_L3),
    _row("meta-llama/Llama-3.1-70B", "llama", 70.554, (8192, 28672, 80, 64, 8, 128256), **_L3),
    _row("meta-llama/Llama-3.3-70B-Instruct", "llama", 70.554, (8192, 28672, 80, 64, 8, 128256), **_L3),
    _row("TinyLlama/TinyLlama_v1.1", "llama", 1.100, (2048, 5632, 22, 32, 4, 32000), max_position_embeddings=2048),
    _row("Qwen/Qwen2.5-0.5B", "qwen2", 0.494, (896, 4864, 24, 14, 2, 151936), **{**_Q25, **_TIED}),
    _row("Qwen/Qwen2.5-1.5B", "qwen2", 1.544, (1536, 8960, 28, 12, 2, 151936), **{**_Q25, **_TIED}),
    _row("Qwen/Qwen2.5-3B", "qwen2", 3.086, (2048, 11008, 36, 16, 2, 151936), **{**_Q25, **_TIED}),
    _row("Qwen/Qwen2.5-7B", "qwen2", 7.616, (3584, 18944, 28, 28, 4, 152064), **_Q25),
    _row("Qwen/Qwen2.5-14B", "qwen2", 14.770, (5120, 13824, 48, 40, 8, 152064), **_Q25),
    _row("Qwen/Qwen2.5-32B", "qwen2", 32.764, (5120, 27648, 64, 40, 8, 152064), **_Q25),
    _row("Qwen/Qwen2.5-72B", "qwen2", 72.706, (8192, 29568, 80, 64, 8, 152064), **_Q25),
    _row("Qwen/Qwen3-0.6B", "qwen3", 0.596, (1024, 3072, 28, 16, 8, 151936), **{**_Q3, **_TIED}),
    _row("Qwen/Qwen3-1.7B", "qwen3", 1.721, (2048, 6144, 28, 16, 8, 151936), **{**_Q3, **_TIED}),
    _row("Qwen/Qwen3-4B", "qwen3", 4.022, (2560, 9728, 36, 32, 8, 151936), **{**_Q3, **_TIED}),
    _row("Qwen/Qwen3-8B", "qwen3", 8.191, (4096, 12288, 36, 32, 8, 151936), **_Q3),
    _row("Qwen/Qwen3-14B", "qwen3", 14.768, (5120, 17408, 40, 40, 8, 151936), **_Q3),
    _row("Qwen/Qwen3-32B", "qwen3", 32.762, (5120, 25600, 64, 64, 8, 151936), **_Q3),
    _row("Qwen/Qwen3-30B-A3B", "qwen3_moe", 30.532, (2048, 6144, 48, 32, 4, 151936), **_Q3, num_experts=128, moe_intermediate_size=768),
    _row("google/gemma-2-2b", "gemma2", 2.614, (2304, 9216, 26, 8, 4, 256000), head_dim=256),
    _row("google/gemma-2-9b", "gemma2", 9.242, (3584, 14336, 42, 16, 8, 256000), head_dim=256),
    _row("google/gemma-2-27b", "gemma2", 27.227, (4608, 36864, 46, 32, 16, 256000), head_dim=128),
    _row("google/gemma-3-270m", "gemma3_text", 0.268, (640, 2048, 18, 4, 1, 262144), head_dim=256, max_position_embeddings=32768),
    _row("google/gemma-3-1b-pt", "gemma3_text", 1.000, (1152, 6912, 26, 4, 1, 262144), head_dim=256, max_position_embeddings=32768),
    _row("google/gemma-3-4b-pt", "gemma3_text", 3.880, (2560, 10240, 34, 8, 4, 262208), **_G3),
    _row("google/gemma-3-12b-pt", "gemma3_text", 11.766, (3840, 15360, 48, 16, 8, 262208), **_G3),
    _row("google/gemma-3-27b-pt", "gemma3_text", 27.009, (5376, 21504, 62, 32, 16, 262208), **{**_G3, "head_dim": 128}),
    _row("mistralai/Mistral-7B-v0.1", "mistral", 7.242, (4096, 14336, 32, 32, 8, 32000), **_MISTRAL),
    _row("mistralai/Mistral-7B-v0.3", "mistral", 7.248, (4096, 14336, 32, 32, 8, 32768), **_MISTRAL),
    _row("mistralai/Mistral-Nemo-Base-2407", "mistral", 12.248, (5120, 14336, 40, 32, 8, 131072), **_MISTRAL),
    _row("mistralai/Mistral-Small-24B-Base-2501", "mistral", 23.572, (5120, 32768, 40, 32, 8, 131072), **_MISTRAL),
    _row("mistralai/Mixtral-8x7B-v0.1", "mixtral", 46.703, (4096, 14336, 32, 32, 8, 32000), max_position_embeddings=32768),
    _row("mistralai/Mixtral-8x22B-v0.1", "mixtral", 140.621, (6144, 16384, 56, 48, 8, 32000), max_position_embeddings=65536),
    _row("microsoft/Phi-3-mini-4k-instruct", "phi3", 3.821, (3072, 8192, 32, 32, 32, 32064), max_position_embeddings=4096),
    _row("microsoft/Phi-3-medium-4k-instruct", "phi3", 13.960, (5120, 17920, 40, 40, 10, 32064), max_position_embeddings=4096),
    _row("microsoft/phi-4", "phi3", 14.660, (5120, 17920, 40, 40, 10, 100352), max_position_embeddings=16384),
    _row("microsoft/Phi-4-mini-instruct", "phi3", 3.836, (3072, 8192, 32, 24, 8, 200064), **_TIED, max_position_embeddings=4096),
    _row("HuggingFaceTB/SmolLM-135M", "llama", 0.1345, (576, 1536, 30, 9, 3, 49152), **_SMOL),
    _row("HuggingFaceTB/SmolLM-360M", "llama", 0.3618, (960, 2560, 32, 15, 5, 49152), **_SMOL),
    _row("HuggingFaceTB/SmolLM-1.7B", "llama", 1.711, (2048, 8192, 24, 32, 32, 49152), **_SMOL),
    _row("HuggingFaceTB/SmolLM2-135M", "llama", 0.1345, (576, 1536, 30, 9, 3, 49152), **{**_SMOL, "max_position_embeddings": 8192}),
    _row("HuggingFaceTB/SmolLM2-360M", "llama", 0.3618, (960, 2560, 32, 15, 5, 49152), **{**_SMOL, "max_position_embeddings": 8192}),
    _row("HuggingFaceTB/SmolLM2-1.7B", "llama", 1.711, (2048, 8192, 24, 32, 32, 49152), **{**_SMOL, "max_position_embeddings": 8192}),
    _row("HuggingFaceTB/SmolLM3-3B", "smollm3", 3.075, (2048, 11008, 36, 16, 4, 128256), **_TIED),
    _row("allenai/OLMo-1B-hf", "olmo", 1.177, (2048, 8192, 16, 16, 16, 50304), **_TIED),
    _row("allenai/OLMo-7B-hf", "olmo", 6.888, (4096, 11008, 32, 32, 32, 50304)),
    _row("allenai/OLMo-2-0425-1B", "olmo2", 1.485, (2048, 8192, 16, 16, 16, 100352), max_position_embeddings=4096),
    _row("allenai/OLMo-2-1124-7B", "olmo2", 7.299, (4096, 11008, 32, 32, 32, 100352), max_position_embeddings=4096),
    _row("allenai/OLMo-2-1124-13B", "olmo2", 13.716, (5120, 13824, 40, 40, 40, 100352), max_position_embeddings=4096),
    _row("allenai/OLMo-2-0325-32B", "olmo2", 32.234, (5120, 27648, 64, 40, 8, 100352), max_position_embeddings=4096),
    _row(
        *("deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2", 15.706, (2048, 10944, 27, 16, 16, 102400)),
        **{**_MLA, "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        max_position_embeddings=163840,
    ),
    _row(
        *("deepseek-ai/DeepSeek-V3-Base", "deepseek_v3", 671.026, (7168, 18432, 61, 128, 128, 129280)),
        **{**_MLA, "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        max_position_embeddings=163840,
    ),
    _row("openai/gpt-oss-20b", "gpt_oss", 20.915, (2880, 2880, 24, 64, 8, 201088), **_OSS, num_local_experts=32),
    _row("openai/gpt-oss-120b", "gpt_oss", 116.829, (2880, 2880, 36, 64, 8, 201088), **_OSS, num_local_experts=128),
    KnownModel("openai-community/gpt2", "gpt2", 0.1244, {}),
    KnownModel("openai-community/gpt2-xl", "gpt2", 1.5576, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
)
_ENDINGS = ("-hf", "-base", "-instruct", "-it", "-pt", "-chat")  # of names that share one architecture


def known_model(name: str) -> KnownModel | None:
    """The row of a hub name, with or without its owner, in any case: "Qwen/Qwen3-8B", "qwen3-8b", "Llama-3.1-8B-Instruct", "mistral 7b"."""
    owner, _, own = name.lower().replace(" ", "-").rpartition("/")
    for row in KNOWN_MODELS:
        its_owner, _, its = row.name.lower().rpartition("/")
        stem = _stem(its)
        if owner in ("", its_owner) and _stem(own) in (stem, re.sub(r"-v\d\.\d$", "", stem)):
            return row
    return None


def _stem(name: str) -> str:
    name = name.replace("_", "-").removeprefix("meta-")
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def did_you_mean(name: str, known: list[str]) -> str:
    """'; did you mean a, b?' or an empty text."""
    names = {own.lower(): own for full in known for own in (full.rpartition("/")[2],)}
    close = get_close_matches(name.lower().rpartition("/")[2], names, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(names[key] for key in close)}?" if close else ""
