"""What a run needs to go on as if it had never stopped: what is saved, and where to start.

A checkpoint holds, beside the weights and tokenizer that `AutoModelForCausalLM` and `AutoTokenizer` load:
optimizer.safetensors and .json, trainer.json (position, counters, random generators, settings), and the metrics so far. Weights held as
INT8 are in the first file as ordinary numbers, and as they are in int8.safetensors and .json. A run whose processes hold parts of the
weights has those, and all tensors of the optimizer, in distributed/ (parts.py).
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_torch import __version__
from galore_torch.train.checkpoint import parts
from galore_torch.train.checkpoint.lock import LOCK
from galore_torch.train.checkpoint.storage import (
    TRAINER,
    BrokenCheckpoint,
    checkpoints_in,
    load_tree,
    newest_whole,
    read_trainer,
    save_tree,
    step_of,
    verify,
    whole_folder,
)
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.sampler import Lanes
from galore_torch.train.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

METRICS = "metrics.jsonl"
TRACKED = "trackers.json"  # the names of this run at the services it is sent to
BEST = "best"  # the folder of the checkpoint whose score was the best
_WEIGHTS, _OPTIMIZER, INT8 = "model.safetensors", "optimizer", "int8"


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
    others = sorted({path.parent.name for path in folder.glob(f"*/{METRICS}")} - set(config.run_names))
    if config.compare and others:  # what lies beside the runs' folders is written anew, with those of this call alone
        raise UserError(
            f"--resume auto: {folder} also compares {', '.join(others)}, whose records would be lost; name all in --compare, or give "
            "another --save_dir"
        )
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


def bring(step: int, start: Path, folder: Path, *, copy: bool) -> bool:
    """Whether the run that the checkpoint `start` is of has a whole one of `step`; `copy`: which is copied into `folder`."""
    name = f"step-{step:06d}"
    for found in (start.resolve().parent.with_name(BEST) / name, start.resolve().with_name(name)):
        with suppress(BrokenCheckpoint):  # also one that is not there
            verify(found)
            if copy:
                folder.mkdir(exist_ok=True)
                with whole_folder(folder / name) as temporary:
                    shutil.copytree(found, temporary, dirs_exist_ok=True)
            return True
    return False


def run_folder(folder: Path, config: PretrainConfig, run_name: str) -> Path:
    """Where one run of `folder` keeps its files: a comparison has a folder for each."""
    return folder / run_name if config.compare else folder


# --- into a checkpoint, and back ------------------------------------------------------------------------------------------


def fill(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any, trainer: dict[str, Any], metrics: Path, device: str
) -> None:
    """Write the files of a checkpoint; `trainer` is what the loop wants back, plain values only.

    Of a model that is cut the other processes call `fill_parts` meanwhile.
    """
    if parts.is_cut(model):
        _save_description(model, folder)
        save_tree(folder / _OPTIMIZER, parts.without_tensors(optimizer.state_dict()))
        fill_parts(folder, model, optimizer)
    else:
        save_weights(model, folder, max_shard_size="100TB", **_own_names(model))  # one file, which `restore` reads
        if coded := _int8_weights(model):
            save_tree(folder / INT8, {name: weight.stored for name, weight in coded.items()})
        save_tree(folder / _OPTIMIZER, optimizer.state_dict())
    tokenizer.save_pretrained(folder)
    shutil.copyfile(metrics, folder / METRICS)
    record = trainer | {"random": _random_state(device), "made_with": made_with(device)}
    (folder / TRAINER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fill_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what this process holds of a model that is cut; all processes together, into one folder."""
    parts.save_parts(folder, model, optimizer.state_dict())


def _save_description(model: Any, folder: Path) -> None:
    """What the model is, without its weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _own_names(model: Any) -> dict[str, bool]:
    """Names of weights as the model has them, not as they were on the hub before transformers 5: `restore` knows no others."""
    import inspect

    knows = "save_original_format" in inspect.signature(model.save_pretrained).parameters
    return {"save_original_format": False} if knows else {}


def save_weights(model: Any, folder: Path, *, whole: Any = None, **options: Any) -> None:
    """The model as transformers saves it, INT8 weights as floating ones. Those are decoded on the way to the host: a GPU holds one more.

    `whole`: the state_dict of a model that is cut, put together.
    """
    decoded = {name: weight.dequantize().cpu() for name, weight in _int8_weights(model).items()}
    model.save_pretrained(folder, state_dict=whole or (model.state_dict() | decoded if decoded else None), **options)


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Path) -> list[dict[str, Any]]:
    """Put weights, optimizer and random generators back, replace the file `metrics`; returns its rows.

    Rows that a killed run wrote after its checkpoint are gone with that: the resumed run writes them again.
    """
    state = load_tree(checkpoint / _OPTIMIZER)
    if parts.has_parts(checkpoint):
        parts.load_weights(checkpoint, model)
        state = parts.load_state(checkpoint, state, optimizer)
    elif parts.is_cut(model):
        parts.cut_weights(checkpoint / _WEIGHTS, model)
        state = parts.cut_state(state, optimizer)
    else:
        _load_whole(checkpoint, model)
    _load_optimizer(optimizer, state)
    _set_random_state(read_trainer(checkpoint)["random"])
    partial = metrics.with_suffix(".tmp")
    shutil.copyfile(checkpoint / METRICS, partial)
    partial.replace(metrics)
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _load_whole(checkpoint: Path, model: nn.Module) -> None:
    from safetensors.torch import load_model

    load_model(model, checkpoint / _WEIGHTS)
    if coded := _int8_weights(model):
        for name, stored in load_tree(checkpoint / INT8).items():
            for held, saved in zip(coded[name].stored, stored, strict=True):
                held.copy_(saved)


def _int8_weights(model: nn.Module) -> dict[str, Any]:
    """name -> each weight that is held as INT8."""
    from galore_torch.ops.int8_weight import Int8Weight

    return {name: value for name, value in model.state_dict().items() if isinstance(value, Int8Weight)}


def read_position(checkpoint: Path) -> Lanes:
    """Where the lanes of the text go on, as the `state` of batches says it."""
    trainer = read_trainer(checkpoint)
    if "positions" not in trainer:  # of an older version, which read all text into memory
        return {0: {"sequences_drawn": trainer["sequences_drawn"]}}
    return dict(enumerate(trainer["positions"]))


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
