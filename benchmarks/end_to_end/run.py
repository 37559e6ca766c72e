"""How many tokens a second does a whole training run see with each optimizer, refreshes included?

    python benchmarks/end_to_end/run.py --tokens 2048 256

The loop, model, data and optimizers of `galore pretrain` at LLaMA-60M's width, vocabulary of the tokenizer; galore-torch 1.0 steps
in the same loop. Each contender trains a model of its own on the same batches; they take turns in blocks of a few updates.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import NotInstalledError, peers_note
from interleave import timed
from peers import PEERS, PUBLISHED, add_peers_argument, chosen
from picture import Panel, draw
from report import cell, count, heading, progress, ratios, table
from small_llama import Nobody, add_data_arguments, text

from galore_torch import galore_param_groups
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import Batches, TokenData
from galore_torch.train.loop.build import model_for
from galore_torch.train.loop.result import RunResult
from galore_torch.train.loop.tasks import task_for
from galore_torch.train.loop.trainer import _attached, _Loop
from galore_torch.train.model.llama import PRESETS
from galore_torch.train.optimizers.registry import build_optimizer, optimizer_spec

LENGTH = 128  # tokens of one sequence
PRESET = "end_to_end"


@dataclass
class Run:
    """One contender half-way through its training."""

    loop: _Loop
    stream: Batches
    seconds: list[float] = field(default_factory=list)  # of each update

    @classmethod
    def of(cls, config: PretrainConfig, data: TokenData, name: str, device: str) -> Run:
        """``name``: an optimizer of `galore pretrain`, with what --gradients takes behind a colon, or a low-rank peer, which gets the same
        groups and learning rate as ours."""
        name, _, gradients = name.partition(":")
        config = replace(config, gradients=gradients or None)
        attached = nullcontext(None)
        model = model_for(config, data).to(device)
        if name in PEERS:
            lr, settings = optimizer_spec("galore_adamw").default_lr, config.optimizer_settings
            groups = galore_param_groups(
                model,
                settings["rank"],
                update_proj_gap=settings["update_proj_gap"],
                scale=settings["galore_scale"],
                proj_type=settings["proj_type"],
            )
            optimizer = PEERS[name].build(groups, lr)
        else:
            lr = optimizer_spec(name).default_lr
            optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
            attached = _attached(config, name, model, optimizer)
        task = task_for(config, data)
        loop = _Loop(
            *(config, model, optimizer, data, task, task.loss(model).train(), device, RunResult(name, lr), io.StringIO(), Nobody()),
            folder=Path(),
            fused=attached.__enter__(),
        )
        return cls(loop, data.batches(config))

    def update(self) -> None:
        self.seconds.append(timed(lambda: self.loop.update(len(self.seconds) + 1, self.stream), self.loop.device))


def train_all(arguments: argparse.Namespace, tokens: int) -> tuple[dict[str, list[float]], dict[str, str], int]:
    """(contender -> seconds of each update, why a peer is missing, parameters of the model)."""
    config, data = text(
        arguments,
        model_config=PRESET,
        max_length=LENGTH,
        batch_size=max(1, tokens // LENGTH),
        num_training_steps=arguments.steps,
        update_proj_gap=arguments.gap,
        rank=arguments.rank,
        grad_clipping=arguments.grad_clipping,
        dtype=arguments.dtype,
    )
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for name in (*chosen(arguments.peers, low_rank_only=True), *arguments.optimizers):
        try:
            runs[name] = Run.of(config, data, name, arguments.device)
        except NotInstalledError as missing:
            reasons[name] = str(missing)
    for name in ("adamw", "galore_adamw"):
        Run.of(config, data, name, arguments.device).update()  # what torch loads late is nobody's cost
    names = list(runs)
    for start in range(0, arguments.steps, arguments.block):
        for name in names:
            for _ in range(min(arguments.block, arguments.steps - start)):
                runs[name].update()
        names = names[1:] + names[:1]  # nobody is always first
        progress(f"{tokens} tokens: {min(start + arguments.block, arguments.steps)} of {arguments.steps} updates")
    progress("")
    parameters = sum(p.numel() for p in next(iter(runs.values())).loop.model.parameters())
    return {name: run.seconds for name, run in runs.items()}, reasons, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_peers_argument(parser, default=["galore-torch"])
    ours = ["adamw", "galore_adamw", "galore_adamw:full", "galore_adamw8bit"]
    parser.add_argument("--optimizers", nargs="+", default=ours, metavar="NAME[:GRADIENTS]", help="as in galore pretrain")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 256], help="tokens of one update")
    parser.add_argument("--steps", type=int, default=200, help="updates: at least one gap, for a mean with its refreshes")
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--block", type=int, default=5, help="updates of one contender before the next has its turn")
    parser.add_argument("--grad_clipping", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--picture", metavar="PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    PRESETS[PRESET] = replace(PRESETS["60m"], num_hidden_layers=arguments.layers, vocab_size=None)
    panels = []
    for tokens in arguments.tokens:
        seconds, reasons, parameters = train_all(arguments, tokens)
        middle = {name: tokens / statistics.median(values) for name, values in seconds.items()}
        whole = {name: tokens * len(values) / sum(values) for name, values in seconds.items()}
        settings = (
            f"{parameters / 1e6:.1f} million {arguments.dtype} parameters, {count(arguments.layers, 'layer')} of width 512, "
            f"{tokens} tokens an update, {arguments.steps} updates, rank {arguments.rank}, gap {arguments.gap}"
        )
        print(heading(settings, arguments.device))
        header = ["optimizer", "tokens/s, median", "of adamw", "of galore-torch 1.0"]
        header += ["tokens/s, whole run", "of adamw", "of galore-torch 1.0", "slowest update / median", "but the first"]
        rows = [
            [
                name,
                *(x for v in (middle, whole) for x in (f"{v[name]:.0f}", *(cell(ratios(v, b).get(name)) for b in ("adamw", PUBLISHED)))),
                # The first makes every basis, and compiles.
                *(f"{max(values[skip:], default=0.0) / statistics.median(values):.2f}" for skip in (0, 1)),
            ]
            for name, values in seconds.items()
        ]
        print(table(header, rows))
        print(peers_note([name for name in seconds if name in PEERS], reasons), flush=True)
        base = PUBLISHED if PUBLISHED in whole else "adamw"
        panels.append(Panel(f"{tokens} tokens an update", f"tokens/s of the whole run, {base} = 1 (more is better)", ratios(whole, base)))
    if arguments.picture:
        title = (
            f"LLaMA of width 512, {count(arguments.layers, 'layer')}, {arguments.steps} updates, rank {arguments.rank}, gap {arguments.gap}"
        )
        draw(arguments.picture, title, panels, ours=[name for name in arguments.optimizers if name.startswith("galore")])


if __name__ == "__main__":
    main()
