"""How much memory does a training step take beyond the weights and the optimizer's state, and with them?

    python benchmarks/training_step/memory.py --preset 350m --batch 8 --length 256

A LLaMA with its vocabulary, loss in chunks of tokens, with and without recomputed activations. Bytes of tensors, from the allocator: the
second step of each contender (after the one that makes the basis), its weights, and its optimizer's state.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes
from report import heading, progress, table

from galore_torch import GaLoreAdamW, fused_backward, galore_param_groups
from galore_torch.train.model.llama import PRESETS, build_model
from galore_torch.train.model.loss import TokenLoss
from galore_torch.train.optimizers.registry import build_optimizer, state_bytes

CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "lora": ("lora", {}),
    "galore, full gradients": ("", {}),
    "galore, project": ("project", {}),
    "galore, update": ("update", {}),
    "galore, direct": ("direct", {}),
    "galore, direct, basis on the right": ("direct", {"proj_type": "right"}),
    "galore, direct_update": ("direct_update", {}),
    "galore, direct_update, basis on the right": ("direct_update", {"proj_type": "right"}),
}
ACTIVATIONS = {"kept": False, "recomputed": True}  # name -> whether layers are recomputed


def measured(name: str, arguments: argparse.Namespace, recomputed: bool) -> tuple[int, int, int]:
    """Bytes of weights, of the optimizer's state, and the most that a step adds to them."""
    mode, settings = CONTENDERS[name]
    shape = PRESETS[arguments.preset]
    rank = shape.hidden_size // 4
    model: Any = build_model(
        shape.with_vocab(32000), seed=0, dtype=arguments.dtype, bos_token_id=None, eos_token_id=None, activation_checkpointing=recomputed
    ).to(arguments.device)
    attachment = None
    if mode in ("adamw", "lora"):
        own = {"rank": rank, "weight_decay": 0.0, "beta1": None, "cycle_length": None}
        optimizer: Any = build_optimizer(mode, model, lr=1e-4, settings=own)
    else:
        optimizer = GaLoreAdamW(galore_param_groups(model, rank, update_proj_gap=10_000, **settings), lr=1e-4, compile=False)
        attachment = fused_backward(model, optimizer, mode) if mode else None
    loss_of = TokenLoss(model, chunk=None).train()
    words = torch.randint(32000, (arguments.batch, arguments.length), device=arguments.device)

    def step() -> None:
        loss_of(words, words).div(words.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    peak = peak_bytes(step, arguments.device)
    if attachment is not None:
        attachment.remove()
    return _bytes(model), state_bytes(optimizer), peak


def _bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="350m", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    print(heading(f"{arguments.preset}, {arguments.dtype}, {arguments.batch} x {arguments.length} tokens, rank a quarter of the width"))
    rows = []
    for activations in arguments.activations:
        for name in arguments.contenders:
            progress(f"{name}, {activations} activations")
            weights, state, peak = (x / 1e6 for x in measured(name, arguments, ACTIVATIONS[activations]))
            rows.append([activations, name, *(f"{x:.0f}" for x in (weights, state, peak, weights + state + peak))])
            progress("")
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(["activations", "optimizer, gradients", "weights, MB", "state, MB", "step's peak, MB", "in all, MB"], rows))


if __name__ == "__main__":
    main()
