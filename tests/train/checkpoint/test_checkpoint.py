"""A checkpoint is whole or absent, says when it is broken, and gives back every bit of every optimizer."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch.train.checkpoint import storage as module
from galore_torch.train.checkpoint.storage import (
    MANIFEST,
    BrokenCheckpoint,
    checkpoints_in,
    load_tree,
    newest_whole,
    save_tree,
    verify,
    write_checkpoint,
)
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from support.whole_runs import Silent

Make = Callable[..., PretrainConfig]


def two_files(folder: Path) -> None:
    (folder / "a").write_bytes(b"weights")
    (folder / "b").write_bytes(b"moments")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the folder -----------------------------------------------------------------------------------------------------------


def test_checkpoints_are_bounded_in_number(tmp_path: Path) -> None:
    for step in (5, 10, 15, 1_000_000):
        write_checkpoint(tmp_path, step, two_files, keep=2)
    assert names(tmp_path) == ["step-000015", "step-1000000"]
    assert [path.name for path in checkpoints_in(tmp_path)] == names(tmp_path)


@pytest.mark.parametrize("stage", ["fill", "_seal", "_sync"])
@pytest.mark.parametrize("death", [KeyboardInterrupt(), RuntimeError("a fault")])
def test_death_while_saving_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, death: BaseException
) -> None:
    def die(*_: Any) -> None:
        raise death

    good = write_checkpoint(tmp_path, 1, two_files, keep=1)
    if stage != "fill":
        monkeypatch.setattr(module, stage, die)
    with pytest.raises(type(death)):
        write_checkpoint(tmp_path, 2, die if stage == "fill" else two_files, keep=1)
    assert names(tmp_path) == ["step-000001"]
    verify(good)


def test_everything_is_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls: each file and the folder, then the name, then the parent; older ones are deleted last."""
    calls: list[str] = []
    sync, rename = module._sync, Path.rename

    def logged_sync(path: Path) -> None:
        calls.append(path.name)
        sync(path)

    def logged_rename(self: Path, target: Path) -> Path:
        calls.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    write_checkpoint(tmp_path, 1, two_files, keep=1)
    monkeypatch.setattr(module, "_sync", logged_sync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    write_checkpoint(tmp_path, 2, two_files, keep=1)
    assert calls == [
        *("a", "b", MANIFEST, ".tmp-step-000002", ".tmp-step-000002 -> step-000002", tmp_path.name),
        "step-000001 -> .tmp-step-000001",
    ]


def test_what_a_kill_left_behind_is_removed_and_never_read(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-000007").mkdir()
    two_files(tmp_path / ".tmp-step-000007")
    assert newest_whole(tmp_path) == (None, [])
    write_checkpoint(tmp_path, 8, two_files, keep=2)
    assert names(tmp_path) == ["step-000008"]


def _cut(path: Path) -> None:
    (path / "b").write_bytes(b"mom")


def _flip(path: Path) -> None:
    (path / "b").write_bytes(b"momentS")


def _lose(path: Path) -> None:
    (path / "b").unlink()


def _no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def _cut_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:60])


def _list_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("[]")


DAMAGES = [
    (_cut, "b has 3 bytes, 7 were written"),
    (_flip, "the checksum of b"),
    (_lose, "b is missing"),
    (_no_manifest, f"has no {MANIFEST}"),
    (_cut_manifest, "cannot be read"),
    (_list_manifest, "cannot be read"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_broken_checkpoint_is_named_and_skipped(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    old, new = (write_checkpoint(tmp_path, step, two_files, keep=2) for step in (1, 2))
    damage(new)
    with pytest.raises(BrokenCheckpoint, match=says) as caught:
        verify(new)
    assert str(new) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert newest_whole(tmp_path) == (old, [str(caught.value)])
    write_checkpoint(tmp_path, 2, two_files, keep=1)  # the run comes to that step again
    assert (names(tmp_path), newest_whole(tmp_path)) == (["step-000002"], (new, []))


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "another trainer's"}])
def test_another_format_is_refused_not_skipped(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path, 1, two_files, keep=1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=r"not a 'galore-torch checkpoint' of version 1; resume it with"):
        newest_whole(tmp_path)


# --- a full disk ----------------------------------------------------------------------------------------------------------


def test_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        two_files(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    good = write_checkpoint(tmp_path, 1, two_files, keep=1)
    with pytest.raises(UserError, match=r"step 2 cannot be written to .*: No space left on device; make room .* --resume auto"):
        write_checkpoint(tmp_path, 2, full, keep=1)
    assert names(tmp_path) == ["step-000001"]
    verify(good)


def test_refusal_inside_a_library_is_the_same_line(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """A limit on the size of files, as real as a full disk: the library that writes tensors wraps it in an error of its own."""
    config = make_config(save_every=1, keep=5)
    with pytest.MonkeyPatch.context() as patch:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limited(path: Path, tree: Any) -> None:
            if path.parent.name.endswith("3"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            save_tree(path, tree)

        patch.setattr("galore_torch.train.checkpoint.resume.save_tree", limited)
        try:
            with pytest.raises(UserError, match=r"^the checkpoint of step 3 cannot be written to \S*: .*File too large"):
                train(config, "adamw", 0.01, token_data, tmp_path, Silent())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path / "checkpoints") == ["step-000001", "step-000002"]
    assert newest_whole(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "step-000002", [])


# --- trees of tensors ------------------------------------------------------------------------------------------------------


def test_tree_comes_back_with_every_dtype_and_key(tmp_path: Path) -> None:
    tensors = [torch.tensor([1.5, -0.0, torch.inf]).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    tensors += [torch.arange(6, dtype=torch.uint8).view(2, 3).t(), torch.tensor(True), torch.tensor(7), torch.empty(0, 3)]
    tree = {"state": {0: {"step": 3}, 12: dict(zip("abcdefg", tensors, strict=True))}, "groups": [{"betas": (0.9, 0.1), "x": None}]}
    save_tree(tmp_path / "tree", tree)
    back = load_tree(tmp_path / "tree")
    for mine, saved in zip(back["state"].pop(12).values(), tree["state"].pop(12).values(), strict=True):
        assert (mine.dtype, mine.shape) == (saved.dtype, saved.shape)
        assert torch.equal(mine, saved)
    assert back == tree
