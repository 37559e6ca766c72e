"""LLaMA models by name or config file. Shapes are plain data; transformers is imported late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_torch.train.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DEMO_VOCAB = 2048  # of the byte-level BPE that the demo trains when no tokenizer is given


@dataclass(frozen=True)
class ModelShape:
    """What LlamaConfig needs. `vocab_size` None: as large as the tokenizer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    vocab_size: int | None = 32000
    extras: tuple[tuple[str, Any], ...] = ()  # further keys of a config file, passed through

    def with_vocab(self, vocab_size: int | None) -> ModelShape:
        return self if vocab_size is None else replace(self, vocab_size=vocab_size)


# The published sizes (hidden, intermediate, layers, heads), vocabulary 32000, 1024 positions.
PRESETS: dict[str, ModelShape] = {
    "demo": ModelShape(128, 352, 4, 4, vocab_size=None),
    "9m": ModelShape(128, 352, 4, 4),
    "20m": ModelShape(256, 688, 4, 4),
    "35m": ModelShape(384, 1024, 6, 8),
    "40m": ModelShape(416, 1024, 8, 8),
    "60m": ModelShape(512, 1376, 8, 8),
    "71m": ModelShape(512, 1368, 12, 8),
    "100m": ModelShape(640, 1708, 12, 10, vocab_size=32100),
    "130m": ModelShape(768, 2048, 12, 12),
    "250m": ModelShape(768, 2560, 24, 16),
    "350m": ModelShape(1024, 2736, 24, 16),
    "1b": ModelShape(2048, 5461, 24, 32),
    "3b": ModelShape(2560, 6848, 32, 32),
    "7b": ModelShape(4096, 11008, 32, 32, max_position_embeddings=2048),
    # Llama 3 8B (arXiv 2407.21783, table 3): 8 key-value heads, vocabulary 128256.
    "llama3-8b": ModelShape(
        *(4096, 14336, 32, 32, 8192, 128256),
        extras=(("num_key_value_heads", 8), ("rms_norm_eps", 1e-5), ("rope_theta", 500000.0)),
    ),
}

_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys of a config file that pass through to LlamaConfig as they are.
_EXTRA_KEYS = (
    *("num_key_value_heads", "head_dim", "hidden_act", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_theta", "rope_parameters", "rope_scaling"),
    *("attention_bias", "attention_dropout", "mlp_bias"),
)


def preset_name(name: str) -> str | None:
    """The preset that `name` means, in any case: 60m, llama_60m, or configs/llama_60m.json where there is no such file; else None."""
    key = name.lower()
    if key in PRESETS:
        return key
    if Path(name).exists() or ("/" in key and not key.endswith(".json")):
        return None
    stem = Path(key).name.removesuffix(".json").removeprefix("llama_").removeprefix("llama-").replace("_", "-")
    return stem if stem in PRESETS else None


def model_shape(name: str) -> ModelShape:
    """The shape for a preset name, a LLaMA config.json, or a folder that holds one."""
    if preset := preset_name(name):
        return PRESETS[preset]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        near = did_you_mean(name, PRESETS)
        raise UserError(f"--model_config {name!r} is neither a preset nor a config file that exists; {near}presets: {', '.join(PRESETS)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--model_config {path} is not valid JSON: {error}") from error
    return _shape_from_json(path, raw)


def _shape_from_json(path: Path, raw: Any) -> ModelShape:
    kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    if kind != "llama":
        raise UserError(
            f'--model_config {path} has model_type {kind!r}; this command builds LlamaForCausalLM: give a config with model_type "llama"'
        )
    numbers = {}
    for key in (*_SHAPE_KEYS, "vocab_size"):
        value = raw.get(key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"--model_config {path}: {key} is {value!r}; it must be a whole number >= 1")
        numbers[key] = value
    # The published configs name the sequence length max_sequence_length.
    positions = raw.get("max_position_embeddings", raw.get("max_sequence_length", 1024))
    extras = tuple((key, raw[key]) for key in _EXTRA_KEYS if raw.get(key) is not None)
    return ModelShape(**numbers, max_position_embeddings=positions, extras=extras)


def build_model(
    shape: ModelShape,
    *,
    seed: int,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | None,
    activation_checkpointing: bool,
) -> LlamaForCausalLM:
    """A freshly initialised model on the CPU; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert shape.vocab_size is not None, "the tokenizer settles the vocabulary before this"
    torch.manual_seed(seed)
    try:
        config = LlamaConfig(
            **{key: getattr(shape, key) for key in _SHAPE_KEYS},
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.max_position_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=None,
            use_cache=False,
            **dict(shape.extras),
        )
        with default_dtype(dtype):  # a 7B in fp32 would not fit where its bf16 weights do
            model = LlamaForCausalLM(config)
    except Exception as error:  # transformers 5 wraps the ValueError of a bad shape in a class of its own
        raise UserError(f"--model_config cannot be built: {error.__cause__ or error}") from error
    return finish(model, dtype=dtype, activation_checkpointing=activation_checkpointing)


def finish(model: Any, *, dtype: str, activation_checkpointing: bool) -> Any:
    """The same model, its parameters in their dtype, its layers recomputed in the backward pass where that is asked for.

    Buffers keep theirs: rotary frequencies in bf16 would be off by up to half a radian after 256 positions.
    """
    import torch

    if activation_checkpointing:
        # transformers 5 renamed it, and warns about the old name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """New tensors are of this dtype where they name none."""
    import torch

    kept = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(kept)
