"""How much of the best rank-r energy does each projector keep, on the gradients of a real training run?

    python benchmarks/refresh/energy.py

Each projector refreshes its own chain of bases on the same gradients, every ``--gap`` updates, beside the run's own optimizer.
The share is ||basis^T G||^2 over that of the exact subspace. "stale" is the basis of one gap ago on the new gradient: what the
last updates of a gap work with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_llama import add_data_arguments, machine, steps, text

from galore_torch import GaLoreAdamW, galore_param_groups
from galore_torch.layout import projected_modes
from galore_torch.projectors import PROJECTORS

NAMES = ("power", "rsvd", "gram", "random")


def energy(G: torch.Tensor, basis: torch.Tensor, mode: int) -> float:
    return float((basis.mT @ G if mode == 0 else G @ basis).square().sum())


Chains = dict[str, list[dict[int, torch.Tensor | None]]]  # projector -> matrix -> mode -> basis


@torch.no_grad()
def measure(matrices: list[torch.Tensor], chains: Chains, rank: int, step: int, shares: dict[str, list[float]]) -> None:
    for i, G in enumerate(matrices):
        (mode,) = projected_modes(tuple(G.shape), "std")
        best = float(torch.linalg.svdvals(G)[:rank].square().sum())
        if (old := chains["gram"][i][mode]) is not None:
            shares["stale gram"].append(energy(G, old, mode) / best)
        for name in NAMES:
            chains[name][i] = dict(PROJECTORS[name](G, rank, chains[name][i], step))
            share = energy(G, chains[name][i][mode], mode) / best  # type: ignore[arg-type]
            shares[name if step else f"{name}, first"].append(share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    print(f"{date.today()}, {machine()}; one seed, rank {arguments.rank} of 128, batches of 16 x 128 tokens, {arguments.steps} updates\n")
    print("| gap | projector | mean share | worst matrix |\n|---|---|---|---|")
    for gap in (200, 50, 10):
        config, data = text(arguments, num_training_steps=arguments.steps, lr=0.01, rank=arguments.rank)
        shares: dict[str, list[float]] = {}
        chains: Chains = {}

        def build(model: torch.nn.Module, gap: int = gap) -> GaLoreAdamW:
            return GaLoreAdamW(galore_param_groups(model, arguments.rank, update_proj_gap=gap, projector="gram"), lr=0.01)

        for step, _, optimizer in steps(config, data, build):
            matrices = [p.grad for p in optimizer.param_groups[-1]["params"] if p.grad is not None]
            if step == 0:
                chains = {name: [{projected_modes(tuple(G.shape), "std")[0]: None} for G in matrices] for name in NAMES}
                shares = {key: [] for name in NAMES for key in (f"{name}, first", name)} | {"stale gram": []}
            if step % gap == 0 and matrices:
                measure(matrices, chains, arguments.rank, step, shares)
        for name, values in shares.items():
            print(f"| {gap} | {name} | {statistics.mean(values):.4f} | {min(values):.4f} |", flush=True)


if __name__ == "__main__":
    main()
