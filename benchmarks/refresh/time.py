"""What does one refresh cost, beside galore-torch 1.0's full SVD and beside two GEMMs of the same size?

    python benchmarks/refresh/time.py

Interleaved in one run, medians, fp32. The gradient has a spectrum that falls as i^-0.7; the warm basis is one that has turned a little.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleave import medians
from published import published
from small_llama import machine

from galore_torch.linalg import orthonormalize
from galore_torch.projectors import PROJECTORS

SHAPES = [(512, 512, 128), (512, 1376, 128), (1376, 512, 128), (1024, 2736, 256), (2048, 5461, 512)]
LLAMA_60M = {(512, 512, 128): 4, (512, 1376, 128): 1, (1376, 512, 128): 2}  # matrices of one layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    projector_class = published("galore_projector").GaLoreProjector
    print(f"{date.today()}, {machine()}\n")
    print("| shape, rank | two GEMMs ms | power / GEMMs | rsvd / GEMMs | gram / GEMMs | 1.0's SVD / power | energy of power |")
    print("|---|---|---|---|---|---|---|")
    total = {"power": 0.0, "published": 0.0}
    for m, n, r in SHAPES:
        torch.manual_seed(0)
        k = min(m, n)
        U, V = orthonormalize(torch.randn(m, k)), orthonormalize(torch.randn(n, k))
        G = (U * torch.arange(1, k + 1) ** -0.7) @ V.mT
        mode = 1 if m >= n else 0
        start = {mode: orthonormalize((V if mode else U)[:, :r] + 0.05 * torch.randn(k, r))}
        A = G.mT if mode else G
        theirs = projector_class(r, update_proj_gap=1)

        calls = {
            "gemms": lambda A=A, P=start[mode]: A @ (A.mT @ P),
            "published": lambda G=G, r=r, p=theirs: p.get_orthogonal_matrix(G, r, type="right" if G.shape[0] >= G.shape[1] else "left"),
            **{name: lambda G=G, r=r, start=start, name=name: PROJECTORS[name](G, r, start, 0) for name in ("power", "rsvd", "gram")},
        }
        t = medians(calls, rounds=9 if m < 2000 else 3, warm_up=1)
        basis = PROJECTORS["power"](G, r, start, 0)[mode]
        share = float((basis.mT @ A).square().sum() / torch.linalg.svdvals(G)[:r].square().sum())
        for name in total:
            total[name] += t[name] * LLAMA_60M.get((m, n, r), 0)
        ratios = " | ".join(f"{t[name] / t['gemms']:.1f}" for name in ("power", "rsvd", "gram"))
        print(f"| {m} x {n}, {r} | {1e3 * t['gemms']:.1f} | {ratios} | {t['published'] / t['power']:.1f} | {share:.4f} |", flush=True)
    print(f"\nLLaMA-60M, one layer's seven matrices: 1.0's refresh takes {total['published'] / total['power']:.1f} times as long as power.")


if __name__ == "__main__":
    main()
