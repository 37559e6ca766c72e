"""What does a step cost between refreshes, beside its own two GEMMs, galore-torch 1.0, torch's optimizers and the other peers?

    python benchmarks/step_time/run.py --threads 1

The projected matrices of a LLaMA, gradients that stay, all contenders in turn, medians of one run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import Contender, Work, add_work_arguments, available, our_builds, peers_note, two_gemms
from interleave import medians
from peers import PUBLISHED, add_peers_argument, chosen
from picture import Panel, draw
from report import cell, heading, progress, ratios, table

GEMMS = "its two GEMMs alone"
BUDGET = 60.0  # seconds that one contender may take of a run


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph. Its step number stays what it was at capture: right for timing, not for training."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--graph", action="store_true", help="CUDA: also our step replayed as a CUDA graph")
    parser.add_argument("--picture", metavar="PNG")
    arguments = parser.parse_args()
    work = Work.of(arguments)
    torch.manual_seed(0)
    own = our_builds(work.dtype, arguments.ours)
    theirs, reasons = available(chosen(arguments.peers), work)
    calls = {GEMMS: two_gemms(work)}
    for name, build in (theirs | own).items():
        progress(f"first step of {name}")
        calls[name] = Contender(build, work).between_refreshes().step
    if arguments.graph and work.device == "cuda":
        for name in own:
            try:
                calls[f"{name}, CUDA graph"] = captured(Contender(own[name], work).between_refreshes().step)
            except RuntimeError as failure:  # the step did what no graph can hold
                reasons[f"{name}, CUDA graph"] = str(failure).splitlines()[0]
    progress(f"{len(calls)} contenders, {arguments.rounds} rounds")
    times = medians(calls, arguments.rounds, device=work.device, budget=BUDGET)
    progress("")

    bases = {"of its GEMMs": GEMMS, "of galore-torch 1.0": PUBLISHED, "of GaLoreAdamW": "GaLoreAdamW"}
    columns = {title: ratios(times, base) for title, base in bases.items()}
    print(heading(f"{work}; {arguments.rounds} rounds", work.device))
    rows = [[name, f"{1e3 * t:.1f}", *(cell(column.get(name)) for column in columns.values())] for name, t in times.items()]
    print(table(["step", "ms", *columns], rows))
    print(peers_note(theirs, reasons))
    if arguments.picture:
        base = PUBLISHED if PUBLISHED in times else "GaLoreAdamW"
        panel = Panel("a step between refreshes", f"time, {base} = 1 (less is better)", ratios(times, base))
        draw(arguments.picture, str(work), [panel], ours=[name for name in times if name.startswith("GaLoreAdamW")])


if __name__ == "__main__":
    main()
