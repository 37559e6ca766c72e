"""A run's folder: new, or empty. Imports no torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from galore_torch.train.checkpoint.lock import LOCK
from galore_torch.train.errors import UserError


def check_save_dir(save_dir: str | None, resume: str | None = None) -> None:
    """Refuse a folder that already holds something: a run is never overwritten. What a killed run locked counts as nothing."""
    if save_dir is not None:
        folder = Path(save_dir)
        if folder.is_file() or (folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())):
            checkpoints = any(folder.glob("checkpoints/step-*")) or any(folder.glob("*/checkpoints/step-*"))
            cure = "go on with the run in it by --resume auto, " if checkpoints and resume is None else ""
            raise UserError(f"--save_dir {folder} already exists and is not empty; {cure}give a new folder, or move that one away")


def new_run_folder(save_dir: str | None, command: str = "pretrain") -> Path:
    """Make the run's folder: the one that is named, or a new one under runs/."""
    check_save_dir(save_dir)
    if save_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder, copy = Path("runs") / f"{command}-{stamp}", 1
        while folder.exists():
            copy += 1
            folder = Path("runs") / f"{command}-{stamp}-{copy}"
    else:
        folder = Path(save_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir {folder} cannot be made: {error.strerror}") from error
    return folder
