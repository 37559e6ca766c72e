"""Does GaLore drift in a long run? 20,000 steps of a small LLaMA: held-out loss, weight norms, and how orthonormal the bases stay.

    python benchmarks/long_run/run.py --data TEXT... --eval_data TEXT...    # every line, one after the other
    python benchmarks/long_run/run.py --data ... --lines galore             # one of them; another process may do another
    python benchmarks/long_run/run.py --data ... --report                   # the table and the picture of what there is

All lines share the first weights, the batches and the schedule of the seed. A look at the model is a line of the results, and the run is
saved beside them: a call that was interrupted goes on where it stopped, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrain"))
from contest import Task, held_out_loss
from curves import picture, report
from report import heading, progress
from small_llama import add_data_arguments, loss
from tuning import TUNING_SEED, saved_tokens

from galore_torch import GaLoreAdamW, galore_param_groups
from galore_torch.engine.layout import ParamView
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.train.data.loader import batches
from galore_torch.train.optimizers.schedule import Schedule

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "long_run"
TASK = Task(64, 176, 2, 4, vocab=512, length=64, batch=4, micro=4, steps=20_000, rank=16, gap=200, cycle=0, eval_tokens=32_768)
WARMUP = 400


@dataclass(frozen=True)
class Line:
    """``lr``, ``rest_lr``: of the matrices of attention and MLP, and of embeddings, head and norms."""

    label: str
    low_rank: bool
    lr: float
    rest_lr: float
    dtype: str = "float32"


LINES = {
    "adamw": Line("AdamW, fp32", False, 1e-3, 5e-3),
    "galore": Line("GaLore, fp32", True, 5e-3, 5e-3),
    "galore_bf16": Line("GaLore, bf16 weights rounded at random", True, 5e-3, 5e-3, "bfloat16"),
}


class Widened(nn.Module):
    """A model with 16-bit weights and fp32 arithmetic: what is measured is how weights are kept, and products are quick everywhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Any:
        return functional_call(self.inner, {name: p.float() for name, p in self.inner.named_parameters()}, (), inputs)


def optimizer_of(model: nn.Module, task: Task, line: Line) -> torch.optim.Optimizer:
    """One optimizer of two groups: [the rest, the matrices]."""
    rest, matrices = galore_param_groups(model, task.rank, update_proj_gap=task.gap, scale=task.scale)
    rest["lr"], matrices["lr"] = line.rest_lr, line.lr
    if line.low_rank:
        return GaLoreAdamW([rest, matrices], compile=False)
    split = [{"params": [p for _, p in group["params"]], "lr": group["lr"]} for group in (rest, matrices)]
    return torch.optim.AdamW(split, eps=1e-6, weight_decay=0.0)


class Run:
    """One line of one seed, which can be put down and taken up again."""

    def __init__(self, task: Task, line: Line, seed: int, data: dict[str, Tensor]) -> None:
        self.task, self.data = replace(task, dtype=line.dtype), data
        model = self.task.model(seed)
        self.model = model if line.dtype == "float32" else Widened(model)
        self.optimizer: Any = optimizer_of(self.model, task, line)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = Schedule("cosine", task.steps, min(WARMUP, task.steps // 2), task.floor)
        self.seed, self.step, self.seconds = seed, 0, 0.0

    def train(self, every: int, stop: int | None) -> Iterator[dict[str, Any]]:
        """What a look after every so many steps finds, up to step ``stop``."""
        stream = batches(self.data["train"], self.task.length, self.task.batch, self.seed, self.step * self.task.batch)
        while self.step < min(self.task.steps, stop or self.task.steps):
            start, losses, kept = time.perf_counter(), 0.0, list[float]()
            for _ in range(every):
                value, shares = self._one(*next(stream))
                losses += value
                kept += shares
            self.seconds += time.perf_counter() - start
            yield {"step": self.step, "train": losses / every, "kept": mean(kept), "refreshes": len(kept), **self.look()}

    def _one(self, inputs: Tensor, targets: Tensor) -> tuple[float, list[float]]:
        """(training loss before the step, share of the momentum's norm that each of its refreshes carried over)."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.schedule.factor(self.step)
        value = loss(self.model, inputs, targets)
        value.backward()
        before = [(view, view.state["basis"].clone().float(), view.state["exp_avg"].clone()) for view in self._due()]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return value.item(), [carried(*each) for each in before]

    def _projected(self) -> list[ParamView]:
        if not isinstance(self.optimizer, GaLoreAdamW):
            return []
        views = [self.optimizer.view_of(p) for group in self.optimizer.param_groups for p in group["params"]]
        return [view for view in views if view.layout.ranks]

    def _due(self) -> list[ParamView]:
        return [view for view in self._projected() if self.step and refresh_is_due(view.state, view.group)]

    def look(self) -> dict[str, float]:
        """Held-out loss in nats a token, norms of the weights, and the largest element of Q^T Q - I over all bases."""
        matrices = self.optimizer.param_groups[1]["params"]
        bases = [view.state["basis"].float() for view in self._projected()]
        return {
            "held_out": held_out_loss(self.model, self.task, self.data["held_out"]),
            "norm": norm(self.model.parameters()),
            "norm_matrices": norm(matrices),
            "orthogonality": max((float((Q.mT @ Q - torch.eye(Q.shape[-1])).abs().max()) for Q in bases), default=0.0),
        }

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds}
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def take_up(self, path: Path) -> None:
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def carried(view: ParamView, old: Tensor, momentum: Tensor) -> float:
    """||C M|| / ||M|| of the first moment M, where C = basis^T old basis is what "rotate" multiplies it by."""
    C = view.state["basis"].float().mT @ old  # (r, n) @ (n, r)
    moved = C @ momentum if -2 in view.layout.ranks else momentum @ C.mT
    return float(moved.norm() / momentum.norm())


def norm(weights: Iterable[Tensor]) -> float:
    """Of all of them as one vector."""
    return float(torch.stack([p.detach().float().norm() for p in weights]).norm())


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def run_line(name: str, line: Line, task: Task, arguments: argparse.Namespace, data: dict[str, Tensor]) -> float:
    """Train a line from where it stopped to its end; its last held-out loss. Each look is a line of the results."""
    settings = {"line": name, "seed": arguments.seed, "lr": line.lr, "rest_lr": line.rest_lr, "steps": task.steps}
    saved = arguments.results.parent / f"{'-'.join(map(str, settings.values()))}.pt"
    run = Run(task, line, arguments.seed, data)
    if saved.exists():
        run.take_up(saved)
    for row in run.train(arguments.every, arguments.stop):
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**settings, **row, "seconds": round(run.seconds, 1)}) + "\n")
        run.save(saved)
        progress(f"{name}, lr {line.lr:g}: {run.step} of {task.steps}, {row['held_out']:.4f} nats, {run.seconds:.0f} s")
    progress("")
    return run.look()["held_out"]


def tuned(name: str, task: Task, arguments: argparse.Namespace, data: dict[str, Tensor]) -> None:
    """Print the held-out loss of each pair of rates, on a seed and a length of their own."""
    for lr, rest_lr in product(arguments.lr, arguments.rest_lr):
        found = run_line(name, replace(LINES[name], lr=lr, rest_lr=rest_lr), task, arguments, data)
        print(f"{name} lr {lr:g} rest_lr {rest_lr:g}: {found:.4f}", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    for field in ("steps", "hidden", "inner", "layers", "heads", "batch", "length", "rank", "gap", "eval_tokens"):
        parser.add_argument(f"--{field}", type=int, default=getattr(TASK, field))
    parser.add_argument("--every", type=int, default=500, help="steps between two looks; a divisor of the steps")
    parser.add_argument("--stop", type=int, help="put the run down after this step; the same call without it goes on")
    parser.add_argument("--most_tokens", type=int, default=20_000_000, help="of the training text")
    parser.add_argument("--lr", type=float, nargs="+", help=f"tune: try these, on seed {TUNING_SEED}")
    parser.add_argument("--rest_lr", type=float, nargs="+", default=[5e-3], help="tune: with each of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--results", type=Path, default=BUILD / "results.jsonl", help="runs are saved beside it")
    parser.add_argument("--picture", type=Path, default=BUILD / "results.png")
    arguments = parser.parse_args()
    if arguments.steps % arguments.every:
        parser.error(f"--every {arguments.every} does not divide --steps {arguments.steps}")
    arguments.seed = TUNING_SEED if arguments.lr else arguments.seed
    return arguments


def main() -> None:
    from safetensors.torch import load_file

    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    sizes = {name: value for name in asdict(TASK) if (value := getattr(arguments, name, None)) is not None}
    task = replace(TASK, **sizes)
    if not arguments.report:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        data = load_file(saved_tokens(arguments, task))
        for name in arguments.lines:
            if arguments.lr:
                tuned(name, task, arguments, data)
            else:
                run_line(name, LINES[name], task, arguments, data)
    if not arguments.lr:
        labels = {name: LINES[name].label for name in arguments.lines}
        rows = [row for row in map(json.loads, arguments.results.read_text(encoding="utf-8").splitlines()) if row["steps"] == task.steps]
        print(heading(f"{task}, warm-up over {WARMUP} steps, cosine to {task.floor:.0%}, seed {arguments.seed}"))
        print(report(labels, [row for row in rows if row["seed"] == arguments.seed]))
        picture(arguments.picture, labels, [row for row in rows if row["seed"] == arguments.seed])


if __name__ == "__main__":
    main()
