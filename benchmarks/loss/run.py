"""What the head and its loss cost, forward and backward: whole logits, chunks of tokens, and torch's own linear_cross_entropy.

    python benchmarks/loss/run.py --threads 1
    git show REVISION:src/galore_torch/train/model/chunked_loss.py > before.py
    python benchmarks/loss/run.py --threads 1 --before before.py --chunks 0 --width 1024 --dtype bfloat16

Contenders take turns. Errors are against float64 of the same numbers, on the first 256 tokens: of the loss, and of the weight's gradient
(root mean square over its own).
"""

from __future__ import annotations

import argparse
import importlib.util
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
from galore_torch.train.model.loss import settled_chunk

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, d), weight (V, d), targets (N,) -> the sum of their losses
WHOLE, TORCH = "whole logits", "torch's linear_cross_entropy"


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def in_chunks(chunk: int, loss: Callable[..., Tensor] = head_loss) -> Loss:
    return lambda hidden, weight, targets: loss(hidden, weight, targets, chunk or settled_chunk(None, len(weight), sys.maxsize))


def of_file(path: Path) -> Callable[..., Tensor]:
    """`head_loss` of another version's chunked_loss.py."""
    spec = importlib.util.spec_from_file_location("before", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: Callable[..., Tensor] = module.head_loss
    return loss


def contenders(arguments: argparse.Namespace) -> dict[str, Loss]:
    found: dict[str, Loss] = {WHOLE: whole}
    for chunk in arguments.chunks:
        words = f"chunks of {chunk}" if chunk else "chunks of 256 MiB of logits"
        if arguments.before:
            found[f"{words}, before"] = in_chunks(chunk, of_file(arguments.before))
        found[words] = in_chunks(chunk)
    if hasattr(F, "linear_cross_entropy"):
        found[TORCH] = of_torch
    return {name: loss for name, loss in found.items() if name not in arguments.without}


def errors(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[str]:
    """Of the loss and of the weight's gradient."""
    few = (hidden[:256].detach(), weight.detach().clone().requires_grad_(), targets[:256])
    exact = F.cross_entropy(few[0].double() @ few[1].double().T, few[2], reduction="sum")
    (truth,) = torch.autograd.grad(exact, few[1])  # rounded to the weight's dtype, as the best gradient is
    found = loss(*few)
    (grad,) = torch.autograd.grad(found, few[1])
    away = (grad.float() - truth.float()).norm() / truth.float().norm()
    return [f"{abs(found.double() / exact - 1).item():.0e}", f"{away.item():.1e}"]


def measure(vocabulary: int, tokens: int, arguments: argparse.Namespace) -> list[list[str]]:
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, arguments.width, device=arguments.device).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((0.02 * torch.randn(vocabulary, arguments.width, device=arguments.device)).to(dtype))
    targets = torch.randint(0, vocabulary, (tokens,), device=arguments.device)

    def step(loss: Loss) -> None:
        hidden.grad = weight.grad = None
        (loss(hidden, weight, targets) / tokens).backward()

    losses = contenders(arguments)
    steps = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    progress(f"{vocabulary}: memory")
    peaks = {}
    for name, call in steps.items():
        hidden.grad = weight.grad = None  # freed inside the call they would hide as much of what it takes
        peaks[name] = peak_bytes(call, arguments.device)
    progress(f"{vocabulary}: time")
    seconds = medians(steps, arguments.rounds, warm_up=1, device=arguments.device)
    base = next((name for name in steps if name.endswith("before")), WHOLE)
    relative = ratios(seconds, base)
    rows = []
    for name, loss in losses.items():
        own = [cell(seconds[name], 3), cell(relative[name]), f"{peaks[name] / 1e6:,.0f}", *errors(loss, hidden, weight, targets)]
        rows.append([str(vocabulary), str(tokens), name, *own])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["32000:512", "128256:512"], metavar="VOCABULARY:TOKENS")
    parser.add_argument("--chunks", nargs="+", type=int, default=[64], metavar="TOKENS", help="0: 256 MiB of logits")
    parser.add_argument("--before", type=Path, metavar="FILE", help="another version's chunked_loss.py, whose time is then 1")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="contenders to leave out")
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
    print(
        table(
            [
                "vocabulary",
                "tokens",
                "loss",
                "s",
                f"time / {'before' if arguments.before else 'whole'}",
                "peak MB",
                "error of the loss",
                "of the gradient",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main()
