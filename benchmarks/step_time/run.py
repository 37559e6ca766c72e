"""What does a step cost between refreshes, beside its own two GEMMs, galore-torch 1.0 and torch's AdamW?

    python benchmarks/step_time/run.py --layers 8 --threads 1

LLaMA-60M's projected matrices (rank 128), gradients that stay, all contenders in turn, medians of one run.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleave import medians
from published import published
from small_llama import machine

from galore_torch import GaLoreAdamW, GaLoreAdamW8bit

LAYER = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
RANK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", FutureWarning)  # 1.0's deprecation of itself
    dtype = getattr(torch, arguments.dtype)
    shapes = LAYER * arguments.layers
    torch.manual_seed(0)
    grads = [(1e-3 * torch.randn(shape)).to(dtype) for shape in shapes]

    def stepper(cls: Any, projected: bool = True, **kwargs: Any) -> Callable[[], Any]:
        params = [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in shapes]
        keys = {"rank": RANK, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"} if projected else {}
        optimizer = cls([{"params": params, **keys}], lr=1e-3, **kwargs)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()  # the only refresh
        for state in optimizer.state.values():
            state["turn"] = 0  # and no later one inside the measurement
        return optimizer.step

    weights = [nn.Parameter(grad.clone()) for grad in grads]
    bases = [torch.randn(min(shape), RANK).to(dtype) for shape in shapes]

    @torch.no_grad()
    def gemms() -> None:
        for W, G, P in zip(weights, grads, bases, strict=True):
            if W.shape[0] >= W.shape[1]:
                W.addmm_(G @ P, P.mT, alpha=-1e-9)
            else:
                W.addmm_(P, P.mT @ G, alpha=-1e-9)

    contenders = {
        "its two GEMMs alone": gemms,
        "galore-torch 1.0 AdamW": stepper(published("adamw").AdamW, no_deprecation_warning=True),
        "GaLoreAdamW": stepper(GaLoreAdamW),
        "GaLoreAdamW, bf16 moments": stepper(GaLoreAdamW, state_codec="bf16"),
        "GaLoreAdamW8bit": stepper(GaLoreAdamW8bit),
        "torch AdamW, foreach": stepper(torch.optim.AdamW, projected=False, foreach=True),
        "torch AdamW, fused": stepper(torch.optim.AdamW, projected=False, fused=True),
    }
    if dtype == torch.bfloat16:
        contenders["GaLoreAdamW, weights rounded to nearest"] = stepper(GaLoreAdamW, stochastic_rounding=False)
    t = medians(contenders, arguments.rounds)
    print(f"{date.today()}, {machine()}; {arguments.dtype}, {arguments.layers} layers of LLaMA-60M, {arguments.rounds} rounds\n")
    print("| step | ms | of its GEMMs | of galore-torch 1.0 |\n|---|---|---|---|")
    for name, seconds in t.items():
        gemm, theirs = seconds / t["its two GEMMs alone"], seconds / t["galore-torch 1.0 AdamW"]
        print(f"| {name} | {1e3 * seconds:.1f} | {gemm:.2f} | {theirs:.2f} |")


if __name__ == "__main__":
    main()
