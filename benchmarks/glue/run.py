"""Fine-tuning on GLUE: full, LoRA and GaLore, each rate tuned on a seed that is not reported, then other seeds at that rate.

Every run is one of `galore finetune`. Its result is a line of results.jsonl: what is there is not run again, so that the table grows from
call to call, and processes with other methods or seeds can share the file. `python benchmarks/glue/table.py` makes the table.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import torch
from report import progress
from rich.console import Console
from small_llama import machine
from tuning import parsed_runs

from galore_torch.train.commands.finetune import finetune
from galore_torch.train.config.finetune import FinetuneConfig

RESULTS = Path(__file__).with_name("results.jsonl")
TUNING_SEED = 0  # of the grid alone
SEEDS = (1, 2, 3, 4, 5)
FULL, GALORE, LORA = (1e-5, 3e-5, 1e-4), (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """A row of the table. `scale`: the published one of its rank (arXiv 2403.03507, table 7)."""

    name: str
    rank: int | None
    grid: tuple[float, ...]
    scale: float | None = None

    @property
    def key(self) -> str:
        return self.name if self.rank is None else f"{self.name} r={self.rank}"


METHODS = {
    method.key: method
    for method in (
        Method("full", None, FULL),
        *(Method("lora", rank, LORA) for rank in (4, 8)),
        *(Method("galore", rank, GALORE, scale) for rank, scale in ((4, 4.0), (8, 2.0))),
        *(Method("galore8bit", rank, GALORE, scale) for rank, scale in ((4, 4.0), (8, 2.0))),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a pre-trained encoder")
    parser.add_argument("--data", required=True, help="folder with TASK/train.jsonl.gz and TASK/dev.jsonl.gz")
    parser.add_argument("--tasks", nargs="+", default=["rte", "mrpc", "cola", "stsb"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--grid", type=float, nargs="+", help="rates to try (default: each method's own)")
    parser.add_argument("--freeze", nargs="*", default=[], help="parameters that no method trains, such as embeddings")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=0, help="in place of --epochs, for a look at whether all of it runs")
    parser.add_argument("--minutes", type=float, help="start no run after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parsed_runs(parser, TUNING_SEED)
    torch.set_num_threads(arguments.threads)
    output, started = arguments.output, time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        for key in arguments.methods:
            for plan in plans(arguments, task, METHODS[key], output):
                if arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes:
                    progress(f"{arguments.minutes:g} minutes are over; the same command goes on\n")
                    return
                progress(f"{task} {key} lr {plan['lr']:g} seed {plan['seed']}")
                with tempfile.TemporaryDirectory() as folder:
                    line = json.dumps(plan | measured(arguments, METHODS[key], plan, Path(folder) / "run"))
                with output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    progress("")


def plans(arguments: argparse.Namespace, task: str, method: Method, output: Path) -> Iterator[dict[str, Any]]:
    """The runs of one method on one task that are not in the file: the grid, then the seeds at its best rate."""
    how = {"steps": arguments.steps} if arguments.steps else {"epochs": arguments.epochs}
    common = {"task": task, "method": method.key, "model": Path(arguments.model).name, "freeze": arguments.freeze, **how}
    common |= {"batch_size": arguments.batch_size, "max_length": arguments.max_length}
    grid = arguments.grid or method.grid
    for lr in grid:
        plan = common | {"lr": lr, "seed": TUNING_SEED}
        if found(output, plan) is None:
            yield plan
    tuned = [(row["best"], -lr) for lr in grid if (row := found(output, common | {"lr": lr, "seed": TUNING_SEED})) is not None]
    lr = -max(tuned)[1]
    for seed in arguments.seeds:
        plan = common | {"lr": lr, "seed": seed}
        if found(output, plan) is None:
            yield plan


def found(output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The line of a run that has been made."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    return next((row for row in map(json.loads, lines) if plan.items() <= row.items()), None)


def measured(arguments: argparse.Namespace, method: Method, plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train in a new folder, and read what the run wrote there."""
    settings: dict[str, Any] = {"lr": plan["lr"], "seed": plan["seed"], "batch_size": plan["batch_size"], "max_length": plan["max_length"]}
    settings |= {"num_training_steps": plan["steps"]} if "steps" in plan else {"num_train_epochs": plan["epochs"]}
    settings |= {"rank": method.rank} if method.rank else {}
    settings |= {"galore_scale": method.scale} if method.scale else {}
    config = FinetuneConfig(
        hf_model=arguments.model,
        task_name=plan["task"],
        data_dir=arguments.data,
        optimizer=method.name,
        freeze=tuple(plan["freeze"]),
        warmup_steps=None,  # a tenth
        save_every=10**9,
        save_dir=str(folder),
        **settings,
    )
    said = io.StringIO()
    if code := finetune(config, Console(file=said)):
        print(said.getvalue(), file=sys.stderr)
        raise SystemExit(code)
    (record,) = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = next(row["memory_mb"] for row in rows if "memory_mb" in row)
    score = next(iter(record["scores_last"]))
    return {
        "score": score,
        "last": record["scores_last"][score],
        "best": record["scores_best"][score],
        "best_step": record["score_best_step"],
        "scores_last": record["scores_last"],
        "scores_best": record["scores_best"],
        "curve": [[row["step"], row["scores"][score]] for row in rows if "scores" in row],
        "memory_mb": memory,
        "state_mb": record["optimizer_state_mb"],
        "peak_mb": record["peak_memory_mb"],
        "seconds": record["seconds"],
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine("cpu"),
    }


if __name__ == "__main__":
    main()
