"""One process at a time in a run's folder. The system drops a lock when its holder dies, however it dies: none is ever stale."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from galore_torch.train.checkpoint.storage import plain_failures
from galore_torch.train.errors import UserError

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep every other process out of `folder`; UserError names the process that is in it.

    Where the disk has no locks, as some network disks, `warn` is told so, and nothing is kept out.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK
    lock = FileLock(path, timeout=0.2, poll_interval=0.02, fallback_to_soft=False)  # time to see that a holder has left
    with plain_failures("the run", folder):
        path.open("a").close()  # what a folder refuses is said here; a failure below is one of the lock
        try:
            lock.acquire()
        except Timeout:
            holder = path.read_text(encoding="utf-8") or "another process"
            raise UserError(f"{folder} is being written by {holder}; wait for it or stop it, or give another --save_dir") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            warn(f"{folder} cannot be locked ({reason}): make sure that no other run writes into it")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: who waits for it finds that the file has gone, and takes a new one
        lock.release()
