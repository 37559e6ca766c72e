"""Which side should the basis be on? Held-out perplexity of a small LLaMA for each `proj_type`, with tuned rates and paired seeds.

    python benchmarks/side/perplexity.py --data TEXT... --eval_data TEXT...
    python benchmarks/side/perplexity.py --preset 60m --device cuda --rest_lr 0.01 --data TEXT... --eval_data TEXT...    # for a GPU

The learning rate of the matrices is tuned for each variant on a seed of its own; that of embeddings, head and norms (torch's AdamW) is
the same for all. A seed has the same first weights, batches and schedule in every variant. Each run is a line of the results file, so a
call that was interrupted goes on where it stopped. The text and the sizes of "60m" are those of benchmarks/pretrain.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrain"))
from contest import Task, held_out_loss
from paired_runs import GRID, Results, paired, train
from report import heading, table
from run import PRESETS
from tuning import TUNING_SEED, add_run_arguments, best_on_grid, parsed_runs, saved_tokens

from galore_torch import GaLoreAdamW, galore_param_groups
from galore_torch.train.optimizers.registry import state_bytes

BUILD = Path(__file__).resolve().parents[2] / "build" / "side"
SMALL = replace(PRESETS["small"], hidden=192, inner=512, layers=4, heads=4, rank=48, steps=600)


@dataclass(frozen=True)
class Variant:
    """``shared``: q, k and v are one stacked layer, and so are gate and up: one basis for the matrices that read the same input.

    ``side`` None: torch's AdamW on whole gradients, for scale.
    """

    label: str
    side: str | None
    shared: bool = False
    start: float = 0.01  # where the search for a learning rate begins


VARIANTS = {
    "std": Variant("std (short side)", "std"),
    "right": Variant("right (input side)", "right"),
    "reverse_std": Variant("reverse_std (long side)", "reverse_std"),
    "shared": Variant("right, one basis for q, k, v and one for gate, up", "right", shared=True),
    "left": Variant("left (output side)", "left"),
    "adamw": Variant("full-rank AdamW", None, start=0.00125),
}
DEFAULT = ("std", "right", "reverse_std", "shared")
PAIRS = (("right", "std"), ("reverse_std", "std"), ("left", "std"), ("shared", "std"), ("shared", "right"), ("reverse_std", "right"))
SHARING = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


class Rows(nn.Module):
    """Rows start ... end of a stacked linear layer, as a layer of their own."""

    def __init__(self, stacked: nn.Linear, start: int, end: int):
        super().__init__()
        self.stacked, self.rows = stacked, slice(start, end)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stacked.weight[self.rows])


def stack(model: nn.Module) -> None:
    """Replace the layers that share an input by rows of one linear layer with the same weights; what the model computes is unchanged.

    The gradient of the stacked weight is the stacked gradient, R = G Q has the rows of each G_i Q, and Adam's rule is elementwise: a
    basis on the right of the stacked weight is one basis shared by its parts, and nothing else changes.
    """
    for name, module in list(model.named_modules()):
        keys = SHARING.get(name.rpartition(".")[2], ())
        parts = {key: getattr(module, key) for key in keys}
        if not parts:
            continue
        weight = torch.cat([part.weight.detach() for part in parts.values()])
        stacked = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        stacked.weight = nn.Parameter(weight)
        start = 0
        for key, part in parts.items():
            setattr(module, key, Rows(stacked, start, start + part.out_features))
            start += part.out_features


def optimizers(model: nn.Module, task: Task, variant: Variant, lr: float, rest_lr: float) -> tuple[torch.optim.Optimizer, ...]:
    """(of the matrices, of embeddings, head and norms)."""
    group = galore_param_groups(model, task.rank, update_proj_gap=task.gap, scale=task.scale, proj_type=variant.side or "std")[-1]
    matrices = [p for _, p in group["params"]]
    chosen = set(map(id, matrices))
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], lr=rest_lr, weight_decay=0.0)
    if variant.side is None:
        return torch.optim.AdamW(matrices, lr=lr, weight_decay=0.0), rest
    return GaLoreAdamW([group], lr=lr), rest


def measure(task: Task, variant: Variant, seed: int, lr: float, rest_lr: float, data: dict[str, Tensor]) -> dict[str, Any]:
    """One run: held-out loss in nats a token, bytes of the matrices' optimizer state, seconds."""
    start = time.perf_counter()
    model = task.model(seed)
    if variant.shared:
        stack(model)
    built = optimizers(model, task, variant, lr, rest_lr)
    train(task, model, dict(zip(built, (lr, rest_lr), strict=True)), seed, data["train"], f"{variant.label}, lr {lr:g}")
    trained = round(time.perf_counter() - start, 1)
    return {"loss": held_out_loss(model, task, data["held_out"]), "state": state_bytes(built[0]), "seconds": trained}


def results_of(task: Task, tokens: Path, file: Path, rest_lr: float) -> Results:
    """The runs in `file`, and new ones, of a task on the text in `tokens`."""
    from safetensors.torch import load_file

    data = load_file(tokens)
    common = {"task": asdict(task), "tokens": tokens.name, "rest_lr": rest_lr}
    return Results(file, common, lambda name, seed, lr: measure(task, VARIANTS[name], seed, lr, rest_lr, data))


def report(results: Results, names: Sequence[str], seeds: Sequence[int], tuned: dict[str, tuple[float, list[float]]]) -> str:
    losses = {name: [results.loss(name, seed, tuned[name][0]) for seed in seeds] for name in names}
    rows = []
    for name in names:
        lr, tried = tuned[name]
        perplexities = [math.exp(value) for value in losses[name]]
        state = results.run(name, seeds[0], lr)["state"]
        rows.append(
            [
                VARIANTS[name].label,
                f"{lr:g} ({', '.join(f'{value:g}' for value in tried)})",
                f"{statistics.mean(perplexities):.2f}",
                ", ".join(f"{value:.2f}" for value in perplexities),
                f"{state / 1e3:.0f}",
            ]
        )
    header = ["side of the basis", "lr (tried)", "held-out perplexity, mean", "each seed", "state of the matrices, kB"]
    differences = []
    for first, second in PAIRS:
        if first in losses and second in losses and len(seeds) > 1:
            mean, deviation, t, half = paired(losses[first], losses[second])
            cells = [f"{mean:+.4f}", f"{deviation:.4f}", f"{t:+.2f}", f"{mean - half:+.4f} to {mean + half:+.4f}"]
            differences.append([f"{first} - {second}", *cells, "noise" if abs(mean) < half else "worse" if mean > 0 else "better"])
    second_header = ["difference, nats", "mean", "s.d. of the pairs", "t", "95 % interval", "verdict"]
    return f"{table(header, rows)}\n\n{table(second_header, differences)}\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, BUILD / "results.jsonl", seeds=5)
    parser.add_argument("--preset", choices=("small", "60m"), default="small", help="the task; the sizes below change it")
    for name in ("hidden", "inner", "layers", "heads", "steps", "batch", "micro", "length", "rank", "gap", "eval_tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT))
    parser.add_argument("--lr", type=float, help="of the matrices; default: tuned for each variant")
    parser.add_argument("--rest_lr", type=float, default=0.01, help="of embeddings, head and norms")
    return parsed_runs(parser)


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    task = {"small": SMALL, "60m": PRESETS["60m"]}[arguments.preset]
    task = replace(task, **{name: value for name in asdict(task) if (value := getattr(arguments, name, None)) is not None})
    results = results_of(task, saved_tokens(arguments, task), arguments.results, arguments.rest_lr)
    tuned: dict[str, tuple[float, list[float]]] = {}
    for name in arguments.variants:

        def at(value: float, name: str = name) -> float:
            return results.loss(name, TUNING_SEED, value)

        tuned[name] = (arguments.lr, []) if arguments.lr else best_on_grid(at, VARIANTS[name].start, GRID)
    for seed in arguments.seeds:
        for name in arguments.variants:
            results.run(name, seed, tuned[name][0])
    parameters = sum(p.numel() for p in task.model(0).parameters())
    settings = (
        f"LLaMA of width {task.hidden}, {task.layers} layers, vocabulary {task.vocab}, {task.dtype}, {parameters / 1e6:.2f} million "
        f"parameters; {task.steps} updates of {task.batch} x {task.length} tokens ({task.steps * task.batch * task.length / 1e6:.2f} "
        f"million); warm-up over a tenth, cosine to 10 %; rank {task.rank}, gap {task.gap}, scale {task.scale}; embeddings, head and norms "
        f"at {arguments.rest_lr:g}; tuned on seed {TUNING_SEED}"
    )
    print(heading(settings, arguments.device))
    print(report(results, arguments.variants, arguments.seeds, tuned))


if __name__ == "__main__":
    main()
