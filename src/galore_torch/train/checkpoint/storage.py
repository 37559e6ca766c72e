"""Checkpoint folders: written whole or not at all, checked before they are used, bounded in number.

    checkpoints/step-000123/    the files of one step; manifest.json has the size and SHA-256 of each
    checkpoints/.tmp-...        being written, or left by a crash: never read, removed at the next save
Knows files and trees of tensors, not training. Nothing is pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galore_torch.train.errors import UserError

FORMAT, VERSION = "galore-torch checkpoint", 1
MANIFEST = "manifest.json"
TRAINER = "trainer.json"  # what the loop wants back
_TEMPORARY = ".tmp-"
_GO_ON = "go on from the last checkpoint with --resume auto"
_BLOCK = 1 << 20  # bytes hashed at once


class BrokenCheckpoint(UserError):
    """A checkpoint that is not whole: the text names the folder and what is wrong with it."""


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Make folder/step-<step> from the files that `fill` writes into the folder it is given; keep the newest `keep`.

    The files are on disk before the folder gets its name, and older checkpoints go after that: whenever the process dies,
    the last good one stands. UserError, and nothing left behind, where the disk is full or refuses.
    """
    target = folder / f"step-{step:06d}"
    with plain_failures(f"the checkpoint of step {step}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(_TEMPORARY + "*"):
            shutil.rmtree(left_over)
        with whole_folder(target) as temporary:
            fill(temporary)
            _seal(temporary, step)
            if target.exists():  # a broken one: whole ones are never made twice
                shutil.rmtree(target)
        for old in [path for path in checkpoints_in(folder) if step_of(path) <= step][:-keep]:
            # Renamed first: half a deleted checkpoint must not look like a broken one.
            shutil.rmtree(old.rename(folder / (_TEMPORARY + old.name)))
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `target` once the disk has all of it; nothing is left behind where that fails."""
    temporary = target.with_name(_TEMPORARY + target.name)
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    try:
        temporary.mkdir()
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            _sync(path)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(target.parent)


def verify(path: Path) -> None:
    """Read every byte of a checkpoint; BrokenCheckpoint where it is not what was written, UserError where it is not ours."""
    for name, size, digest in _manifest(path):
        file = path / name
        if not file.is_file():
            raise BrokenCheckpoint(f"{path} is broken: {name} is missing")
        if file.stat().st_size != size:
            raise BrokenCheckpoint(f"{path} is broken: {name} has {file.stat().st_size} bytes, {size} were written")
        if _sha256(file) != digest:
            raise BrokenCheckpoint(f"{path} is broken: the checksum of {name} is not the one that was written")


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders step-<number> of `folder`, oldest first, whole or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that the checkpoint `path` was written after."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint or None, what is wrong with each newer one)."""
    broken: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        try:
            verify(path)
        except BrokenCheckpoint as error:
            broken.append(str(error))
        else:
            return path, broken
    return None, broken


@contextmanager
def plain_failures(what: str, where: Path, cure: str = _GO_ON) -> Iterator[None]:
    """Turn the system's refusal to write `what`, such as a full disk, into a UserError that says so."""
    try:
        yield
    except UserError:  # it has said so already, nearer to the file
        raise
    except Exception as error:
        # The libraries that write safetensors and tokenizers wrap it: their text ends in "(os error 28)".
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{what} cannot be written to {where}: {reason}; make room or fix the folder, then {cure}") from error


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / TRAINER).read_text(encoding="utf-8")))


# --- trees of tensors -----------------------------------------------------------------------------------------------------


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values to path.safetensors and path.json."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    structure = _pack(tree, tensors)
    path.with_suffix(".json").write_text(json.dumps(structure), encoding="utf-8")
    save_file(tensors, path.with_suffix(".safetensors"))


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote, every dtype and key as it was; tensors on the CPU, each in memory of its own."""
    from safetensors.torch import load_file

    structure = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    # A file's tensors lie wherever the one before ends; kernels may sum in another order at another alignment.
    tensors = {name: tensor.clone() for name, tensor in load_file(path.with_suffix(".safetensors")).items()}
    return _unpack(structure, tensors)


def _pack(value: Any, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}  # keys may be numbers
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{value!r} is no plain value"
    return value


def _unpack(value: Any, tensors: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


# --- one folder -----------------------------------------------------------------------------------------------------------


def _seal(folder: Path, step: int) -> None:
    """Write the manifest: the size and the checksum of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": content}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest(path: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of each file."""
    if not (path / MANIFEST).is_file():
        what = f"has no {MANIFEST}" if path.is_dir() else "does not exist"
        raise BrokenCheckpoint(f"{path} {what}: it is no whole checkpoint of galore pretrain, such as RUN/checkpoints/step-000100")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written = (manifest["format"], manifest["version"])
        files = [(name, about["bytes"], about["sha256"]) for name, about in manifest["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenCheckpoint(f"{path} is broken: {MANIFEST} cannot be read") from None
    if written != (FORMAT, VERSION):
        raise UserError(
            f"{path} is a {written[0]!r} of version {written[1]!r}, not a {FORMAT!r} of version {VERSION}; "
            "resume it with the version of galore-torch that wrote it"
        )
    return files


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or a folder's list of names."""
    if path.is_dir() and os.name == "nt":  # Windows has no such call for folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
