"""A causal language model that exists already: a transformers folder, or a name on the hub. transformers is imported late."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.known_models import known_model
from galore_torch.train.model.llama import finish

# Keys of a config that are written anew at each saving, or do not change what the layers compute.
_HOW_IT_IS_RUN = frozenset(
    {
        *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"),
        *("id2label", "label2id", "problem_type", "pad_token_id"),  # of the head that a task adds
    }
)


@dataclass(frozen=True)
class HFShape:
    """What the settings are checked against."""

    hidden_size: int
    max_position_embeddings: int
    vocab_size: int


@lru_cache(maxsize=8)
def hf_shape(name: str) -> HFShape:
    """Width, positions and vocabulary of the model `name`, from its config alone."""
    try:
        config = sketch(name).get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or sys.maxsize  # some families have no limit
        return HFShape(config.hidden_size, positions, config.vocab_size)
    except (AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--hf_model {name} is not one language model by its config: {first_line(error)}") from error


def hf_architecture(name: str) -> dict[str, Any]:
    """What the config of the model `name` says of its layers; not where it lies, nor how it is run."""
    return {key: value for key, value in _config(name).to_dict().items() if key not in _HOW_IT_IS_RUN}


def load_model(name: str, *, dtype: str, activation_checkpointing: bool, layers: int | None = None) -> Any:
    """The model with its weights on the CPU, ready to train; inside `torch.device("meta")` without weights, and with so many layers."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        if torch.get_default_device().type == "meta":
            model = AutoModelForCausalLM.from_config(_shortened(sketch(name), layers))
        else:
            model = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_model {name} cannot be loaded as a causal language model: {first_line(error)}") from error
    model.config.use_cache = False
    return finish(model.train(), dtype=dtype, activation_checkpointing=activation_checkpointing)


def model_folder(name: str) -> str:
    """The folder where `name` is the config.json in it, else `name`."""
    path = Path(name)
    return str(path.parent) if path.name == "config.json" and path.is_file() else name


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_model {name} is neither a folder with a model nor a name that the hub gives: {first_line(error)}") from error


def sketch(name: str) -> Any:
    """The config; of a model whose sizes are known, from the table and without a network: it gives the same shapes."""
    row = None if Path(name).exists() else known_model(name)
    if row is None:
        return _config(name)
    from transformers import AutoConfig

    return AutoConfig.for_model(row.family, **row.fields)


def _shortened(config: Any, layers: int | None) -> Any:
    text = config.get_text_config()
    if layers is not None:
        for field in ("layer_types", "mlp_layer_types", "layers_block_type"):
            if kinds := getattr(text, field, None):
                with suppress(AttributeError):  # derived from others in some families
                    setattr(text, field, [kinds[-1]] * layers)
        if getattr(text, "first_k_dense_replace", None):  # DeepSeek's first layers have no experts
            text.first_k_dense_replace = 0
        text.num_hidden_layers = layers
    return config


def quiet_transformers() -> None:
    """No warnings and progress bars of transformers between what a command says."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
