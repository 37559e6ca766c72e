"""What a method of the frontier costs: the time of its step beside fused AdamW's, and all the memory of a training step.

    python benchmarks/frontier/cost.py [--methods NAME...] [--rounds 60]

Steps are timed in turns, one thread, on blocks as wide as LLaMA-60M's and 350M's (two of width 512, r = 128; one of 1024, r = 256),
gradients given; the matrices alone. A method whose steps take long has fewer rounds. Memory is that of the frontier's own small model at
one sequence of 128 tokens: weights, state, and the most that a forward pass, a backward pass and a step have out at once, by the allocator;
gradients as `fused_backward` keeps them where the method takes it, else in full. Both go into costs.json, which the table reads. Time on
an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pretrain"))
from allocator import peak_bytes
from contest import Task
from methods import METHODS, matrices
from run import REST_LR, SMALL
from small_llama import loss, machine

from galore_torch import fused_backward
from galore_torch.optim.base import LowRankOptimizer
from galore_torch.train.optimizers.registry import state_bytes

COSTS = Path(__file__).resolve().parent / "costs.json"
BLOCKS = {
    512: replace(SMALL, hidden=512, inner=1376, layers=2, heads=8, rank=128),
    1024: replace(SMALL, hidden=1024, inner=2736, layers=1, heads=16, rank=256),
}
BASE = "adamw"
LEAST = 5  # rounds of a method that are counted


class Timed:
    """A method's optimizer on a model of its own, and how long its steps took."""

    def __init__(self, name: str, blocks: Task):
        torch.manual_seed(0)
        model = blocks.model(0)
        self.weights = matrices(model)
        for p in self.weights:
            p.grad = 1e-3 * torch.randn_like(p)
        self.optimizer = METHODS[name].build(model, blocks, 1e-3)
        if isinstance(self.optimizer, LowRankOptimizer):
            for group in self.optimizer.param_groups:
                group["compile"] = True  # from the first step on, as a long run does after some hundred
        self.seconds: list[float] = []

    def step(self) -> None:
        for p in self.weights:  # as after a backward pass: just written, and another one
            p.grad = 1e-3 * torch.randn_like(p)
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def result(self, warm_up: int) -> dict[str, float]:
        settled = self.seconds[min(warm_up, len(self.seconds) // 2) :]
        median = statistics.median(settled)
        return {"ms": round(1e3 * median, 3), "slowest": round(max(settled) / median, 2), "rounds": len(settled)}


def times(names: list[str], blocks: Task, rounds: int, warm_up: int, seconds: float) -> dict[str, dict[str, float]]:
    """By name: the median step, the slowest over it, and the median over AdamW's. ``seconds``: of a method's steps, at most."""
    contenders = {name: Timed(name, blocks) for name in dict.fromkeys([BASE, *names])}
    for _ in range(warm_up + rounds):
        for contender in contenders.values():
            if len(contender.seconds) < 2 * LEAST or sum(contender.seconds) < seconds:
                contender.step()
    found = {name: contender.result(warm_up) for name, contender in contenders.items()}
    return {name: {**row, "of_adamw": round(row["ms"] / found[BASE]["ms"], 3)} for name, row in found.items()}


def memory(name: str) -> dict[str, Any]:
    """Bytes an element of all parameters: what is held between steps, and with the peak of a step."""
    model = SMALL.model(0)
    own = METHODS[name].build(model, SMALL, 1e-3)
    chosen = set(map(id, matrices(model)))
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], lr=REST_LR, fused=True)
    mode = attach(model, own)
    tokens = torch.randint(SMALL.vocab, (1, SMALL.length))

    def step() -> None:
        loss(model, tokens, tokens).backward()
        for optimizer in (own, rest):
            optimizer.step()
            optimizer.zero_grad()

    step()
    held = sum(p.nbytes for p in model.parameters()) + state_bytes(own) + state_bytes(rest)
    return {"mode": mode, "all_in": round((held + peak_bytes(step)) / sum(p.numel() for p in model.parameters()), 2)}


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The mode of `fused_backward` that keeps the least and takes this optimizer; "full" where none does."""
    if isinstance(optimizer, LowRankOptimizer):
        for mode in ("direct_update", "update"):
            try:
                fused_backward(model, optimizer, mode)
            except ValueError:
                continue
            return mode
    return "full"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--warm_up", type=int, default=60, help="rounds that are not counted: a refresh of every matrix is among them")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a method's steps at one width, at most")
    parser.add_argument("--costs", type=Path, default=COSTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stamp = {"date": str(date.today()), "machine": machine()}
    found = json.loads(arguments.costs.read_text(encoding="utf-8")) if arguments.costs.exists() else {}
    names = [BASE, *(name for name in arguments.methods if name != BASE)]
    for name in names:
        found[name] = {**memory(name), **stamp, "steps": {}}
    for width, blocks in BLOCKS.items():
        for name, row in times(names, blocks, arguments.rounds, arguments.warm_up, arguments.seconds).items():
            found[name]["steps"][str(width)] = row
    arguments.costs.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
