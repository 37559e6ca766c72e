"""What does one refresh cost, beside galore-torch 1.0's full SVD and beside its own two GEMMs?

    python benchmarks/refresh/time.py

Interleaved in one run, medians, fp32. The gradient has a spectrum that falls as i^-0.7; the warm basis is one that has turned a
little. On a CUDA device the shapes are LLaMA-7B's, and the 224 refreshes of its 32 layers stand beside the SVDs of three matrices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import NotInstalledError
from interleave import medians
from picture import Panel, draw
from published import published
from report import cell, heading, progress, table

from galore_torch.ops.linalg import orthonormalize
from galore_torch.slots.projectors import PROJECTORS

OURS = ("power", "rsvd", "gram")
PUBLISHED = "1.0"
Shape = tuple[int, int, int]  # rows, columns, rank
LLAMA_60M: dict[Shape, int] = {(512, 512, 128): 4, (1376, 512, 128): 2, (512, 1376, 128): 1}  # matrices of one layer
LLAMA_7B: dict[Shape, int] = {(4096, 4096, 1024): 4, (11008, 4096, 1024): 2, (4096, 11008, 1024): 1}
SHAPES = {"cpu": [*LLAMA_60M, (1024, 2736, 256), (2048, 5461, 512)], "cuda": [*LLAMA_7B]}


def theirs(m: int, n: int, rank: int) -> Callable[[torch.Tensor], Any]:
    """galore-torch 1.0's refresh of an m x n gradient."""
    projector = published("galore_projector").GaLoreProjector(rank, update_proj_gap=1)
    side = "right" if m >= n else "left"
    return lambda G: projector.get_orthogonal_matrix(G, rank, type=side)


def measure(shape: Shape, device: str, rounds: int) -> tuple[dict[str, float], float]:
    """(seconds of each contender, share of the best energy that `power` keeps)."""
    m, n, rank = shape
    torch.manual_seed(0)
    k = min(m, n)
    U, V = (orthonormalize(torch.randn(size, k, device=device)) for size in (m, n))
    G = (U * torch.arange(1, k + 1, device=device) ** -0.7) @ V.mT
    axis = -1 if m >= n else -2
    A = G.mT if axis == -1 else G
    P = orthonormalize((V if axis == -1 else U)[:, :rank] + 0.05 * torch.randn(k, rank, device=device))
    calls: dict[str, Callable[[], Any]] = {"gemms": lambda: A @ (A.mT @ P)}
    for name in OURS:
        calls[name] = lambda name=name: PROJECTORS[name].find(G, {axis: rank}, {axis: P}, 0)  # type: ignore[misc]
    try:
        refresh = theirs(*shape)
        calls[PUBLISHED] = lambda: refresh(G)
    except NotInstalledError as missing:
        progress(str(missing))
    seconds = medians(calls, rounds if k < 2000 else min(3, rounds), warm_up=1, device=device)
    basis = PROJECTORS["power"].find(G, {axis: rank}, {axis: P}, 0)[axis]
    return seconds, float((basis.mT @ A).square().sum() / torch.linalg.svdvals(G)[:rank].square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--picture", metavar="PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    taken: dict[Shape, dict[str, float]] = {}
    rows, speed = [], {}
    for shape in SHAPES[arguments.device]:
        label = f"{shape[0]} x {shape[1]}, {shape[2]}"
        progress(label)
        t, share = measure(shape, arguments.device, arguments.rounds)
        taken[shape] = t
        if PUBLISHED in t:
            speed[label] = t[PUBLISHED] / t["power"]
        cost = [cell(t[name] / t["gemms"]) for name in OURS]
        rows.append([label, f"{1e3 * t['gemms']:.1f}", *cost, cell(speed.get(label), 1), cell(share, 4)])
    progress("")
    print(heading("fp32, medians", arguments.device))
    print(table(["shape, rank", "two GEMMs ms", *(f"{name} / GEMMs" for name in OURS), "1.0's SVD / power", "energy of power"], rows))
    if arguments.device == "cpu" and speed:
        mean = statistics.mean(taken[shape][PUBLISHED] / taken[shape]["power"] for shape, count in LLAMA_60M.items() for _ in range(count))
        total = {name: sum(taken[shape][name] * count for shape, count in LLAMA_60M.items()) for name in ("power", "gemms", PUBLISHED)}
        print(f"\nLLaMA-60M, one layer's seven matrices: 1.0's refresh takes {mean:.1f} times as long as power, the mean over matrices; ")
        print(f"{total[PUBLISHED] / total['power']:.1f} times in sum. Power takes {total['power'] / total['gemms']:.2f} times its GEMMs.")
    if arguments.device == "cuda":
        ours = 32 * sum(taken[shape]["power"] * count for shape, count in LLAMA_7B.items())
        svd = {shape: t[PUBLISHED] for shape, t in taken.items() if PUBLISHED in t}
        print(f"\nLLaMA-7B: 224 refreshes take {ours:.2f} s; the SVD of one matrix of each shape takes {sum(svd.values()):.1f} s.")
    if arguments.picture and speed:
        draw(arguments.picture, "galore-torch 1.0's refresh", [Panel("", "time, power = 1", speed)], ours=list(speed))


if __name__ == "__main__":
    main()
