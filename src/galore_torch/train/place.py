"""What a run trains, and where: the model at its first weights, and the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from galore_torch.train.config import PretrainConfig
from galore_torch.train.data import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.hf_model import load_model
from galore_torch.train.model import build_model, model_shape

if TYPE_CHECKING:
    from torch import nn


def model_for(config: PretrainConfig, data: TokenData) -> nn.Module:
    """The seed's model with the tokenizer's end-of-text token and the settled vocabulary, or the one to go on from."""
    if config.hf_model:
        return load_model(config.hf_model, dtype=config.torch_dtype, activation_checkpointing=config.activation_checkpointing)
    return build_model(
        model_shape(config.model_config).with_vocab(data.vocab_size),
        seed=config.seed,
        dtype=config.torch_dtype,
        bos_token_id=data.tokenizer.fast.bos_token_id,
        eos_token_id=data.tokenizer.end_id,
        activation_checkpointing=config.activation_checkpointing,
    )


def pick_device(name: str) -> str:
    """'cpu' or 'cuda' for auto, cpu or cuda."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
