"""What does step() cost over one whole gap, refreshes included, and how much does its slowest step stand out?

    python benchmarks/step_time/gap.py --threads 1

Contenders take turns step by step. The gradients change from step to step, so that refreshes do real work. galore-torch 1.0
refreshes all matrices at the first step of each gap. Ours does so at the very first step only, and then each matrix in turn once in
every gap: in the first gap, which is measured unless --skip says otherwise, each is refreshed twice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import Contender, Work, add_work_arguments, available, gradients, our_builds, peers_note
from interleave import timed
from peers import PUBLISHED, add_peers_argument, chosen
from picture import Panel, draw
from report import cell, heading, progress, ratios, table

SETS = 4  # of gradients, in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    add_peers_argument(parser, default=["galore-torch"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="steps before the measurement: as many as the gap, for the second gap")
    parser.add_argument("--picture", metavar="PNG")
    arguments = parser.parse_args()
    work = Work.of(arguments)
    torch.manual_seed(0)
    own = our_builds(work.dtype, arguments.ours)
    theirs, reasons = available(chosen(arguments.peers, low_rank_only=True), work)
    contenders = {name: Contender(build, work, gap=arguments.gap) for name, build in (theirs | own).items()}
    available_sets = gradients(work, SETS)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(arguments.skip + arguments.steps):
        for name, contender in contenders.items():
            contender.load(available_sets[step % SETS])
            times[name].append(timed(contender.step, work.device))
        progress(f"step {step + 1} of {arguments.skip + arguments.steps}")
    progress("")
    times = {name: values[arguments.skip :] for name, values in times.items()}

    totals = {name: sum(values) for name, values in times.items()}
    middle = {name: statistics.median(values) for name, values in times.items()}
    slowest = {name: max(values) / middle[name] for name, values in times.items()}
    # The first step of a run makes every basis, whichever optimizer's it is; the slowest of the others tells whether refreshes are spread.
    later = {name: max(values[0 if arguments.skip else 1 :], default=values[0]) / middle[name] for name, values in times.items()}
    of_published = ratios(totals, PUBLISHED)
    span = f"{arguments.skip + 1} to {arguments.skip + arguments.steps}"
    print(heading(f"{work}; steps {span}, gap {arguments.gap}", work.device))
    header = [
        "optimizer",
        "all steps s",
        "of galore-torch 1.0",
        "median step ms",
        "slowest / median",
        "without the first of the run",
    ]
    rows = [
        [name, f"{total:.2f}", cell(of_published.get(name)), f"{1e3 * middle[name]:.1f}", f"{slowest[name]:.2f}", f"{later[name]:.2f}"]
        for name, total in totals.items()
    ]
    print(table(header, rows))
    print(peers_note(theirs, reasons))
    if arguments.picture:
        panels = [
            Panel("all time in step()", "galore-torch 1.0 = 1 (less is better)", of_published),
            Panel("slowest step but the first of the run", "median step = 1 (less is better)", later),
        ]
        draw(arguments.picture, f"{work}; steps {span}, gap {arguments.gap}", panels, ours=list(own))


if __name__ == "__main__":
    main()
