"""Where a run keeps its weights, and those weights as an ordinary transformers model. Reads only; changes nothing in a run.

A path may name a run's folder, one checkpoint, or any folder that holds a transformers model with safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from galore_torch.train.checkpoint.parts import has_parts
from galore_torch.train.checkpoint.parts import load_weights as load_parts
from galore_torch.train.checkpoint.resume import INT8, METRICS
from galore_torch.train.checkpoint.storage import MANIFEST, TRAINER, load_tree, newest_whole, read_trainer, verify
from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.freeze import freeze
from galore_torch.train.model.llama import finish
from galore_torch.train.model.pretrained import quiet_transformers, refuse_absent
from galore_torch.train.optimizers.registry import build_optimizer, optimizer_spec

_BASELINES = "galore_torch.train.model.baselines"  # their checkpoints hold layers that transformers does not know


def weights_folder(path: str) -> Path:
    """The folder with the weights that `path` means: of a run its newest whole checkpoint, else the folder itself.

    A checkpoint's checksums have been compared when this returns; broken ones of a run are named on stderr and passed over.
    UserError where there are no weights. Read the folder with `load_weights`: a baseline's checkpoint needs it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} {'is a file' if folder.exists() else 'does not exist'}; give a run's folder or a model's")
    if _is_checkpoint(folder):
        verify(folder)
        return folder
    if (folder / METRICS).is_file() or (folder / "checkpoints").is_dir():
        return _of_run(folder)
    if runs := sorted(child.parent.name for child in folder.glob(f"*/{METRICS}")):
        raise UserError(f"{path} is a folder of runs ({', '.join(runs)}); name one of them, such as {folder / runs[0]}")
    if not _holds_model(folder):
        raise UserError(
            f"{path} holds no weights: it is no run or checkpoint of galore pretrain, and no model's folder "
            "with config.json and safetensors"
        )
    return folder


def is_of_run(folder: Path) -> bool:
    """Whether a run of this package wrote the weights in `folder`: a checkpoint, or the model that a run left."""
    return _is_checkpoint(folder) or (folder.resolve().parent / METRICS).is_file()


def settings_of_run(folder: Path) -> dict[str, Any]:
    """Settings of the run that wrote the weights in `folder`; {} where no run says so. Those of `galore finetune` have a task_name."""
    own = dict(read_trainer(folder)["identity"]) if (folder / TRAINER).is_file() else {}
    for home in folder.resolve().parents[:3]:  # of a model, of a checkpoint; a comparison's config lies above its runs
        if is_of_run(folder) and (home / "config.json").is_file():
            return json.loads((home / "config.json").read_text(encoding="utf-8")) | own
    return own


def _of_run(run: Path) -> Path:
    newest, broken = newest_whole(run / "checkpoints")
    if newest is not None:
        for what in broken:
            print(f"galore: {what}; taking {newest}", file=sys.stderr)
        return newest
    if broken:
        raise UserError(f"{run}: none of {len(broken)} checkpoints is whole; {broken[0]}")
    if not _holds_model(run / "model"):
        raise UserError(f"{run} has no checkpoint yet; wait for one, or stop the run, which saves")
    return run / "model"  # the checkpoints were taken away after the run had ended


def _is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, or was meant to be one."""
    return any((folder / name).is_file() for name in (MANIFEST, TRAINER)) or folder.resolve().parent.name == "checkpoints"


def _holds_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and any(folder.glob("*.safetensors"))


def load_weights(folder: Path, *, classifiers: bool = False) -> Any:
    """The model in `folder`, as `weights_folder` gave it: on the CPU, in the dtype it was saved in, with ordinary layers. A causal language
    model; `classifiers`: or what galore finetune has made of one.

    What a baseline trained beside or in place of its matrices is multiplied out. UserError where the files are no whole model.
    """
    from safetensors import SafetensorError

    quiet_transformers()
    try:
        trained = read_trainer(folder)["identity"] if (folder / TRAINER).is_file() else None
        if trained is not None and (has_parts(folder) or optimizer_spec(trained["optimizer"]).home == _BASELINES):
            return _put_together(folder, trained)
        # The name of this argument before transformers 5 too; "auto" is the dtype in config.json.
        model, found = _auto_class(folder, classifiers).from_pretrained(
            folder, torch_dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded as a causal language model: {first_line(error)}") from error
    if trained is not None:
        vars(model).pop("_weight_conversions", None)  # a checkpoint has the model's own names; a file written from it those of the hub
    refuse_absent(f"{folder} is no whole model", found)
    return model.eval()


def hold_as_trained(model: Any, folder: Path) -> None:
    """Give the model that was loaded from `folder` the INT8 weights of a checkpoint that has them: the floating ones are rounded."""
    from torch import nn

    from galore_torch.ops.int8_weight import Int8Weight

    if (folder / f"{INT8}.json").is_file():
        for name, (codes, scale, offset) in load_tree(folder / INT8).items():
            layer, _, key = name.rpartition(".")
            weight = Int8Weight(codes, scale, offset, model.dtype)
            setattr(model.get_submodule(layer), key, nn.Parameter(weight, requires_grad=False))


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`; UserError where there is none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a file it cannot parse
        raise UserError(f"{folder} has no tokenizer that can be loaded: {first_line(error)}") from error
    for how_it_was_loaded in ("is_local", "local_files_only"):  # transformers 5 would save that too
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def _auto_class(folder: Path, classifiers: bool) -> Any:
    """transformers' class for what the folder's config says that its model is; UserError for a classifier where none may be."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classifies = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
    if classifies and not classifiers:
        raise UserError(f"{folder} holds a classifier, which answers with a class or a number and not with text; give a language model")
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def _put_together(checkpoint: Path, trained: dict[str, Any]) -> Any:
    """The model of a checkpoint that transformers cannot read: one in parts, or a baseline's, whose layers are changed as they were for
    training, filled, and changed back."""
    from safetensors.torch import load_model
    from transformers import AutoConfig, GenerationConfig

    from galore_torch.train.model.baselines import to_dense

    model = _auto_class(checkpoint, classifiers=True).from_config(AutoConfig.from_pretrained(checkpoint))
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    finish(model, dtype=trained["dtype"], activation_checkpointing=False)
    if has_parts(checkpoint):
        load_parts(checkpoint, model)
        return model.eval()
    freeze(model, tuple(trained.get("freeze", ())))  # what is frozen has no adapters
    build_optimizer(trained["optimizer"], model, lr=trained["lr"], settings=trained)  # also changes the layers
    load_model(model, checkpoint / "model.safetensors")
    return to_dense(model).eval()
