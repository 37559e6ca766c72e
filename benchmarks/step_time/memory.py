"""How much memory does a step need beside weights, gradients and state, as a multiple of the largest matrix?

    python benchmarks/step_time/memory.py

Counted by the allocator, at a step between refreshes and at one that refreshes every matrix. State made at the first step is not
counted. An optimizer that handles all matrices at once (foreach) needs more the more layers there are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes
from contenders import Contender, Work, add_work_arguments, available, our_builds, peers_note
from peers import PEERS, add_peers_argument, chosen
from picture import Panel, draw
from report import cell, heading, progress, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--picture", metavar="PNG")
    arguments = parser.parse_args()
    work = Work.of(arguments)
    torch.manual_seed(0)
    own = our_builds(work.dtype, arguments.ours)
    theirs, reasons = available(chosen(arguments.peers), work)
    ordinary: dict[str, float] = {}
    refresh: dict[str, float] = {}
    for name, build in (theirs | own).items():
        progress(name)
        contender = Contender(build, work).between_refreshes()
        contender.step()
        ordinary[name] = peak_bytes(contender.step, work.device) / work.largest
        if name in own or PEERS[name].low_rank:
            contender = Contender(build, work, gap=1)
            contender.step()
            refresh[name] = peak_bytes(contender.step, work.device) / work.largest
    progress("")

    print(heading(f"{work}; largest matrix {work.largest / 1e6:.2f} MB", work.device))
    rows = [[name, cell(ordinary[name]), cell(refresh.get(name))] for name in ordinary]
    print(table(["optimizer", "ordinary step, largest matrices", "refreshing step, largest matrices"], rows))
    print(peers_note(theirs, reasons))
    if arguments.picture:
        unit = "largest matrix = 1 (less is better)"
        panels = [Panel("transient memory, ordinary step", unit, ordinary), Panel("refreshing step", unit, refresh)]
        draw(arguments.picture, str(work), panels, ours=list(own))


if __name__ == "__main__":
    main()
