"""What the head and its loss cost, forward and backward: whole logits, chunks of tokens, and torch's own linear_cross_entropy.

    python benchmarks/loss/run.py --threads 1

Contenders take turns; the last column is the loss's error against float64 of the same weights, on the first 256 tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes
from interleave import medians
from report import cell, heading, progress, ratios, table

from galore_torch.train.model.chunked_loss import head_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, d), weight (V, d), targets (N,) -> the sum of their losses


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def in_chunks(chunk: int) -> Loss:
    return lambda hidden, weight, targets: head_loss(hidden, weight, targets, chunk)


def contenders(chunks: list[int]) -> dict[str, Loss]:
    found = {"whole logits": whole} | {f"chunks of {chunk}": in_chunks(chunk) for chunk in chunks}
    return found | ({"torch's linear_cross_entropy": of_torch} if hasattr(F, "linear_cross_entropy") else {})


def measure(vocabulary: int, tokens: int, arguments: argparse.Namespace) -> list[list[str]]:
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, arguments.width, device=arguments.device).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((0.02 * torch.randn(vocabulary, arguments.width, device=arguments.device)).to(dtype))
    targets = torch.randint(0, vocabulary, (tokens,), device=arguments.device)

    def step(loss: Loss) -> None:
        hidden.grad = weight.grad = None
        (loss(hidden, weight, targets) / tokens).backward()

    steps = {name: lambda loss=loss: step(loss) for name, loss in contenders(arguments.chunks).items()}
    progress(f"{vocabulary}: memory")
    peaks = {}
    for name, call in steps.items():
        hidden.grad = weight.grad = None  # freed inside the call they would hide as much of what it takes
        peaks[name] = peak_bytes(call, arguments.device)
    progress(f"{vocabulary}: time")
    seconds = medians(steps, arguments.rounds, warm_up=1, device=arguments.device)
    few = (hidden[:256].detach(), weight.detach(), targets[:256])
    exact = F.cross_entropy(few[0].double() @ few[1].double().T, few[2], reduction="sum")
    with torch.no_grad():
        errors = {name: abs(loss(*few).double() / exact - 1).item() for name, loss in contenders(arguments.chunks).items()}
    relative = ratios(seconds, "whole logits")
    return [
        [str(vocabulary), str(tokens), name, cell(seconds[name]), cell(relative[name]), f"{peaks[name] / 1e6:,.0f}", f"{errors[name]:.0e}"]
        for name in steps
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["32000:512", "128256:512"], metavar="VOCABULARY:TOKENS")
    parser.add_argument("--chunks", nargs="+", type=int, default=[64], metavar="TOKENS")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for case in arguments.cases for row in measure(*map(int, case.split(":")), arguments)]
    progress("")
    print(heading(f"head of width {arguments.width}, {arguments.dtype}; {arguments.rounds} rounds", arguments.device))
    print(table(["vocabulary", "tokens", "loss", "s", "time / whole", "peak MB", "error of the loss"], rows))


if __name__ == "__main__":
    main()
