"""The table of the lines that run.py has written, beside the paper's, and the paired differences that the claim is about."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from paired_runs import paired
from report import table
from run import METHODS, RESULTS, TUNING_SEED

# arXiv 2403.03507, table 4: RoBERTa-base, one number each.
PAPER = {
    "full": {"cola": 62.24, "stsb": 90.92, "mrpc": 91.30, "rte": 79.42},
    "galore r=4": {"cola": 60.35, "stsb": 90.73, "mrpc": 92.25, "rte": 79.42},
    "lora r=4": {"cola": 61.38, "stsb": 90.57, "mrpc": 91.07, "rte": 78.70},
    "galore r=8": {"cola": 60.06, "stsb": 90.82, "mrpc": 92.01, "rte": 79.78},
    "lora r=8": {"cola": 61.83, "stsb": 90.80, "mrpc": 91.90, "rte": 79.06},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    rows = [json.loads(line) for line in parser.parse_args().results.read_text(encoding="utf-8").splitlines()]
    print(made(rows))


CLAIMS = (("galore r=4", "lora r=4"), ("galore r=4", "full"), ("galore r=8", "lora r=8"), ("galore8bit r=4", "galore r=4"))


def made(rows: list[dict[str, Any]]) -> str:
    """A table for each protocol and task; a method that is still being tuned says so."""
    parts = []
    for same in dict.fromkeys(protocol(row) for row in rows):
        mine = [row for row in rows if protocol(row) == same]
        dates, machines = (sorted({row[key] for row in mine}) for key in ("date", "machine"))
        parts += [f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {'; '.join(machines)}; {same}", ""]
        for task in dict.fromkeys(row["task"] for row in mine):
            of_one = [row for row in mine if row["task"] == task]
            parts += [of_task(task, of_one), "", *differences(task, of_one)]
    return "\n".join(parts)


def protocol(row: dict[str, Any]) -> str:
    length = f"{row['steps']} steps" if "steps" in row else f"{row['epochs']:g} epochs"
    frozen = f", {' '.join(row['freeze'])} frozen" if row["freeze"] else ""
    return f"{row['model']}, {length} of batches of {row['batch_size']}, {row['max_length']} tokens at most{frozen}"


def of_task(task: str, rows: list[dict[str, Any]]) -> str:
    lines = []
    for key in METHODS:
        mine = [row for row in rows if row["method"] == key]
        if not mine:
            continue
        grid = sorted({row["lr"] for row in mine if row["seed"] == TUNING_SEED})
        reported = [row for row in mine if row["seed"] != TUNING_SEED]
        if len({row["lr"] for row in reported}) > 1:
            raise SystemExit(f"{task}, {key}: reported seeds at several rates: remove the lines of all but one")
        memory = sum(mine[0]["memory_mb"].values())
        rate = f"{reported[0]['lr']:g} of {', '.join(f'{lr:g}' for lr in grid)}" if reported else "being tuned"
        if reported and reported[0]["lr"] in (grid[0], grid[-1]):
            rate += " (at an end)"
        figures = [spread([row[which] for row in reported]) for which in ("last", "best")]
        paper = PAPER.get(key, {}).get(task)
        lines.append(
            [
                key,
                rate,
                *figures,
                str(len(reported)),
                f"{mine[0]['state_mb']:.1f}",
                f"{memory:.0f}",
                "–" if paper is None else f"{paper:.2f}",
            ]
        )
    score = rows[0]["score"]
    header = [f"{task}, {score}", "rate", "last epoch", "best epoch", "seeds", "state MB", "memory MB", "paper, RoBERTa-base"]
    return table(header, lines)


def differences(task: str, rows: list[dict[str, Any]]) -> list[str]:
    """A line for each claim of which two seeds or more have run on both sides: the mean over pairs of seeds, with its 95 % interval."""
    lines = []
    for ours, theirs in CLAIMS:
        sides = [{row["seed"]: row for row in rows if row["method"] == key and row["seed"] != TUNING_SEED} for key in (ours, theirs)]
        if len(seeds := sorted(sides[0].keys() & sides[1].keys())) > 1:
            found = []
            for which in ("last", "best"):
                mean, _, _, half = paired(*([100 * side[seed][which] for seed in seeds] for side in sides))
                found.append(f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}) at the {which} epoch")
            lines.append(f"- {task}, {ours} less {theirs}, {len(seeds)} pairs of seeds: {', '.join(found)}")
    return [*lines, ""] if lines else []


def spread(values: list[float]) -> str:
    """In hundredths: the mean, and the standard deviation over seeds."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
