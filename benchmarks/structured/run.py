"""What does a step without matrix products cost, beside torch's fused AdamW and a dense projection?

    python benchmarks/structured/run.py

Rows and block means of a LLaMA's matrices, gradients that stay, all contenders in turn, medians of one run.
"Traffic" is what a step has to move once, of AdamW's seven passes: G read, W and both moments read and written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import NEVER, Contender, Work, add_work_arguments
from interleave import medians
from report import heading, progress, table

from galore_torch import GaLoreAdamW
from galore_torch.engine.layout import layout_of
from galore_torch.ops.native import AdamStep, library
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES

ADAMW = "torch AdamW, fused"
MEANS = {"projector": "block_mean", "recovery": "foam"}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense: power": {"update_proj_gap": NEVER},
    "rows": {"projector": "rows", "update_proj_gap": NEVER},
    "rows, weight decay": {"projector": "rows", "update_proj_gap": NEVER, "weight_decay": 0.1},
    "rows, compile=False": {"projector": "rows", "update_proj_gap": NEVER, "compile": False},
    "frugal": {"projector": "rows", "update_proj_gap": NEVER, "recovery": "sign"},
    "block means": {"projector": "block_mean"},
    "fold": {"projector": "block_mean", "recovery": "fold"},
    "foam": MEANS,
    "foam, neighbours in a row": {**MEANS, "proj_type": "right"},
    "foam, neighbours in a column": {**MEANS, "proj_type": "left"},
    "foam, compile=False": {**MEANS, "compile": False},
}


def adamw(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups[0]["params"], lr=lr, fused=True, weight_decay=0.1)


def ours(settings: dict[str, Any]) -> Any:
    def build(groups: Any, lr: float) -> torch.optim.Optimizer:
        (group,) = groups
        return GaLoreAdamW([{"params": group["params"], "rank": group["rank"], "scale": group["scale"], **settings}], lr=lr)

    return build


def operator_alone(contender: Contender) -> Callable[[], None]:
    """The C++ operator, or Triton's kernel, on every matrix, with nothing of the optimizer around it: what Python's part of a step is."""
    optimizer, group = contender.optimizer, contender.optimizer.param_groups[0]
    keys = ("exp_avg", "exp_avg_sq", *(["basis"] if group["projector"] == "rows" else []))
    states = [(p.detach(), p.grad, tuple(optimizer.state[p][key] for key in keys)) for p in contender.params]
    how = AdamStep((0.1, 1e-3, 1e-9, 1e-6, 1.0, 1.0), RECOVERIES[group["recovery"]].residual or 0, rest=1e-9)

    def call() -> None:
        for weight, grad, tensors in states:
            assert grad is not None
            assert PROJECTORS[group["projector"]].adam[weight.device.type](weight, grad, tensors, how)

    return call


def passes(contender: Contender, settings: dict[str, Any]) -> Iterator[tuple[float, int]]:
    """(elements moved, elements) of each matrix."""
    group = contender.optimizer.param_groups[0]
    for p in contender.params:
        low, full = torch.Size(layout_of(p, group).low_shape).numel(), p.numel()
        if group["projector"] == "rows":
            others = 3 if settings.get("recovery") == "sign" else 2 if settings.get("weight_decay") else 0
            yield 7 * low + others * (full - low), full
        elif group["projector"] == "block_mean":
            yield 3 * full + 4 * low, full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--processor_time", action="store_true", help="one thread: its own time, where others use the processors too")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    work = Work.of(arguments)
    torch.manual_seed(0)
    contenders = {ADAMW: Contender(adamw, work)}
    for name in arguments.only:
        progress(f"first step of {name}")
        contenders[name] = Contender(ours(SETTINGS[name]), work).between_refreshes()
    progress(f"{len(contenders)} contenders, {arguments.rounds} rounds")
    steps = {name: contender.step for name, contender in contenders.items()}
    has_operator = work.device != "cpu" or library()
    alone = [name for name in arguments.only if "projector" in SETTINGS[name] and not SETTINGS[name].keys() & {"compile", "weight_decay"}]
    for name in alone if has_operator else ():
        steps[f"{name}: the operator alone"] = operator_alone(contenders[name])
    clock = time.thread_time if arguments.processor_time else time.perf_counter
    times = medians(steps, arguments.rounds, device=work.device, clock=clock)
    progress("")
    print(heading(f"{work}; {arguments.rounds} rounds{', processor time' if arguments.processor_time else ''}", work.device))
    rows = []
    for name, seconds in times.items():
        whole = name.partition(":")[0] if name.endswith("alone") else name
        moved = list(passes(contenders[whole], SETTINGS[whole])) if whole in SETTINGS else [(7.0, 1)]
        traffic = f"{sum(each for each, _ in moved) / sum(7 * full for _, full in moved):.2f}" if moved else "-"
        rows.append([name, f"{1e3 * seconds:.2f}", f"{seconds / times[ADAMW]:.2f}", traffic])
    print(table(["step", "ms", f"of {ADAMW}", "traffic"], rows))


if __name__ == "__main__":
    main()
