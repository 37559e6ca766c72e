"""How much of the best rank-r energy does each projector keep, on the gradients of a real training run?

    python benchmarks/refresh/energy.py
    python benchmarks/refresh/energy.py --model_config 60m --layers 2 --rank 128 --batch 8 --length 256
    python benchmarks/refresh/energy.py --hf_model FOLDER --rank 144 --batch 8 --length 256 --steps 5 --gaps 1

Each projector refreshes its own chains of bases, one a gap, on the same gradients, beside the run's own optimizer. "own" is
||basis^T G||^2 over that of the exact subspace, on the gradient G that made the basis; "next" the same on the gradient one step
later, over that of the exact subspace of G: on what the basis is used for. "stale" is the exact basis of one gap ago.
``--hf_model`` takes the gradients of a trained model, batch after batch, without updating it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import count, heading
from small_llama import add_data_arguments, loss, steps, text

from galore_torch import GaLoreAdamW, galore_param_groups
from galore_torch.engine.layout import projected_axes
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.train.data.loader import batches
from galore_torch.train.model.llama import PRESETS

NAMES = ("power", "rsvd", "gram", "random")


def energy(G: torch.Tensor, basis: torch.Tensor, axis: int) -> float:
    return float((basis.mT @ G if axis == -2 else G @ basis).square().sum())


class Chains:
    """Every projector's bases of every matrix, refreshed every ``gap`` steps, and the shares they kept."""

    def __init__(self, gap: int, rank: int):
        self.gap, self.rank = gap, rank
        self.bases: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        self.own: dict[str, list[float]] = {}
        self.next: dict[str, list[float]] = {}

    def refresh(self, matrices: list[torch.Tensor], step: int) -> None:
        for i, G in enumerate(matrices):
            (axis,) = projected_axes(tuple(G.shape), "std")
            best = float(torch.linalg.svdvals(G)[: self.rank].square().sum())
            if (old := self.bases.get(("gram", i))) is not None:
                self.own.setdefault("stale", []).append(energy(G, old[axis], axis) / best)
            for name in NAMES:
                found = PROJECTORS[name].find(G, {axis: self.rank}, self.bases.get((name, i)), step)
                self.bases[name, i] = dict(found)
                self.own.setdefault(self.label(name, step), []).append(energy(G, found[axis], axis) / best)

    def look_ahead(self, matrices: list[torch.Tensor], step: int) -> None:
        for i, G in enumerate(matrices):
            (axis,) = projected_axes(tuple(G.shape), "std")
            kept = {name: energy(G, self.bases[name, i][axis], axis) for name in NAMES}
            for name in NAMES:
                self.next.setdefault(self.label(name, step - 1), []).append(kept[name] / kept["gram"])

    @staticmethod
    def label(name: str, step: int) -> str:
        return name if step else f"{name}, first"


def training_gradients(arguments: Any) -> Iterator[list[torch.Tensor]]:
    """The projected matrices' gradients at every step of a run of `galore pretrain`'s model with GaLoreAdamW."""
    config, data = text(
        arguments,
        model_config=arguments.model_config,
        max_length=arguments.length,
        batch_size=arguments.batch,
        num_training_steps=arguments.steps,
        lr=0.01,
        rank=arguments.rank,
    )

    def build(model: torch.nn.Module) -> GaLoreAdamW:
        return GaLoreAdamW(galore_param_groups(model, arguments.rank, update_proj_gap=200, projector="gram"), lr=0.01)

    for _, _, optimizer in steps(config, data, build):
        if matrices := [p.grad for p in optimizer.param_groups[-1]["params"] if p.grad is not None]:
            yield matrices


def pretrained_gradients(arguments: Any) -> Iterator[list[torch.Tensor]]:
    """Gradients of a trained causal LM in a local folder, with its own tokenizer; every fifth layer, for the time it takes."""
    from transformers import AutoModelForCausalLM

    arguments.tokenizer = arguments.hf_model
    model = AutoModelForCausalLM.from_pretrained(arguments.hf_model, dtype=torch.float32, local_files_only=True)
    _, data = text(arguments, max_length=arguments.length, batch_size=arguments.batch)
    layers = [p for layer in model.model.layers[::5] for p in layer.parameters() if p.dim() == 2]
    for _, (inputs, targets) in zip(range(arguments.steps), batches(data.train, arguments.length, arguments.batch, 0), strict=False):
        model.zero_grad()
        loss(model, inputs, targets).backward()
        yield [p.grad for p in layers if p.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--model_config", default="demo", choices=PRESETS, help="the model that trains, with the tokenizer's vocabulary")
    parser.add_argument("--layers", type=int, help="so many layers of it")
    parser.add_argument("--hf_model", help="folder of a trained model, in place of a training run")
    parser.add_argument("--steps", type=int, default=402)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--gaps", type=int, nargs="+", default=[200, 50, 10])
    arguments = parser.parse_args()
    layers = arguments.layers or PRESETS[arguments.model_config].num_hidden_layers
    shape = replace(PRESETS[arguments.model_config], num_hidden_layers=layers, vocab_size=None)
    PRESETS[arguments.model_config] = shape
    what = f"{count(layers, 'layer')} of LLaMA of width {shape.hidden_size}"
    what = f"a trained {Path(arguments.hf_model).name}" if arguments.hf_model else what
    chains = [Chains(gap, arguments.rank) for gap in arguments.gaps]
    gradients = pretrained_gradients(arguments) if arguments.hf_model else training_gradients(arguments)
    for step, matrices in enumerate(gradients):
        for chain in chains:
            if step and (step - 1) % chain.gap == 0:
                chain.look_ahead(matrices, step)
            if step % chain.gap == 0:
                chain.refresh(matrices, step)
    sizes = f"rank {arguments.rank}, batches of {arguments.batch} x {arguments.length} tokens, {arguments.steps} steps"
    print(heading(f"one seed, {what}, {sizes}"))
    print("| gap | projector | own: mean | own: worst matrix | next: mean | next: worst matrix |\n|---|---|---|---|---|---|")
    for chain in chains:
        for name, own in chain.own.items():
            later = chain.next.get(name)
            ahead = f"{statistics.mean(later):.4f} | {min(later):.4f}" if later else "- | -"
            print(f"| {chain.gap} | {name} | {statistics.mean(own):.4f} | {min(own):.4f} | {ahead} |", flush=True)


if __name__ == "__main__":
    main()
