"""Which operations make an fp32 copy of a bf16 gradient? The most that the allocator gives each, in MB of 10**6 bytes.

python benchmarks/loss/copies.py --rows 64000 --width 2048
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes
from report import heading, table

from galore_torch.ops.linalg import norm
from galore_torch.train.model.chunked_loss import head_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.nn.Parameter((0.02 * torch.randn(arguments.rows, arguments.width)).bfloat16())
    hidden = torch.randn(arguments.tokens, arguments.width).bfloat16()
    ids = torch.randint(0, arguments.rows, (arguments.tokens,))
    grad = torch.randn_like(weight.detach())
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear's backward pass": lambda: F.linear(hidden, weight).sum().backward(),
        "nn.Embedding's backward pass": lambda: F.embedding(ids, weight).sum().backward(),
        "head_loss, one chunk": lambda: head_loss(hidden, weight, ids, arguments.tokens).backward(),
        "torch.linalg.vector_norm in fp32": lambda: torch.linalg.vector_norm(grad, dtype=torch.float32),
        "our norm": lambda: norm(grad),
    }
    rows = []
    for name, call in calls.items():
        weight.grad = None
        rows.append([name, f"{peak_bytes(call) / 1e6:,.0f}"])
    print(heading(f"a matrix of {weight.nbytes / 1e6:.0f} MB in bfloat16"))
    print(table(["operation", "peak MB"], rows))


if __name__ == "__main__":
    main()
