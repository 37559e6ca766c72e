"""Where does a step between refreshes go? The parts of GaLoreAdamW's step, timed from outside, beside its two GEMMs alone.

    python benchmarks/step_time/parts.py --threads 1

"pass over R" is decode -> Adam -> encode, compiled or not; "Python and the rest" is what no other row has.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders import OURS, Contender, Work, add_work_arguments, two_gemms
from report import heading, progress, table

from galore_torch.engine import fused as elementwise
from galore_torch.engine import step as engine

PARTS = {
    "GEMM down": (engine, "project"),
    "sum that finds NaN": (engine, "finite"),
    "pass over R and the moments": (elementwise, "step"),
    "GEMM back": (engine, "project_back"),
}


class Clock:
    """The seconds of every call of a module's function, from now on."""

    def __init__(self, module: Any, name: str):
        self.seconds: list[float] = []
        original = getattr(module, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            self.seconds.append(time.perf_counter() - start)
            return result

        setattr(module, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    work = Work.of(arguments)
    torch.manual_seed(0)
    matrices = len(work.shapes)
    clocks = {part: Clock(*place) for part, place in PARTS.items()}
    rows = []
    for name in arguments.ours or OURS:
        contender, gemms = Contender(OURS[name], work).between_refreshes(), two_gemms(work)
        contender.step()
        for clock in clocks.values():
            clock.seconds.clear()
        taken: dict[str, list[float]] = {part: [] for part in ("its two GEMMs alone", "step", *PARTS)}
        for turn in range(arguments.rounds):
            progress(f"{name}: {turn + 1} of {arguments.rounds}")
            for what, call in (("its two GEMMs alone", gemms), ("step", contender.step)):
                start = time.perf_counter()
                call()
                taken[what].append(time.perf_counter() - start)
            for part, clock in clocks.items():
                taken[part].append(sum(clock.seconds))
                clock.seconds.clear()
        middle = {part: statistics.median(values) / matrices * 1e6 for part, values in taken.items()}
        rest = middle["step"] - sum(middle[part] for part in PARTS)
        rows.append([name, *(f"{value:.0f}" for value in (*middle.values(), rest))])
    progress("")
    print(heading(f"{work}; microseconds a matrix, medians of {arguments.rounds} rounds"))
    print(table(["optimizer", *taken, "Python and the rest"], rows))


if __name__ == "__main__":
    main()
