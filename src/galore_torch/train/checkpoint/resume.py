"""What a run needs to go on as if it had never stopped: what is saved, what has to match, where to start.

A checkpoint holds, beside the weights and tokenizer that `AutoModelForCausalLM` and `AutoTokenizer` load:
optimizer.safetensors and .json, trainer.json (position, counters, random generators, settings), and the metrics so far. Weights held as
INT8 are in the first file as ordinary numbers, and as they are in int8.safetensors and .json.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_torch import __version__
from galore_torch.train.checkpoint.lock import LOCK
from galore_torch.train.checkpoint.storage import checkpoints_in, load_tree, newest_whole, save_tree, step_of, verify
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.settings import PUBLISHED
from galore_torch.train.data.loader import Data
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import hf_architecture
from galore_torch.train.optimizers.registry import optimizer_spec, own_settings, unused_flags

if TYPE_CHECKING:
    import torch
    from torch import nn

METRICS = "metrics.jsonl"
TRACKED = "trackers.json"  # the names of this run at the services it is sent to
TRAINER = "trainer.json"
BEST = "best"  # the folder of the checkpoint whose score was the best
_OPTIMIZER, _INT8 = "optimizer", "int8"
# Settings that a resumed run may change: they move no weight. All of the group "run" are such, too.
_FREE = frozenset({"device", "activation_checkpointing", "workers", "find_lr"})
# Settings that say what another one of these settings holds.
_SAME = frozenset({"gradient_accumulation", "max_train_tokens"})
# Settings that are compared by what they amount to.
_AMOUNT = frozenset(
    {
        *("model_config", "vocab_size", "data", "eval_data", "tokenizer", "text_field", "optimizer", "compare", "lr"),
        *("data_dir", "train_file", "validation_file"),
    }
)


def identity(config: PretrainConfig, name: str, lr: float, data: Data) -> dict[str, Any]:
    """Everything that decides the weights of a run, by flag, as JSON has it.

    Text in memory counts by its tokens, streamed text by its name: the names and sizes of its files.
    """
    settings: dict[str, Any] = {"processes": config.processes}  # first: batches differ with it
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
        "total_batch_size": config.sequences_per_update,
        "warmup_steps": config.warmup,
        "gradients": config.gradients_of(name),
        "model_config": asdict(config.shape) | {"vocab_size": data.vocab_size},
        "data": data.fingerprint,
    }
    settings |= {key: value for key, value in config.optimizer_settings.items() if key.startswith("lora_")}
    return dict(json.loads(json.dumps(settings)))


def check_identity(checkpoint: Path, config: PretrainConfig, ours: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that would have made it another run.

    Compared is what they amount to: a default that is given by name is no change, nor what the optimizer does not use.
    """
    saved, name = read_trainer(checkpoint)["identity"], ours["optimizer"]
    derived = config.derived_steps | own_settings(name, config.dtype)
    unused, defaults = unused_flags(name, ours), {item.name: item.default for item in fields(config)}
    defaults["gradients"] = "project" if optimizer_spec(name).per_layer else "full"  # before there was the setting
    for flag, value in ours.items():
        was = saved.get(flag, defaults.get(flag, value))  # a setting younger than the checkpoint had its default
        if flag in unused or was == value or _settled(was, flag, derived) == _settled(value, flag, derived):
            continue
        if flag == "gradients" and not (config.deferred and "full" in (was, value)):
            continue  # the same numbers but for rounding; not where whole gradients are clipped, or averaged before a basis is found
        if flag == "data":
            raise UserError(
                f"--data gives {value}, but {checkpoint} was trained on {was}; give the same text, --eval_data and --tokenizer, "
                "or start a new run without --resume"
            )
        if flag == "hf_model" and value and was:
            _check_architecture(checkpoint, value)
            continue
        if flag == "processes":
            raise UserError(
                f"{checkpoint} was written by {was} processes, each with its own place in the text, and {value} run now; "
                f"give --nproc {was} or torchrun --nproc_per_node {was}, or start a new run without --resume"
            )
        if flag == "model_config":
            part = next(key for key in value if value[key] != was.get(key))
            flag, was, value = f"model_config ({part})", was.get(part), value[part]
        raise UserError(
            f"--{flag} is {value}, but {was} in {checkpoint}, which would change the run; give {was}, or start a new run without --resume"
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


@dataclass(frozen=True)
class Starts:
    """Where to go on: the run's folder (None: a new one is to be made), and the checkpoint of each run by its name."""

    folder: Path | None = None
    checkpoints: dict[str, Path] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # broken checkpoints newer than those, with what is wrong


def find_starts(config: PretrainConfig) -> Starts:
    """What --resume amounts to. Every checkpoint in it is whole; nothing has been changed."""
    if config.resume is None:
        return Starts()
    return _newest(config) if config.resume == "auto" else _named(config, Path(config.resume))


def _named(config: PretrainConfig, path: Path) -> Starts:
    verify(path)
    run = path.resolve().parent.parent
    if config.save_dir is not None and Path(config.save_dir).resolve() != run:
        return Starts(None, {config.run_names[0]: path})  # a branch: the new folder has to be empty
    if path.resolve().parent.name != "checkpoints":
        raise UserError(f"--resume {path} does not lie in a run's folder; name the folder to go on in with --save_dir")
    newer = [other.name for other in checkpoints_in(path.parent) if step_of(other) > step_of(path.resolve())]
    if newer:
        raise UserError(
            f"--resume {path}: the run has gone on to {newer[-1]}; go on from there with --save_dir {run} --resume auto, "
            "or branch off from here with another --save_dir"
        )
    return Starts(run, {config.run_names[0]: path})


def _newest(config: PretrainConfig) -> Starts:
    if config.save_dir is None:
        raise UserError("--resume auto looks for checkpoints in --save_dir; name the run's folder with it")
    folder = Path(config.save_dir)
    found: dict[str, Path] = {}
    skipped: list[str] = []
    for run_name in config.run_names:
        newest, broken = newest_whole(run_folder(folder, config, run_name) / "checkpoints")
        if newest is None and broken:
            raise UserError(f"--resume auto: none of {len(broken)} checkpoints is whole; {broken[0]}; give a new --save_dir to start again")
        skipped += broken
        if newest is not None:
            found[run_name] = newest
    return Starts(folder if found or _nothing_saved_yet(folder, config) else None, found, skipped)


def _nothing_saved_yet(folder: Path, config: PretrainConfig) -> bool:
    """Whether `folder` holds what a run leaves that was stopped before its first checkpoint, and nothing else."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    own = set(config.run_names) if config.compare else {METRICS, "checkpoints", BEST, TRACKED, *config.tracker}
    return "config.json" in names and names <= own | {"config.json", LOCK} and not any(folder.rglob("step-*"))


def run_folder(folder: Path, config: PretrainConfig, run_name: str) -> Path:
    """Where one run of `folder` keeps its files: a comparison has a folder for each."""
    return folder / run_name if config.compare else folder


# --- into a checkpoint, and back ------------------------------------------------------------------------------------------


def fill(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any, trainer: dict[str, Any], metrics: Path, device: str
) -> None:
    """Write the files of a checkpoint; `trainer` is what the loop wants back, plain values only."""
    save_weights(model, folder, max_shard_size="100TB", **_own_names(model))  # one file, which `restore` reads
    if coded := _int8_weights(model):
        save_tree(folder / _INT8, {name: weight.stored for name, weight in coded.items()})
    tokenizer.save_pretrained(folder)
    save_tree(folder / _OPTIMIZER, optimizer.state_dict())
    shutil.copyfile(metrics, folder / METRICS)
    record = trainer | {"random": _random_state(device), "made_with": made_with(device)}
    (folder / TRAINER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _own_names(model: Any) -> dict[str, bool]:
    """Names of weights as the model has them, not as they were on the hub before transformers 5: `restore` knows no others."""
    import inspect

    knows = "save_original_format" in inspect.signature(model.save_pretrained).parameters
    return {"save_original_format": False} if knows else {}


def save_weights(model: Any, folder: Path, **options: Any) -> None:
    """The model as transformers saves it, INT8 weights as floating ones. Those are decoded on the way to the host: a GPU holds one more."""
    decoded = {name: weight.dequantize().cpu() for name, weight in _int8_weights(model).items()}
    model.save_pretrained(folder, state_dict=model.state_dict() | decoded if decoded else None, **options)


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Path) -> list[dict[str, Any]]:
    """Put weights, optimizer and random generators back, replace the file `metrics`; returns its rows.

    Rows that a killed run wrote after its checkpoint are gone with that: the resumed run writes them again.
    """
    from safetensors.torch import load_model

    load_model(model, checkpoint / "model.safetensors")
    if coded := _int8_weights(model):
        for name, stored in load_tree(checkpoint / _INT8).items():
            for held, saved in zip(coded[name].stored, stored, strict=True):
                held.copy_(saved)
    _load_optimizer(optimizer, load_tree(checkpoint / _OPTIMIZER))
    _set_random_state(read_trainer(checkpoint)["random"])
    partial = metrics.with_suffix(".tmp")
    shutil.copyfile(checkpoint / METRICS, partial)
    partial.replace(metrics)
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _int8_weights(model: nn.Module) -> dict[str, Any]:
    """name -> each weight that is held as INT8."""
    from galore_torch.ops.int8_weight import Int8Weight

    return {name: value for name, value in model.state_dict().items() if isinstance(value, Int8Weight)}


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / TRAINER).read_text(encoding="utf-8")))


def read_position(checkpoint: Path, rank: int) -> dict[str, int]:
    """Where process `rank` goes on in the text, as the `state` of its batches."""
    trainer = read_trainer(checkpoint)
    if "positions" not in trainer:  # of an older version, which read all text into memory
        return {"sequences_drawn": trainer["sequences_drawn"]}
    return dict(trainer["positions"][rank])


def made_with(device: str) -> dict[str, Any]:
    """What the last bits of a result depend on, beside the settings."""
    import torch
    import transformers

    versions = {"galore-torch": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "device": device, "threads": torch.get_num_threads()}


def differences(checkpoints: Iterable[Path], device: str) -> list[str]:
    """Notes on what differs from the process that wrote the checkpoints."""
    ours, notes = made_with(device), []
    for checkpoint in checkpoints:
        theirs = read_trainer(checkpoint)["made_with"]
        notes += [f"{key} was {theirs.get(key)} and is {value} now" for key, value in ours.items() if theirs.get(key) != value]
    return [f"{note}: the run goes on, but not to the last bit" for note in dict.fromkeys(notes)]


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """load_state_dict, and again the tensors whose dtype it has changed to their parameter's."""
    import torch

    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            held = optimizer.state[parameter].get(key)  # not there: an older key, which has been converted
            if isinstance(value, torch.Tensor) and held is not None and held.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(held.device)


def _random_state(device: str) -> dict[str, Any]:
    import torch

    states = {"torch": torch.get_rng_state()}
    if device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def _set_random_state(saved: dict[str, str]) -> None:
    import torch

    states = {name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in saved.items()}
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
