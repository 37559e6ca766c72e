"""One process at a time in a run's folder. The system drops a lock when its holder dies, however it dies: none is ever stale."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from galore_torch.train.checkpoint.storage import plain_failures
from galore_torch.train.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep every other process out of `folder`; UserError names the process that is in it.

    Where the system has no locks, as on some network disks, `warn` is told so, and nothing is kept out.
    """
    path = folder / LOCK
    with plain_failures("the run", folder):
        file = _locked(path, warn)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, warn: Callable[[str], None]) -> IO[str]:
    """The open file at `path`, which no other process has locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            # The lock of a process, not of a file: workers that outlive a killed run do not hold it on.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                with file:
                    file.seek(0)
                    holder = file.read() or "another process"
                raise UserError(f"{path.parent} is being written by {holder}; wait for it or stop it, or give another --save_dir") from None
            warn(f"{path.parent} cannot be locked ({error.strerror}): make sure that no other run writes into it")
            return file
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # whoever held it has just left, and taken the file away
