"""How long does a run take to reach step 1, 10, 100 and 1,000, where nothing has been compiled before?

    python benchmarks/step_time/latency.py

Each setting of ``compile`` in a process of its own, on an empty cache of the compiler. CPU seconds inside step(), with those of the
compiler it starts: on an idle machine with one thread, the time one waits.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import heading, progress, table

from galore_torch import GaLoreAdamW, GaLoreAdamW8bit

CLASSES = {"GaLoreAdamW": GaLoreAdamW, "GaLoreAdamW8bit": GaLoreAdamW8bit}
WISHES = {"False": False, "None": None, "True": True}
STOPS = [1, 10, 100, 1000]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=12, help="so many matrices, no two of one shape, from 256 x 384 on")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=STOPS[-1])
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--alone", nargs=2, metavar=("CLASS", "COMPILE"), help="print the seconds of one setting, on the cache as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stops = [stop for stop in STOPS if stop <= arguments.steps]
    if arguments.alone:
        alone(arguments, stops)
        return
    rows = []
    for name in arguments.classes:
        for wish in WISHES:
            progress(f"{name}, compile={wish}")
            rows.append([name, wish, *(f"{float(seconds):.1f}" for seconds in in_a_process(name, wish))])
    progress("")
    print(heading(f"{arguments.shapes} shapes from 256 x 384 on, rank {arguments.rank}; CPU seconds in step() up to step n, one thread"))
    print(table(["optimizer", "compile", *(f"step {stop:,}" for stop in stops)], rows))


def in_a_process(name: str, wish: str) -> list[str]:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, *sys.argv, "--alone", name, wish]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def alone(arguments: argparse.Namespace, stops: list[int]) -> None:
    name, wish = arguments.alone
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(256 + 16 * i, 384 + 16 * i)) for i in range(arguments.shapes)]
    group = {"params": params, "rank": arguments.rank, "update_proj_gap": 200}
    optimizer = CLASSES[name]([group], lr=1e-3, compile=WISHES[wish])
    spent = 0.0
    for step in range(1, stops[-1] + 1):
        for p in params:
            p.grad = torch.randn_like(p)
        begin = seconds()
        optimizer.step()
        spent += seconds() - begin
        if step in stops:
            print(spent)


def seconds() -> float:
    """CPU seconds of this process and of those it has started and that have ended."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


if __name__ == "__main__":
    main()
