"""What makes a run the same run: every setting that decides its weights or their scores, as a checkpoint records it, and what another
one may differ in."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from galore_torch.train.checkpoint.storage import read_trainer
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.declare import PUBLISHED
from galore_torch.train.data.loader import Data
from galore_torch.train.data.tasks import TaskData
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import hf_architecture
from galore_torch.train.optimizers.registry import optimizer_spec, own_settings, unused_flags

# Settings that a resumed run may change: they move no weight. All of the group "run" are such, too.
_FREE = frozenset({"device", "activation_checkpointing", "workers", "find_lr"})
# Settings that say what another one of these settings holds.
_SAME = frozenset({"gradient_accumulation", "max_train_tokens"})
# Settings that are compared by what they amount to.
_TOGETHER = frozenset({"processes", "batch_size"})  # compared as one number, where it matters
_AMOUNT = frozenset(
    {
        *("model_config", "vocab_size", "data", "eval_data", "tokenizer", "text_field", "optimizer", "compare", "lr"),
        *("data_dir", "train_file", "validation_file", "text_columns"),
    }
)


def identity(config: PretrainConfig, name: str, lr: float, data: Data) -> dict[str, Any]:
    """Everything that decides the weights of a run, and of a task their scores, by flag, as JSON has it.

    Text in memory counts by its tokens, streamed text by its name: the names and sizes of its files.
    """
    settings: dict[str, Any] = {"processes": config.processes}
    settings |= {
        item.name: getattr(config, item.name)
        for item in fields(config)
        if item.metadata.get("group") not in (None, "run", "processes", PUBLISHED) and item.name not in _FREE | _AMOUNT | _SAME
    }
    settings |= {
        "optimizer": name,
        "lr": lr,
        "dtype": config.torch_dtype,
        "rank": config.resolved_rank,
        "proj_type": config.resolved_proj_type,
        "total_batch_size": config.sequences_per_update,
        "warmup_steps": config.warmup,
        "gradients": config.gradients_of(name),
        "model_config": asdict(config.shape) | {"vocab_size": data.vocab_size},
        "data": data.fingerprint,
    }
    if isinstance(data, TaskData):
        settings["held_out"] = data.held_out_fingerprint
    settings |= {key: value for key, value in config.optimizer_settings.items() if key.startswith("lora_")}
    return dict(json.loads(json.dumps(settings)))


def check_identity(checkpoint: Path, config: PretrainConfig, ours: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that would have made it another run.

    Compared is what they amount to: a default that is given by name is no change, nor what the optimizer does not use.
    """
    saved, name = read_trainer(checkpoint)["identity"], ours["optimizer"]
    derived = config.derived_steps | own_settings(name, config.dtype, config.usual)
    unused, defaults = unused_flags(name, ours), {item.name: item.default for item in fields(config)}
    defaults["gradients"] = "project" if optimizer_spec(name).per_layer else "full"  # before there was the setting
    _check_forward_pass(checkpoint, config, saved, ours)
    for flag, value in ours.items():
        was = saved.get(flag, defaults.get(flag, value))  # a setting younger than the checkpoint had its default
        if flag in unused or flag in _TOGETHER or was == value or _settled(was, flag, derived) == _settled(value, flag, derived):
            continue
        if flag == "gradients" and not (config.deferred and "full" in (was, value)):
            continue  # the same numbers but for rounding; not where whole gradients are clipped, or averaged before a basis is found
        if flag == "data":
            where, *others, last = (f"--{name}" for name in config.data_flags)
            raise UserError(
                f"{where} gives {value}, but {checkpoint} was trained on {was}; give the same {', '.join(['text', *others])} and {last}, "
                "or start a new run without --resume"
            )
        if flag == "held_out":
            raise UserError(
                f"the examples to evaluate on are {value}, but {was} in {checkpoint}, so its scores would be of two sets; give the same "
                "--validation_file or --data_dir, or start a new run without --resume"
            )
        if flag == "proj_type" and config.sharded:
            raise UserError(
                f"--parallel {config.parallel} keeps bases on the columns, and {checkpoint} was trained with --proj_type {was}; go on with "
                "--parallel ddp, or start a new run without --resume"
            )
        if flag == "hf_model" and value and was:
            _check_architecture(checkpoint, value)
            continue
        if flag == "model_config":
            part = next(key for key in value if value[key] != was.get(key))
            flag, was, value = f"model_config ({part})", was.get(part), value[part]
        was, value = (_settled(either, flag, derived) for either in (was, value))
        cure = "leave it out" if was in (None, False, (), []) else f"give {was}"
        raise UserError(
            f"--{flag} is {value}, but {was} in {checkpoint}, which would change the run; {cure}, or start a new run without --resume"
        )


def _check_forward_pass(checkpoint: Path, config: PretrainConfig, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse another number of sequences in one forward pass of all processes, where more than the sum of gradients depends on it.

    A low-rank gradient that is added up gets its basis from the first pass of a step, and a task's batches are made of like lengths.
    """
    was, now = (record["batch_size"] * record.get("processes", 1) for record in (saved, ours))
    low_rank = {saved.get("gradients"), ours["gradients"]} != {"full"}
    if was != now and (low_rank or config.sorts_batches):
        raise UserError(
            f"--batch_size {ours['batch_size']} in {ours['processes']} processes is {now} sequences at once, and {was} in {checkpoint}, "
            f"which would change the run; give a --batch_size that makes {was}, or start a new run without --resume"
        )


def _settled(value: Any, flag: str, derived: dict[str, Any]) -> Any:
    return derived.get(flag) if value is None else value


def _check_architecture(checkpoint: Path, name: str) -> None:
    """Refuse an --hf_model of other layers than the checkpoint's. Where it lies is free: the weights are the checkpoint's."""
    theirs, ours = hf_architecture(str(checkpoint)), hf_architecture(name)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"--hf_model {name} has {key} {ours.get(key)}, but {theirs.get(key)} in {checkpoint}; give the model that the run "
                "began with, or start a new run without --resume"
            )
