"""A causal language model that exists already: a transformers folder, or a name on the hub. transformers is imported late."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
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
        positions = getattr(config, "max_position_embeddings", None) or 0
        # Some families have no limit, which XLNet says with -1.
        return HFShape(config.hidden_size, positions if positions > 0 else sys.maxsize, config.vocab_size)
    except (AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--hf_model {name} is not one language model by its config: {first_line(error)}") from error


@lru_cache(maxsize=8)
def hf_positions(name: str) -> int:
    """The positions that a text may take: all, or as in RoBERTa and its kin those behind the padding token's. By a look at one layer."""
    import torch
    from transformers import AutoModel

    positions = hf_shape(name).max_position_embeddings
    config = sketch(name).get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        return positions
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(_shortened(config, 1))
    except Exception:  # of families by the dozen; none that cannot be built so is known to have such positions
        return positions
    tables = [module for name, module in model.named_modules() if "position" in name and getattr(module, "padding_idx", None) is not None]
    learnt = [table for table in tables if (positions,) in [p.shape[:1] for p in table.parameters(recurse=False)]]
    return positions - max((table.padding_idx + 1 for table in learnt), default=0)


def reads_last_place(name: str) -> bool:
    """Whether a classifier made of the model answers by the last place, be it padding, so that padding belongs in front: XLNet."""
    return getattr(sketch(name).get_text_config(), "summary_type", None) == "last"


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
            model, found = AutoModelForCausalLM.from_pretrained(name, ignore_mismatched_sizes=True, output_loading_info=True)
            refuse_absent(f"--hf_model {name} is no whole causal language model", found)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_model {name} cannot be loaded as a causal language model: {first_line(error)}") from error
    model.config.use_cache = False
    return finish(model.train(), dtype=dtype, activation_checkpointing=activation_checkpointing)


def refuse_absent(what: str, found: Mapping[str, Any], new: Collection[str] = ()) -> None:
    """UserError where a model has weights that its files do not have, or have in another shape: it would begin at random there.

    `found`: what transformers says of the loading; `new`: names of the weights that may be new. Tied weights are not missing.
    """
    other_shape = (key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
    if absent := sorted({*found["missing_keys"], *other_shape}.difference(new)):
        raise UserError(
            f"{what}: {len(absent)} weights are missing or of another shape, such as {absent[0]}; give a folder whose "
            "config.json is that of its weights"
        )


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
