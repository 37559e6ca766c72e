"""Processes that stay: a group of ranks on gloo which runs function after function, so that many tests pay for one start.

A function is named by its module, which the processes import, and takes and gives what pickle can carry.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import galore_torch

SECONDS = 120  # a process that waits longer for another has lost it


class World:
    """``size`` processes; as a context it ends with the block. After an error they are gone, and the next `run` starts others."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self.started = size, folder, 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(SECONDS)
            assert process.stdout is not None
            process.stdout.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` gives on each rank; a ValueError of all of them is raised here."""
        if not self.processes:
            self._start()
        request = pickle.dumps((function.__module__, function.__qualname__, arguments))
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(len(request).to_bytes(8, "little") + request)
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        if all(good for good, _ in answers):
            return [answer for _, answer in answers]
        errors = [answer for good, answer in answers if not good]
        if len(errors) == self.size and all(isinstance(error, ValueError) for error in errors):
            raise errors[0]
        self._kill()
        raise AssertionError("\n".join(str(error) for error in errors))

    def _start(self) -> None:
        self.started += 1
        source, tests = Path(galore_torch.__file__).resolve().parents[1], Path(__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}", "PYTHONFAULTHANDLER": "1"}  # a crash says where
        store = self.folder / f"store{self.started}"
        for rank in range(self.size):
            words = [sys.executable, "-m", "support.world", str(rank), str(self.size), str(store)]
            self.processes.append(subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def _answer(self, process: subprocess.Popen[bytes]) -> tuple[bool, Any]:
        assert process.stdout is not None
        if not (length := process.stdout.read(8)):
            self._kill()
            raise AssertionError("a rank has died: see what it wrote")
        good, answer = pickle.loads(process.stdout.read(int.from_bytes(length, "little")))
        if not good and not isinstance(answer, ValueError):  # the others may wait for this one
            self._kill()
            raise AssertionError(str(answer))
        return good, answer

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes = []


def _serve(rank: int, size: int, store: str) -> None:
    import importlib
    import traceback
    import warnings
    from datetime import timedelta

    import torch
    from torch import distributed

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints must not stand among the answers
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    warnings.simplefilter("ignore")
    while length := sys.stdin.buffer.read(8):
        module, name, arguments = pickle.loads(sys.stdin.buffer.read(int.from_bytes(length, "little")))
        answer: tuple[bool, Any]
        try:
            answer = True, getattr(importlib.import_module(module), name)(*arguments)
        except ValueError as error:
            answer = False, error
        except BaseException:  # those of distributed checkpoints are no Exceptions
            answer = False, f"rank {rank}: {traceback.format_exc()}"
        data = pickle.dumps(answer)
        answers.write(len(data).to_bytes(8, "little") + data)
        answers.flush()
    distributed.destroy_process_group()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
