"""Is a step as fast as it was? One working tree against another, turn by turn in one run.

    git worktree add build/before COMMIT
    python benchmarks/two_trees/run.py build/before .

Each tree has a process of its own, which answers with the time of one call; the two take turns, and medians are compared. Where a process's
tensors lie in memory moves its times by several per cent, so several pairs of processes are made, one after the other. Only public names
are used, so that any two versions can be compared. A refresh is timed as a step of an optimizer that refreshes at every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]  # one layer of LLaMA-60M
RANK, NEVER = 128, 10**6
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "GaLoreAdamW, step": ("GaLoreAdamW", {"compile": True}, "float32"),
    "GaLoreAdamW, step, not compiled": ("GaLoreAdamW", {"compile": False}, "float32"),
    "GaLoreAdamW, step, bf16 weights": ("GaLoreAdamW", {"compile": True}, "bfloat16"),
    "GaLoreAdamW8bit, step": ("GaLoreAdamW8bit", {"compile": True}, "float32"),
    "GaLoreAdamW8bit, step, not compiled": ("GaLoreAdamW8bit", {"compile": False}, "float32"),
    "GaLoreAdafactor, step": ("GaLoreAdafactor", {}, "float32"),
    "full rank, step": ("GaLoreAdamW", {"rank": None, "compile": True}, "float32"),
    "power, refresh and step": ("GaLoreAdamW", {"update_proj_gap": 1, "compile": False}, "float32"),
    "rsvd, refresh and step": ("GaLoreAdamW", {"update_proj_gap": 1, "compile": False, "projector": "rsvd"}, "float32"),
    "gram, refresh and step": ("GaLoreAdamW", {"update_proj_gap": 1, "compile": False, "projector": "gram"}, "float32"),
}
WARM_UP = 60  # steps


def stepper(name: str) -> Callable[[], Any]:
    """The step of one case, past its first refresh and whatever it compiles."""
    import torch

    import galore_torch

    class_name, settings, dtype = CASES[name]
    torch.manual_seed(0)
    params = [torch.nn.Parameter((0.02 * torch.randn(shape)).to(getattr(torch, dtype))) for shape in SHAPES]
    for p in params:
        p.grad = (1e-3 * torch.randn(p.shape)).to(p.dtype)
    group = {"params": params, "rank": RANK, "update_proj_gap": NEVER, **settings}
    optimizer = getattr(galore_torch, class_name)([group], lr=1e-3)
    optimizer.step()
    for state in optimizer.state.values():  # parameters take turns over the gap: none comes while steps are timed
        state |= {key: 0 for key in ("turn", "index") if key in state and group["update_proj_gap"] == NEVER}
    for _ in range(WARM_UP):
        optimizer.step()
    return optimizer.step


def serve(threads: int) -> None:
    """Answer each name on standard input with the seconds of one call, on standard output."""
    import torch

    torch.set_num_threads(threads)
    steps: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = line.rstrip("\n")
        if name not in steps:
            steps[name] = stepper(name)
        begin = time.perf_counter()
        steps[name]()
        print(time.perf_counter() - begin, flush=True)


class Tree:
    """A process that imports galore_torch from one working tree."""

    def __init__(self, folder: str, threads: int):
        source = Path(folder).resolve() / "src"
        if not (source / "galore_torch").is_dir():
            raise SystemExit(f"{folder} is no working tree: there is no {source / 'galore_torch'}")
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--serve", "--threads", str(threads)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, name: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="TREE", help="before and after, two folders")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.threads)
        return
    if len(arguments.trees) != 2:
        parser.error("give two working trees: before and after")
    import torch
    from report import heading, progress, table

    torch.set_num_threads(arguments.threads)  # the heading tells
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arguments.cases}
    for pair in range(arguments.pairs):
        before, after = (Tree(folder, arguments.threads) for folder in arguments.trees)
        for name in arguments.cases:
            progress(f"pair {pair + 1} of {arguments.pairs}: {name}")
            found[name].append(compare(before, after, name, arguments.rounds))
        before.close()
        after.close()
    progress("")
    rows = []
    for name, pairs in found.items():
        old, new, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
        ends = [pair[2] for pair in pairs]
        rows.append([name, f"{1e3 * old:.2f}", f"{1e3 * new:.2f}", f"{ratio:.3f}", f"{min(ends):.3f} to {max(ends):.3f}"])
    said = f"{arguments.pairs} pairs of processes, {arguments.rounds} rounds each, medians; ratio of turns"
    print(heading(f"one layer of LLaMA-60M, rank {RANK}; {said}", "cpu"))
    print(table(["", "before, ms", "after, ms", "after / before", "pairs"], rows))


def compare(before: Tree, after: Tree, name: str, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a call in each tree, and the median ratio of the calls of one turn."""
    old, new = [], []
    for turn in range(rounds + 1):
        first, second = (before, after) if turn % 2 else (after, before)  # neither always follows the other
        seconds = {first: first.seconds(name), second: second.seconds(name)}
        if turn:  # the first one warms up
            old.append(seconds[before])
            new.append(seconds[after])
    ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
    return statistics.median(old), statistics.median(new), ratio


if __name__ == "__main__":
    main()
