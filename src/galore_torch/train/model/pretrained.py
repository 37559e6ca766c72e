"""A causal language model that exists already: a transformers folder, or a name on the hub. transformers is imported late."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.llama import finish

# Keys of a config that are written anew at each saving, or do not change what the layers compute.
_HOW_IT_IS_RUN = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"})


@dataclass(frozen=True)
class HFShape:
    """What the settings are checked against."""

    hidden_size: int
    max_position_embeddings: int
    vocab_size: int


@lru_cache(maxsize=8)
def hf_shape(name: str) -> HFShape:
    """Width, positions and vocabulary of the model `name`, from its config alone."""
    config = _config(name).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize  # some families have no limit
    return HFShape(config.hidden_size, positions, config.vocab_size)


def hf_architecture(name: str) -> dict[str, Any]:
    """What the config of the model `name` says of its layers; not where it lies, nor how it is run."""
    return {key: value for key, value in _config(name).to_dict().items() if key not in _HOW_IT_IS_RUN}


def load_model(name: str, *, dtype: str, activation_checkpointing: bool, layers: int | None = None) -> Any:
    """The model with its weights on the CPU, ready to train; inside `torch.device("meta")` without weights, and with so many layers."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        if torch.get_default_device().type == "meta":
            model = AutoModelForCausalLM.from_config(_shortened(_config(name), layers))
        else:
            model = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_model {name} cannot be loaded as a causal language model: {first_line(error)}") from error
    model.config.use_cache = False
    return finish(model.train(), dtype=dtype, activation_checkpointing=activation_checkpointing)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_model {name} is neither a folder with a model nor a name that the hub gives: {first_line(error)}") from error


def _shortened(config: Any, layers: int | None) -> Any:
    text = config.get_text_config()
    if layers is not None:
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = [kinds[-1]] * layers
        text.num_hidden_layers = layers
    return config


def quiet_transformers() -> None:
    """No warnings and progress bars of transformers between what a command says."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
