"""What does one training step cost (forward, backward, optimizer), where the full gradient is made and where it is not?

    python benchmarks/training_step/run.py --tokens 2048 256 --threads 1

LLaMA blocks at the widths of 60M, 130M and 350M, in fp32, without the vocabulary: every contender has a model of its own and sees the
same input; they take turns. Medians, so a step without a refresh; benchmarks/end_to_end counts the refreshes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleave import medians
from picture import Panel, draw
from report import cell, heading, progress, ratios, table

from galore_torch import GaLoreAdamW, fused_backward, galore_param_groups
from galore_torch.train.model.llama import PRESETS, build_model

LENGTH = 256  # tokens of one sequence
VOCABULARY = 64  # next to nothing: a head's gradient is made in full with every optimizer
CONTENDERS: dict[str, tuple[str | None, dict[str, Any]]] = {  # name -> (mode of the backward pass, settings of the groups)
    "adamw": (None, {}),
    "galore, full gradients": ("full", {}),
    "galore, project": ("project", {}),
    "galore, direct": ("direct", {}),
    "galore, direct, basis on the right": ("direct", {"proj_type": "right"}),
    "galore, direct_update": ("direct_update", {}),
}


def blocks(preset: str, layers: int) -> nn.Module:
    shape = replace(PRESETS[preset], num_hidden_layers=layers, vocab_size=VOCABULARY)
    model: nn.Module = build_model(shape, seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False)
    return model


def contender(name: str, preset: str, layers: int, tokens: int, device: str) -> Callable[[], None]:
    """One training step. The first few, in which shapes are compiled and the first basis is found, are left to the warm-up."""
    mode, settings = CONTENDERS[name]
    model = blocks(preset, layers).to(device)
    if mode is None:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        rank = PRESETS[preset].hidden_size // 4
        optimizer = GaLoreAdamW(galore_param_groups(model, rank, update_proj_gap=10_000, **settings), lr=1e-4, compile=True)
        if mode != "full":
            model.attachment = fused_backward(model, optimizer, mode)
    words = torch.randint(VOCABULARY, (max(1, tokens // LENGTH), min(tokens, LENGTH)), device=device)

    def step() -> None:
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["60m", "130m", "350m"], choices=list(PRESETS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 256])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--picture", metavar="PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(heading(f"fp32, {arguments.layers} blocks, rank a quarter of the width, medians of {arguments.rounds} turns", arguments.device))
    rows, panels = [], []
    for tokens in arguments.tokens:
        for preset in arguments.presets:
            progress(f"{tokens} tokens, width of {preset}")
            calls = {name: contender(name, preset, arguments.layers, tokens, arguments.device) for name in arguments.contenders}
            seconds = medians(calls, arguments.rounds, warm_up=4, device=arguments.device)
            of_adamw, of_project = ratios(seconds, "adamw"), ratios(seconds, "galore, project")
            width = PRESETS[preset].hidden_size
            rows += [
                [str(tokens), f"{preset}, {width}", name, f"{1e3 * value:.1f}", cell(of_adamw.get(name)), cell(of_project.get(name))]
                for name, value in seconds.items()
            ]
            panels.append(Panel(f"{tokens} tokens, width {width}", "time of AdamW's step", of_adamw))
    progress("")
    print(table(["tokens", "blocks of", "optimizer, gradients", "ms a step", "of adamw", "of project"], rows))
    if arguments.picture:
        draw(arguments.picture, "One training step", panels, [name for name in CONTENDERS if "direct" in name])


if __name__ == "__main__":
    main()
