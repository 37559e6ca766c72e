"""One run of the pre-training contest, in a process of its own: `run.py` starts it with JSON and reads one line of JSON back.

Every method shares the first weights, the batches and the schedule of its seed. Embeddings, head and norms are torch's AdamW at one
learning rate in each; the matrices of attention and MLP belong to the method.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_llama import loss, machine

from galore_torch import galore_param_groups
from galore_torch.train.data.loader import batches, windows_in_order
from galore_torch.train.device import memory_mb
from galore_torch.train.model.llama import ModelShape, build_model
from galore_torch.train.optimizers.registry import build_optimizer, state_bytes
from galore_torch.train.optimizers.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """`optimizer` is a name of `galore pretrain`, None where the matrices are not trained."""

    label: str
    optimizer: str | None


METHODS = {
    "adamw": Method("full-rank AdamW", "adamw"),
    "galore_adamw": Method("GaLore", "galore_adamw"),
    "galore_adamw8bit": Method("8-bit GaLore", "galore_adamw8bit"),
    "low_rank": Method("low-rank, W = BA", "low_rank"),
    "lora": Method("LoRA", "lora"),
    "relora": Method("ReLoRA", "relora"),
    "frozen": Method("frozen matrices (control)", None),
}


@dataclass(frozen=True)
class Task:
    """What all runs share. Lengths are in tokens, `batch` and `micro` (at once in memory) in sequences, `cycle` in updates."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocab: int
    length: int
    batch: int
    micro: int
    steps: int
    rank: int
    gap: int
    cycle: int
    eval_tokens: int
    scale: float = 0.25
    floor: float = 0.1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def shape(self) -> ModelShape:
        return ModelShape(self.hidden, self.inner, self.layers, self.heads, max(1024, self.length), self.vocab)

    def model(self, seed: int) -> nn.Module:
        """The seed's first weights."""
        built = build_model(self.shape, seed=seed, dtype=self.dtype, bos_token_id=None, eos_token_id=None, activation_checkpointing=False)
        return built.to(self.device)

    def lr_factor(self, step: int, method: str) -> float:
        """Warm-up over a tenth, cosine to the floor. ReLoRA's adapters warm up again after each merge: that is a part of it."""
        kind = "cosine_restarts" if method == "relora" else "cosine"
        again = max(1, self.cycle // 10)
        return Schedule(kind, self.steps, self.steps // 10, self.floor, cycle=self.cycle, restart_warmup=again).factor(step)


@dataclass(frozen=True)
class Run:
    """`lr` is the peak of the matrices, `rest_lr` that of embeddings, head and norms."""

    method: str
    seed: int
    lr: float
    rest_lr: float


def optimizers(model: nn.Module, task: Task, run: Run) -> dict[str, torch.optim.Optimizer]:
    """{"rest": AdamW of embeddings, head and norms, "matrices": the method's own}; the baselines change the layers first."""
    matrices = [p for _, p in galore_param_groups(model, task.rank)[-1]["params"]]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    for p in rest:  # what is frozen no method takes
        p.requires_grad_(False)
    built = {}
    method = METHODS[run.method]
    if method.optimizer is None:
        for p in matrices:
            p.requires_grad_(False)
    else:
        settings = {
            "rank": task.rank,
            "update_proj_gap": task.gap,
            "gap_range": None,
            "galore_scale": task.scale,
            "proj_type": "std",
            "weight_decay": 0.0,
            "beta1": None,
            "cycle_length": task.cycle,
        }
        built["matrices"] = build_optimizer(method.optimizer, model, lr=run.lr, settings=settings)
        others = set(map(id, rest))
        for group in built["matrices"].param_groups:  # what is frozen would train here too, once thawed
            group["params"] = [p for p in group["params"] if id(p) not in others]
    for p in rest:
        p.requires_grad_(True)
    return {"rest": torch.optim.AdamW(rest, lr=run.rest_lr, weight_decay=0.0), **built}


def train(task: Task, run: Run, tokens: Tensor) -> Iterator[tuple[float, nn.Module, dict[str, torch.optim.Optimizer]]]:
    """Yield (training loss, model, optimizers) of each update, before the weights change."""
    model = task.model(run.seed)
    torch.manual_seed(run.seed)  # adapters and dropout, whatever the model drew
    built = optimizers(model, task, run)
    peaks = {"rest": run.rest_lr, "matrices": run.lr}
    stream = batches(tokens, task.length, task.batch, run.seed)
    for step in range(task.steps):
        for name, optimizer in built.items():
            for group in optimizer.param_groups:
                group["lr"] = peaks[name] * task.lr_factor(step, run.method if name == "matrices" else "")
        inputs, targets = (whole.to(task.device) for whole in next(stream))
        total = 0.0
        for some_inputs, some_targets in zip(inputs.split(task.micro), targets.split(task.micro), strict=True):
            part = loss(model, some_inputs, some_targets) * (len(some_inputs) / task.batch)
            part.backward()
            total += part.item()
        yield total, model, built
        for optimizer in built.values():
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: nn.Module, task: Task, tokens: Tensor) -> float:
    """Mean nats a token over the held-out text, cut into windows; dropout is off."""
    model.eval()
    total = count = 0.0
    for inputs, targets in windows_in_order(tokens, task.length, task.micro):
        total += loss(model, inputs.to(task.device), targets.to(task.device), "sum").item()
        count += targets.numel()
    return total / count


def measure(task: Task, run: Run, tokens: Tensor, held_out: Tensor) -> dict[str, Any]:
    """What one line of the results holds. Memory is in bytes of storages, but resident memory in MB as the system counts it."""
    start_mb, start = memory_mb(task.device)["rss_mb"], time.perf_counter()
    losses = []
    for value, model, built in train(task, run, tokens):
        losses.append(value)
        # The last look is before the last update, after which ReLoRA may have forgotten its moments.
        state, weights = {name: state_bytes(optimizer) for name, optimizer in built.items()}, sum(p.nbytes for p in model.parameters())
    seconds = time.perf_counter() - start
    peak = memory_mb(task.device)  # of training: evaluation comes after
    tail = losses[-max(1, task.steps // 10) :]
    return {
        "loss": held_out_loss(model, task, held_out),
        "first_loss": losses[0],
        "last_train_loss": sum(tail) / len(tail),
        "weights": weights,
        "state": state,
        "start_mb": start_mb,
        **{key: value for key, value in peak.items() if "peak" in key},
        "seconds": round(seconds, 1),
        "date": str(date.today()),
        "machine": machine(task.device),
    }


def main() -> None:
    from safetensors.torch import load_file

    call = json.loads(sys.argv[1])
    torch.set_num_threads(call["threads"])
    data = load_file(call["tokens"])
    task, run = Task(**call["task"]), Run(**call["run"])
    print(json.dumps({"task": asdict(task), "run": asdict(run), "result": measure(task, run, data["train"], data["held_out"])}))


if __name__ == "__main__":
    main()
