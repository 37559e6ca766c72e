"""Two processes never write into one run's folder, and a process that was killed keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.checkpoint.lock import run_lock
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from support.whole_runs import command

Make = Callable[..., PretrainConfig]
HOLDER = """
import os, sys, time
from pathlib import Path
from galore_torch.train.checkpoint.lock import run_lock
with run_lock(Path(sys.argv[1]), print):
    if os.fork() == 0:  # a worker, which lives on when this process is killed
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """It holds the lock of `folder`, and has a worker that ends with this block."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def nothing(text: str) -> None:
    raise AssertionError(text)


def test_second_process_is_refused_until_the_first_is_gone(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run that another process has resumed, and a folder that another process has just made."""
    monkeypatch.setattr("galore_torch.train.commands.pretrain.draw", lambda *_: None)
    new = tmp_path / "new"
    assert command(make_config(num_training_steps=1))[0] == 0
    new.mkdir()
    for config in (make_config(num_training_steps=1, resume="auto"), make_config(num_training_steps=1, save_dir=str(new))):
        folder = Path(config.save_dir or "")
        before = content(folder)
        with another_process(folder) as other:
            with pytest.raises(UserError, match=f"{folder} is being written by process {other.pid} on {socket.gethostname()}; wait for it"):
                command(config)
            assert content(folder) == before
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            assert (folder / ".lock").exists()
            assert command(config)[0] == 0, "its worker is alive, and keeps nobody out"
        assert not (folder / ".lock").exists()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_lock_that_is_given_up_while_it_is_waited_for_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was opened has been removed by its holder: a lock on it would keep nobody out."""
    real, seen = fcntl.flock, []

    def flock(file: int, how: int) -> None:
        if not seen:
            (tmp_path / ".lock").unlink()
        seen.append(os.fstat(file).st_nlink)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock(tmp_path, nothing):
        assert seen == [0, 1]
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS])
def test_system_without_locks_is_told_of(reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", none)
    with run_lock(tmp_path, said.append):
        pass
    assert said == [f"{tmp_path} cannot be locked ({os.strerror(reason)}): make sure that no other run writes into it"]
    assert not (tmp_path / ".lock").exists()


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"the run cannot be written to .*: Is a directory"), run_lock(tmp_path, nothing):
        pass


def test_folder_with_a_run_says_how_to_go_on(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "both" / "adamw" / "checkpoints" / "step-000002").mkdir(parents=True)
    for name in ("run", "both"):
        with pytest.raises(
            UserError, match=f"{name} already exists and is not empty; go on with the run in it by --resume auto, give a new"
        ):
            command(make_config(save_dir=str(tmp_path / name)))
    with pytest.raises(UserError, match="is not empty; give a new folder"):  # --resume auto has found none of these runs
        command(make_config(compare=("adamw", "sgd"), resume="auto"))
