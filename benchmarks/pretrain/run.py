"""The GaLore paper's table 2 scaled down: GaLore, full rank, the other baselines and a frozen control at equal tokens.

    python benchmarks/pretrain/run.py --data TEXT... --eval_data TEXT...

Tunes the learning rates on a seed of its own, trains the reported seeds, and writes the table and its picture. Each run is a process;
its result is a line of build/pretrain/results.jsonl, so a call that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contest import METHODS, Run, Task
from table import Score, picture, report
from tuning import TUNING_SEED, add_run_arguments, best_on_grid, parsed_runs, saved_tokens

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "pretrain"
GRID = tuple(round(digit * 10.0**exponent, 9) for exponent in range(-5, 1) for digit in (1, 2, 3, 5))
# Where the search over the grid begins: a good guess saves runs and changes nothing else.
START = {
    "adamw": 1e-3,
    **dict.fromkeys(("galore_adamw", "galore_adamw8bit"), 1e-2),
    **dict.fromkeys(("low_rank", "lora", "relora"), 3e-3),
}
REST_START, MATRICES_BEFORE = 1e-2, 1e-3
# Sizes of the task that a method does not use: changing one does not ask for a new run of it.
_FULL = ("rank", "gap", "cycle", "scale")
UNUSED = {
    **dict.fromkeys(("adamw", "frozen"), _FULL),
    **dict.fromkeys(("galore_adamw", "galore_adamw8bit"), ("cycle",)),
    **dict.fromkeys(("low_rank", "lora"), ("gap", "cycle", "scale")),
    "relora": ("gap", "scale"),
}
PRESETS = {
    "small": Task(256, 688, 2, 4, vocab=512, length=128, batch=8, micro=8, steps=800, rank=85, gap=50, cycle=200, eval_tokens=131_072),
    # The published run of LLaMA-60M.
    "60m": Task(
        *(512, 1376, 8, 8, 32000),
        length=256,
        batch=512,
        micro=128,
        steps=10_000,
        rank=128,
        gap=200,
        cycle=2_000,
        eval_tokens=10_000_000,
        dtype="bfloat16",
    ),
}


class Contest:
    """Runs on one task and one text; results of earlier calls are reused."""

    def __init__(self, task: Task, tokens: Path, results: Path, threads: int):
        self.task, self.tokens, self.results, self.threads = task, tokens, results, threads
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        self.done = {self._key(row): row["result"] for row in map(json.loads, lines)}

    def run(self, method: str, seed: int, lr: float, rest_lr: float) -> dict[str, Any]:
        """The result of a run, which another process does unless it was done before."""
        row: dict[str, Any] = {"task": asdict(self.task), "run": asdict(Run(method, seed, lr, rest_lr)), "tokens": self.tokens.name}
        key = self._key(row)
        if key not in self.done:
            call = json.dumps({**row, "tokens": str(self.tokens), "threads": self.threads})
            done = subprocess.run([sys.executable, str(HERE / "contest.py"), call], stdout=subprocess.PIPE, text=True, check=True)
            row["result"] = json.loads(done.stdout.splitlines()[-1])["result"]
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row["result"]
        result = self.done[key]
        print(f"{method} seed {seed} lr {lr:g} rest {rest_lr:g}: {result['loss']:.4f} nats, {result['seconds']} s", flush=True)
        return result

    @staticmethod
    def _key(row: dict[str, Any]) -> str:
        """What settles the result: a run does not depend on what its method does not use."""
        unused = UNUSED.get(row["run"]["method"], ())
        task = {name: value for name, value in row["task"].items() if name not in unused}
        return json.dumps([task, row["run"], row["tokens"]], sort_keys=True)


def compete(contest: Contest, methods: list[str], seeds: list[int], lr: float | None, rest_lr: float | None) -> list[Score]:
    """Tune what is not given, then train every seed."""
    rest_tried: list[float] = []
    if rest_lr is None:

        def with_adamw(value: float) -> float:
            return float(contest.run("adamw", TUNING_SEED, MATRICES_BEFORE, value)["loss"])

        rest_lr, rest_tried = best_on_grid(with_adamw, REST_START, GRID)
    scores = []
    for method in methods:
        tuned, tried = (0.0 if method == "frozen" else lr), []
        if tuned is None:

            def loss(value: float, method: str = method) -> float:
                return float(contest.run(method, TUNING_SEED, value, rest_lr)["loss"])

            tuned, tried = best_on_grid(loss, START[method], GRID)
        scores.append(Score(method, tuned, tried, rest_lr, rest_tried))
    for seed in seeds:
        for score in scores:
            score.results[seed] = contest.run(score.method, seed, score.lr, rest_lr)
    return scores


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, BUILD / "results.jsonl", seeds=3)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the task; the sizes below change it")
    for name in ("hidden", "inner", "layers", "steps", "batch", "micro", "length", "rank", "gap", "cycle", "eval_tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lr", type=float, help="of the matrices; default: tuned for each method")
    parser.add_argument("--rest_lr", type=float, help="of embeddings, head and norms; default: tuned with AdamW")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the table, results.md, and its picture, results.png")
    return parsed_runs(parser)


def main() -> None:
    arguments = parsed()
    task = PRESETS[arguments.preset]
    sizes = {name: value for name in asdict(task) if (value := getattr(arguments, name, None)) is not None}
    task = replace(task, **sizes)
    tokens = saved_tokens(arguments, task)
    contest = Contest(task, tokens, arguments.results, arguments.threads)
    scores = compete(contest, arguments.methods, arguments.seeds, arguments.lr, arguments.rest_lr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = report(task, scores)
    (arguments.out / "results.md").write_text(written, encoding="utf-8")
    picture(arguments.out / "results.png", scores)
    print(written)


if __name__ == "__main__":
    main()
