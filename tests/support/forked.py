"""Processes that tests start, without seconds of imports for each: one server a session imports what runs need, and forks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import galore_torch

# Reads groups of processes, [(environment, words, log), ...], a line each: writes their ids, and when all have ended their exit
# codes. The first word of a command is a Python file, or else one of `galore`. A killed process, unlike a lost machine, loses
# nothing that it gave to the system, so none of them waits for the disk; no run draws its picture.
_SERVER = """
import json, os, runpy, sys
import torch.distributed, transformers.models.llama.modeling_llama
import galore_torch.train.commands.pretrain
from galore_torch import cli
os.fsync = lambda descriptor: None
galore_torch.train.commands.pretrain.draw = lambda *_: None

def run(words):
    if not words[0].endswith(".py"):
        return cli.main(words)
    sys.argv = words
    sys.path[0] = os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")

for line in sys.stdin:
    pids = []
    for environment, words, log in json.loads(line):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(environment)
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
                os.dup2(1, 2)
                code = run(words) or 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Forked:
    """The server. As a context it ends with the block, and its processes with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(Path(galore_torch.__file__).resolve().parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its standard input, which ends it

    def start(self, *commands: list[str], environments: list[dict[str, str]] | None = None) -> list[int]:
        """The ids of one process for each command."""
        shared = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(self.folder / "cache"))}
        self.logs = [self.folder / str(number) for number in range(len(commands))]
        owns = environments or [{}] * len(commands)
        group = [(shared | own, words, str(log)) for own, words, log in zip(owns, commands, self.logs, strict=True)]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(group) + "\n")
        self.process.stdin.flush()
        return list(self._line())

    def together(self, processes: int, words: list[str]) -> list[int]:
        """One command in several processes that find each other, as torchrun makes them; their ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
        return self.start(*[words] * processes, environments=[shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)])

    def wait(self) -> tuple[list[int], list[str]]:
        """(exit codes, what each said)."""
        return list(self._line()), [log.read_text() for log in self.logs]

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """(exit code, what it said) of one process."""
        self.start(list(words), environments=[environment])
        (code,), (said,) = self.wait()
        return code, said

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())
