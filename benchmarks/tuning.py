"""What the comparisons of losses share: learning rates are tuned on a seed that is not reported, on text that all runs read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_llama import add_data_arguments, text

TUNING_SEED = 1000


def best_on_grid(loss: Callable[[float], float], start: float, grid: tuple[float, ...]) -> tuple[float, list[float]]:
    """(the best value, those tried): from `start` along the grid until both neighbours of the best are worse, or the grid ends."""
    tried: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in tried:
            value = loss(grid[i])
            tried[i] = value if math.isfinite(value) else math.inf
        return tried[i]

    best = grid.index(start)
    while True:
        around = [i for i in (best, best + 1, best - 1) if 0 <= i < len(grid)]
        lowest = min(around, key=at)  # of equal ones the first, so the search ends
        if lowest == best:
            return grid[best], [grid[i] for i in sorted(tried)]
        best = lowest


def saved_tokens(arguments: argparse.Namespace, task: Any) -> Path:
    """All of the text as tokens, in a file named after them, for the runs to read."""
    from safetensors.torch import save_file

    settings = {"vocab_size": task.vocab, "max_length": task.length, "eval_tokens": task.eval_tokens}
    _, data = text(arguments, num_training_steps=arguments.most_tokens // task.length, batch_size=1, **settings)
    path = arguments.results.parent / f"{data.fingerprint[:16]}-{len(data.held_out)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"train": data.train.to(torch.int32), "held_out": data.held_out.to(torch.int32)}, path)
    return path


def add_run_arguments(parser: argparse.ArgumentParser, results: Path, seeds: int) -> None:
    """Text, seeds, device and the file of the runs."""
    add_data_arguments(parser)
    parser.add_argument("--most_tokens", type=int, default=20_000_000, help="of the training text")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=results, help="one line for each run")


def parsed_runs(parser: argparse.ArgumentParser, tuning_seed: int = TUNING_SEED) -> argparse.Namespace:
    """The arguments; an error where the seed that rates are tuned on is to be reported."""
    arguments = parser.parse_args()
    if tuning_seed in arguments.seeds:
        parser.error(f"--seeds: {tuning_seed} is the seed that learning rates are tuned on; report others")
    return arguments
