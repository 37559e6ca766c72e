"""A Fourier neural operator by AdamW, by GaLore on flattened gradients, and by Tensor-GaLore: test error, optimizer state, memory, time.

    pip install neuraloperator==2.0.0
    python benchmarks/operator/run.py --problem darcy --data FOLDER

A projected update has fewer numbers of the size that Adam gives them, so ``scale`` is the root of how many fewer: one learning rate then
serves spectral and other weights. It is tuned for AdamW, Tensor-GaLore and each flattening on a tenth of the training data, at ratio .25
with a seed of its own. Then every case runs with the same seeds: the same first weights and order of samples. A run is a line of the
results file, and is not done twice, so a call that was stopped goes on; ``--most 1`` does one run. `table.py` prints the tables and draws
the fields.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from problems import PROBLEMS, Problem
from torch import Tensor, nn
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes

from galore_torch import GaLoreAdamW
from galore_torch.slots.tucker import shared_ranks
from galore_torch.train.optimizers.registry import state_bytes

RATIOS = (0.25, 0.05, 0.1, 0.5, 1.0)
GRID = (5e-3, 1e-2, 2e-2, 4e-2)
TUNING_SEED = 1000


@dataclass(frozen=True)
class Case:
    """``method``: adamw; tensor; channels, a tensor whose frequencies stay whole; frequencies, one whose channels do; sparse, TensorGRaD,
    a fifth of the ratio as single elements; or matrix1, matrix2, matrix3, as published: so many leading dimensions are the rows of one.

    ``ratio``: of the elements of a spectral weight, of which a tensor's core keeps moments; a matrix has the rank whose state is as large.
    """

    method: str
    ratio: float = 1.0


CASES = [
    Case("adamw"),
    *(Case(method, 0.25) for method in ("tensor", "frequencies", "matrix2", "channels", "matrix1", "matrix3", "sparse")),
    *(Case("tensor", ratio) for ratio in RATIOS[1:]),
    *(Case(method, ratio) for ratio in (0.1, 0.5) for method in ("matrix1", "matrix2", "matrix3")),
]


class Flattened:
    """GaLore on the spectral weights as complex matrices: parameters on the same memory in another shape, a basis on the short side."""

    def __init__(self, spectral: list[Parameter], rows: int):
        self.spectral = spectral
        self.matrices = [Parameter(p.detach().view(prod(p.shape[:rows]), -1)) for p in spectral]

    def rank(self, state: int) -> list[int | None]:
        """Of the short side, whose moments (12 bytes) and basis (8) take about ``state`` bytes."""
        m, n = self.matrices[0].shape
        rank = min(max(1, round(state / (12 * max(m, n) + 8 * min(m, n)))), min(m, n))
        return [rank, None] if m <= n else [None, rank]

    def hand_over(self) -> None:
        for p, matrix in zip(self.spectral, self.matrices, strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.reshape(matrix.shape)


def nothing() -> None:
    """Before the step of an optimizer that steps on the model's own parameters."""


def build(case: Case, model: nn.Module, lr: float, gap: int) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """The optimizer, and what is called before each of its steps. Weights that are not spectral train at full rank in every case."""
    if case.method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), nothing
    spectral = [p for p in model.parameters() if p.is_complex()]
    rest = [p for p in model.parameters() if not p.is_complex()]
    group: dict[str, Any] = {"params": spectral, "update_proj_gap": gap, "tensor": True}
    if case.ratio < 1:
        group["rank"] = case.ratio
    before_step = nothing
    if case.method == "channels":
        sizes = spectral[0].shape
        group["rank"] = [*(max(1, round(size * case.ratio**0.5)) for size in sizes[:2]), *[None] * (len(sizes) - 2)]
    if case.method == "frequencies":
        group["rank"] = [None, None, *shared_ranks(tuple(spectral[0].shape[2:]), case.ratio)]
    if case.method == "sparse":
        group |= {"rank": 0.8 * case.ratio, "sparse": 0.2 * case.ratio}
    if case.method.startswith("matrix"):
        like = GaLoreAdamW([{**group, "params": [Parameter(spectral[0].detach().clone())]}])
        flat = Flattened(spectral, int(case.method[-1]))
        group |= {"params": flat.matrices, "rank": flat.rank(state_bytes(like))}
        before_step = flat.hand_over
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a flattening whose short side is not above its rank trains at full rank
        optimizer = GaLoreAdamW([{"params": rest}, group], lr=lr)
    p = optimizer.param_groups[1]["params"][0]
    core = optimizer.state[p]["exp_avg"].numel() - len(optimizer.state[p].get("basis_index", ()))
    optimizer.param_groups[1]["scale"] = (p.numel() / core) ** 0.5
    return optimizer, before_step


@dataclass(frozen=True)
class Run:
    problem: str
    case: Case
    lr: float
    seed: int
    epochs: int
    tuning: bool
    width: int
    modes: int
    batch: int
    gap: int

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def train(run: Run, problem: Problem, keep: Path | None) -> dict[str, Any]:
    """One run; ``keep``: a file for the predictions of the first test samples."""
    from neuralop.losses import H1Loss, LpLoss
    from neuralop.models import FNO

    data = problem.tuning() if run.tuning else problem
    torch.manual_seed(run.seed)
    model = FNO(n_modes=(run.modes, run.modes), hidden_channels=run.width, in_channels=1, out_channels=1, n_layers=4)
    optimizer, before_step = build(run.case, model, run.lr, run.gap)
    (x, y), losses = data.train, {"l2": LpLoss(d=2, p=2), "h1": H1Loss(d=2)}
    steps = run.epochs * (len(x) // run.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def predict(inputs: Tensor) -> Tensor:
        out: Tensor = model(inputs)
        return data.mean + data.std * out

    def step(rows: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        (losses["h1"](predict(x[rows]), y[rows]) / len(rows)).backward()
        before_step()
        optimizer.step()
        schedule.step()

    peak, began, took = 0, 0.0, 0.0
    for epoch in range(run.epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed + 7919 * epoch))
        began = time.process_time()
        for i, rows in enumerate(order[: steps // run.epochs * run.batch].split(run.batch)):
            if epoch == 0 and i == 1:
                peak = peak_bytes(lambda rows=rows: step(rows))  # type: ignore[misc]
            else:
                step(rows)
        took += (time.process_time() - began) * (epoch > 0)
    errors: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, (inputs, truth) in data.tests.items():
            found = torch.cat([predict(part) for part in inputs.split(50)])
            errors[name] = {kind: float(loss(found, truth)) / len(inputs) for kind, loss in losses.items()}
            if keep is not None and not run.tuning:
                keep.parent.mkdir(parents=True, exist_ok=True)
                torch.save({"input": inputs[:3], "truth": truth[:3], "prediction": found[:3]}, keep.with_suffix(f".{name.split()[0]}.pt"))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        **asdict(run),
        "errors": errors,
        "state_bytes": state_bytes(optimizer),
        "peak_bytes": held + state_bytes(optimizer) + peak,
        "seconds_an_epoch": took / max(1, run.epochs - 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def planned(arguments: argparse.Namespace, done: dict[str, dict[str, Any]]) -> Iterator[Run]:
    """The runs in order: first the rates, then the first seed of every case, then the others. Rates are read from what is done."""
    shared = {name: getattr(arguments, name) for name in ("problem", "width", "modes", "batch", "gap")}
    methods = dict.fromkeys(case.method for case in CASES[: arguments.cases])
    tuned: dict[str, list[Run]] = {}
    for method in methods:
        epochs = max(1, arguments.epochs // 2)
        tuned[method] = [
            Run(case=Case(method, 1.0 if method == "adamw" else 0.25), lr=lr, seed=TUNING_SEED, epochs=epochs, tuning=True, **shared)
            for lr in GRID
        ]
        yield from tuned[method]
    best = {
        method: min(runs, key=lambda run: done[run.key()]["errors"]["held out"]["h1"]).lr
        for method, runs in tuned.items()
        if all(run.key() in done for run in runs)
    }
    for seed in range(1, arguments.seeds + 1):
        for case in CASES[: arguments.cases]:
            if case.method in best:
                yield Run(case=case, lr=best[case.method], seed=seed, epochs=arguments.epochs, tuning=False, **shared)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Run.key() -> its line."""
    fields = set(Run.__dataclass_fields__)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {json.dumps({key: line[key] for key in fields}, sort_keys=True): line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=PROBLEMS, default="darcy")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the .npz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--fields", type=Path, default=Path(__file__).resolve().parents[2] / "build" / "operator")
    for name, default in (("epochs", 16), ("width", 24), ("modes", 12), ("batch", 32), ("gap", 50), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--most", type=int, default=1 << 30, help="stop after so many runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="neuralop")
    problem = PROBLEMS[arguments.problem](arguments.data)
    for _ in range(arguments.most):
        done = read(arguments.out)
        run = next((run for run in planned(arguments, done) if run.key() not in done), None)
        if run is None:
            sys.exit(3)  # all done
        keep = arguments.fields / f"{run.problem}-{run.case.method}-{run.case.ratio}.pt" if run.seed == 1 else None
        line = train(run, problem, keep)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(run.case.method, run.case.ratio, run.lr, run.seed, line["errors"], line["state_bytes"], round(line["seconds_an_epoch"], 2))


if __name__ == "__main__":
    main()
