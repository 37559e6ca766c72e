"""Loss against bytes of optimizer state: the family, AdamW of 32, 8 and 4 bits, Muon, and optimizers without a state.

    python benchmarks/frontier/run.py --data TEXT... --eval_data TEXT... [--methods NAME...] [--task small|large|big_batch]

Embeddings, head and norms are torch's AdamW at one rate for all. The rate of the matrices is tuned for each method on a seed that is not
reported, on a grid of half octaves, until both neighbours are worse; no run is cut short. A seed has the same first weights, batches and
schedule in every method. Each run is a line of results.jsonl: an interrupted call goes on where it stopped, and the table grows
(`table.py`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pretrain"))
from contest import Task, held_out_loss
from methods import METHODS, beta2, matrices
from paired_runs import GRID, Results, train
from small_llama import machine
from tuning import TUNING_SEED, add_run_arguments, best_on_grid, parsed_runs, saved_tokens

from galore_torch.train.optimizers.registry import state_bytes

SMALL = Task(128, 344, 4, 4, vocab=512, length=128, batch=8, micro=8, steps=500, rank=32, gap=50, cycle=0, eval_tokens=131_072)
TASKS = {
    "small": SMALL,
    "big_batch": replace(SMALL, batch=128, micro=16, steps=250),
    "large": replace(SMALL, hidden=256, inner=688, rank=64, batch=16, steps=2000, gap=200),
}
IN_BF16 = {"big_batch", "large"}  # whose matrices multiply in bf16, by autocast: a run of "large" takes about 20 minutes so, and 35 in fp32
REST_LR = 0.01
RESULTS = Path(__file__).resolve().parent / "results.jsonl"


def measure(task: Task, name: str, seed: int, lr: float, data: dict[str, Tensor], bf16: bool = False) -> dict[str, Any]:
    """One run: held-out loss in nats a token, in fp32, and bytes of the matrices' state an element."""
    model = task.model(seed)
    own = METHODS[name].build(model, task, lr)
    chosen = set(map(id, matrices(model)))
    elements = sum(p.numel() for p in model.parameters() if id(p) in chosen)
    others = [p for p in model.parameters() if id(p) not in chosen]
    rest = torch.optim.AdamW(others, lr=REST_LR, betas=(0.9, beta2(task)), weight_decay=0.0, fused=True)
    train(task, model, {own: lr, rest: REST_LR}, seed, data["train"], f"{name}, lr {lr:g}", bf16)
    return {
        "loss": held_out_loss(model, task, data["held_out"]),
        "bytes": round(state_bytes(own) / elements, 4),
        "date": str(date.today()),
        "machine": machine(task.device),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, RESULTS, seeds=6)
    parser.add_argument("--task", choices=TASKS, default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parsed_runs(parser)


def main() -> None:
    from safetensors.torch import load_file

    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    task = replace(TASKS[arguments.task], device=arguments.device)
    tokens = saved_tokens(arguments, task)
    data = load_file(tokens)
    bf16 = arguments.task in IN_BF16
    common = {"task": asdict(task), "tokens": tokens.name, "rest_lr": REST_LR, **({"bf16": True} if bf16 else {})}
    results = Results(arguments.results, common, lambda name, seed, lr: measure(task, name, seed, lr, data, bf16))
    for name in arguments.methods:
        lr, _ = best_on_grid(lambda value, name=name: results.loss(name, TUNING_SEED, value), METHODS[name].start, GRID)
        for seed in arguments.seeds:
            results.run(name, seed, lr)


if __name__ == "__main__":
    main()
