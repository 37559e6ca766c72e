"""What a run trains: the model at its first weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.loader import Data
from galore_torch.train.data.tasks import TaskData
from galore_torch.train.model.freeze import freeze
from galore_torch.train.model.heads import load_classifier
from galore_torch.train.model.llama import build_model, model_shape
from galore_torch.train.model.pretrained import load_model

if TYPE_CHECKING:
    from torch import nn


def model_for(config: PretrainConfig, data: Data) -> nn.Module:
    """The seed's model with the tokenizer's end-of-text token and the settled vocabulary, or the one to go on from."""
    if isinstance(config, FinetuneConfig):
        assert isinstance(data, TaskData)
        return _fine_tuned(config, data)
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


def _fine_tuned(config: FinetuneConfig, data: TaskData) -> nn.Module:
    """The pre-trained model, with a new head where the task has classes or numbers; then the random numbers begin anew, with the seed."""
    import torch

    assert config.hf_model is not None
    model: Any
    how: Any = {"dtype": config.torch_dtype, "activation_checkpointing": config.activation_checkpointing}
    if data.labels is None:
        model = load_model(config.hf_model, **how)
    else:
        model = load_classifier(config.hf_model, data.labels, seed=config.seed, **how)
        model.config.pad_token_id = data.tokenizer.fast.pad_token_id
    freeze(model, config.freeze)
    torch.manual_seed(config.seed)  # dropout does not depend on what the head drew
    trained: nn.Module = model
    return trained
