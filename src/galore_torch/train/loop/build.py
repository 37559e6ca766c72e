"""What a run trains: the model at its first weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.model.llama import build_model, model_shape
from galore_torch.train.model.pretrained import load_model

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
