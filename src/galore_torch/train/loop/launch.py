"""Several processes of one command on this machine, as torchrun starts them: one ends, all end. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

COMMAND = (sys.executable, "-c", "import sys; from galore_torch.cli import main; sys.exit(main())")
_HERE = "127.0.0.1"
_PATIENCE = 10.0  # seconds that the others have to notice that one has gone


def launch(words: Sequence[str], processes: int) -> int:
    """Run `galore` with these words in so many processes, and return the first one's exit code, or 1 where one was killed.

    Signals go to all of them. What they say is theirs; which one ended the run is said at the end.
    """
    command, port = [*COMMAND, *words], _free_port()
    started = [subprocess.Popen(command, env=os.environ | _environment(rank, processes, port)) for rank in range(processes)]
    with _handed_on(started):
        first = _first_to_fail(started)
        if first is None:
            return 0
        _end(started)
    code = started[first].returncode
    if code < 0:
        print(
            f"galore: process {first} of {processes} was ended by {signal.Signals(-code).name}, so all have ended; go on with the same "
            "command, --save_dir and the run's folder, and --resume auto",
            file=sys.stderr,
        )
        return 1
    return max(started[0].returncode, code)


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells each process; threads share the processors where nothing else is said."""
    found: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    found |= {"MASTER_ADDR": _HERE, "MASTER_PORT": port}
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // processes)
    return {key: str(value) for key, value in found.items()}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HERE, 0))
        return int(free.getsockname()[1])


def _first_to_fail(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until one fails, or all are done: None. One that was killed comes before those that it took with it."""
    while True:
        codes = [process.poll() for process in started]
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        failed = [rank for rank, code in enumerate(codes) if code]
        if killed or failed:
            return (killed or failed)[0]
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """The others end by themselves when they miss one; those that do not are asked to, and then made to."""
    for ask in (None, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _PATIENCE
        for process in started:
            if ask is not None and process.poll() is None:
                process.send_signal(ask)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _handed_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """A signal to this process goes to all of them, which stop after their step and save."""

    def hand_on(number: int, _: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    old = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
