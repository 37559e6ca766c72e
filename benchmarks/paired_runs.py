"""Contenders on one task with paired seeds: runs that are kept line by line, and differences of pairs."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from report import progress
from small_llama import loss
from torch import Tensor, nn

from galore_torch.train.data.loader import batches

# Half octaves: with whole ones, two contenders whose best rates lie elsewhere between would differ by more than their seeds do.
GRID = tuple(round(0.01 * 2 ** (step / 2), 5) for step in range(-16, 15))
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided 5 %, of 1, 2, ... degrees of freedom


def train(
    task: Any, model: nn.Module, built: Mapping[torch.optim.Optimizer, float], seed: int, tokens: Tensor, label: str, bf16: bool = False
) -> None:
    """Train `model` by the seed's batches with optimizers and their peak rates. ``bf16``: matrices multiply in that, by autocast."""
    stream = batches(tokens, task.length, task.batch, seed)
    for step in range(task.steps):
        for optimizer, peak in built.items():
            for group in optimizer.param_groups:
                lr = peak * task.lr_factor(step, "")
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr  # torchao's optimizers want their own tensor
        inputs, targets = (whole.to(task.device) for whole in next(stream))
        for some_inputs, some_targets in zip(inputs.split(task.micro), targets.split(task.micro), strict=True):
            with torch.autocast(task.device, torch.bfloat16, enabled=bf16):
                part = loss(model, some_inputs, some_targets)
            (part * (len(some_inputs) / task.batch)).backward()
        for optimizer in built:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            progress(f"{label}, seed {seed}: {step} of {task.steps}")
    progress("")


class Results:
    """Runs of one task and text, a line of `file` each; those of earlier calls are read from it.

    `common` is what all have the same, and a line with another is another's. `measure(name, seed, lr)` makes a new result, with its "loss".
    """

    def __init__(self, file: Path, common: dict[str, Any], measure: Callable[[str, int, float], dict[str, Any]]):
        self.file, self.common, self.measure = file, common, measure
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.done = {self._key(row): row["result"] for row in map(json.loads, lines)}

    def run(self, name: str, seed: int, lr: float) -> dict[str, Any]:
        row: dict[str, Any] = {**self.common, "variant": name, "seed": seed, "lr": lr}
        key = self._key(row)
        if key not in self.done:
            row["result"] = self.measure(name, seed, lr)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row["result"]
            print(f"{name} seed {seed} lr {lr:g}: {row['result']}", file=sys.stderr, flush=True)
        return self.done[key]

    def loss(self, name: str, seed: int, lr: float) -> float:
        return float(self.run(name, seed, lr)["loss"])

    @staticmethod
    def _key(row: dict[str, Any]) -> str:
        return json.dumps({key: value for key, value in row.items() if key != "result"}, sort_keys=True)


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """(mean, standard deviation, t, half of the 95 % interval) of the differences first - second of at least two seeds."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    error = deviation / math.sqrt(len(differences))
    return mean, deviation, mean / error if error else math.inf, T_95[min(len(differences) - 1, len(T_95)) - 1] * error
