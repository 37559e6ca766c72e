"""Which transport of the moments, projector and schedule trains best? Held-out perplexity of a small LLaMA, several seeds.

python benchmarks/transport/run.py --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_llama import add_data_arguments, held_out_perplexity, machine, steps, text

from galore_torch import GaLoreAdamW, galore_param_groups

CHOICES: dict[str, dict[str, Any]] = {
    "svd, keep (published)": {"projector": "svd", "transport": "keep"},
    "svd, reset": {"projector": "svd", "transport": "reset"},
    "svd, rotate": {"projector": "svd", "transport": "rotate"},
    "power, keep": {"projector": "power", "transport": "keep"},
    "power, rotate (default)": {"projector": "power", "transport": "rotate"},
    "AdamW, the same two rates": {},  # lr for the full-rank group, scale x lr for the matrices
}
SCALE = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="NAME", help=", ".join(map(repr, CHOICES)))
    arguments = parser.parse_args()
    results: dict[str, list[float]] = {name: [] for name in arguments.only}
    for seed in range(arguments.seeds):
        config, data = text(arguments, seed=seed, num_training_steps=arguments.steps, lr=arguments.lr, rank=arguments.rank)
        for name in results:
            choice = CHOICES[name]

            def build(model: torch.nn.Module, choice: dict[str, Any] = choice) -> torch.optim.Optimizer:
                full, matrices = galore_param_groups(model, arguments.rank, update_proj_gap=arguments.gap, scale=SCALE, **choice)
                if choice:
                    return GaLoreAdamW([full, matrices], lr=arguments.lr)
                split = [{"params": full["params"]}, {"params": matrices["params"], "lr": SCALE * arguments.lr}]
                return torch.optim.AdamW(split, lr=arguments.lr, eps=1e-6, weight_decay=0.0)

            *_, (_, model, _) = steps(config, data, build)
            results[name].append(held_out_perplexity(model, config, data))
            print(f"seed {seed}  {name:24} {results[name][-1]:.2f}", flush=True)
    print(
        f"\n{date.today()}, {machine()}; {arguments.seeds} seeds, {arguments.steps} updates, rank {arguments.rank}, gap {arguments.gap}\n"
    )
    print("| projector, transport | held-out perplexity, mean | each seed |\n|---|---|---|")
    for name, values in results.items():
        print(f"| {name} | {statistics.mean(values):.2f} | {', '.join(f'{v:.2f}' for v in values)} |")


if __name__ == "__main__":
    main()
