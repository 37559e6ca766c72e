"""How several processes find one basis: thin products that all average, or the gradient to one owner that hands the basis on.

Each process has its own gradient as the factors dy (T x m) and x (T x n), as `fused_backward(mode="direct")` has it. Timed are whole
refreshes from those to a basis and the mean R in each process, the ways by turns in one process group, with gloo on this machine. Counted
are the elements that a process sends for one matrix, where an all-reduce of k elements sends 2 (N - 1) / N k, and reducing or broadcasting
half of that.

    python benchmarks/data_parallel/run.py            # 2 and 4 processes, and by count 64
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed, multiprocessing

from galore_torch.engine.processes import Processes
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.ops import linalg
from galore_torch.ops.outer import OuterProduct

SHAPES = {"60M, attention": (512, 512, 128), "60M, MLP": (512, 1376, 128), "1B, attention": (2048, 2048, 512)}
TOKENS = 512
WAYS = ("power", "owner", "everybody")


class Refresh:
    """One matrix: its factors here, and the basis in use (m x r)."""

    def __init__(self, shape: tuple[int, int, int], rank: int, processes: Processes) -> None:
        m, n, r = shape
        generator = torch.Generator().manual_seed(1 + rank)
        self.factors = OuterProduct(torch.randn(TOKENS, m, generator=generator), torch.randn(TOKENS, n, generator=generator))
        self.basis = torch.linalg.qr(torch.randn(m, r, generator=torch.Generator().manual_seed(0)))[0]
        self.processes, self.rank = processes, rank

    def power(self) -> tuple[Tensor, Tensor]:
        """The product's way: r-wide all-reduces."""
        grad = SharedGradient((self.factors,), self.factors.shape, torch.float32, torch.device("cpu"), self.processes)
        _, grad = grad.measured()
        basis = linalg.power_step(grad, self.basis, 1)
        return basis, basis.mT @ grad

    def owner(self) -> tuple[Tensor, Tensor]:
        """The gradient is reduced to one process, which finds the basis and R and broadcasts them."""
        dense = self.factors.dense() / self.processes.size
        distributed.reduce(dense, 0, group=self.processes.group)
        basis, low = torch.empty(self.basis.shape), torch.empty(self.basis.shape[1], dense.shape[1])
        if self.rank == 0:
            basis = linalg.power_step(dense, self.basis, 1).contiguous()
            low = basis.mT @ dense
        self.processes.from_one([basis, low])
        return basis, low

    def everybody(self) -> tuple[Tensor, Tensor]:
        """The gradient is all-reduced, and each process finds the same basis."""
        dense = self.processes.mean(self.factors.dense())
        basis = linalg.power_step(dense, self.basis, 1)
        return basis, basis.mT @ dense


def sent(way: str, shape: tuple[int, int, int], processes: int) -> float:
    """Elements that one process sends for one matrix, where each process owns as many matrices as the others."""
    m, n, r = shape
    share = (processes - 1) / processes
    if way == "power":
        return 2 * share * (m + 1 + r * n + r * m + r * n)
    return share * (m * n + m * r + r * n) if way == "owner" else 2 * share * m * n


def process(rank: int, size: int, port: int, rounds: int, names: list[str], out: multiprocessing.SimpleQueue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    processes = Processes(distributed.group.WORLD)
    for name in names:
        shape = SHAPES[name]
        one = Refresh(shape, rank, processes)
        ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {way: getattr(one, way) for way in WAYS}
        found = {way: run()[0] for way, run in ways.items()}
        same = all(float((found["power"].mT @ basis).square().sum()) > 0.999 * shape[2] for basis in found.values())
        assert same, "the ways find different subspaces"
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, run in ways.items():
                distributed.barrier()
                start = time.perf_counter()
                run()
                times[way].append(time.perf_counter() - start)
        if rank == 0:
            out.put((name, {way: statistics.median(each) for way, each in times.items()}))
    distributed.destroy_process_group()


def measured(size: int, rounds: int, names: list[str]) -> list[tuple[str, dict[str, float]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    group = [context.Process(target=process, args=(rank, size, port, rounds, names, out)) for rank in range(size)]
    for each in group:
        each.start()
    for each in group:
        each.join()
    if any(each.exitcode for each in group):
        raise SystemExit("a process has failed: see above")
    return [out.get() for _ in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    print("| m x n, rank | processes | ms: power | owner | everybody | elements sent: power | owner | everybody |")
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.processes:
        for name, times in measured(size, arguments.rounds, arguments.shapes):
            m, n, r = SHAPES[name]
            cells = [f"{1000 * times[way]:.0f}" for way in WAYS] + [f"{sent(way, SHAPES[name], size) / 1e6:.3g} M" for way in WAYS]
            print(f"| {name}: {m} x {n}, {r} | {size} | {' | '.join(cells)} |", flush=True)
    for name, shape in (*SHAPES.items(), ("7B, MLP", (4096, 11008, 1024)), ("7B, MLP", (4096, 11008, 256))):
        cells = ["", "", ""] + [f"{sent(way, shape, 64) / 1e6:.3g} M" for way in WAYS]
        print(f"| {name}: {shape[0]} x {shape[1]}, {shape[2]} | 64 | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
