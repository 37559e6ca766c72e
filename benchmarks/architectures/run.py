"""The table of docs/architectures.md: every command with small models of many architectures and the optimizers that differ most.

    python benchmarks/architectures/run.py --output docs/architectures.md

Each cell is what tests/train/test_architectures.py holds: it works, or it is refused in one line. One core, some minutes.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.architectures import ARCHITECTURES, OPTIMIZERS, STEPS, Outcome, make_model, try_steps

HEADER = """# Architectures

What `galore` does with models of transformers: `{steps}`, each with a small
model of random weights (width 32, two layers) that goes through the command line. "yes": each of them works, and resumed and exported
weights are bit for bit those that the run ended with. A number: what is refused, in one line and with exit code 2, and why. Others of
transformers' causal language models go the same way; none is refused for being in no list.

`python benchmarks/architectures/run.py --output docs/architectures.md`

{date}; torch {torch}, transformers {transformers}, peft {peft}; CPU.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=[*ARCHITECTURES], default=[*ARCHITECTURES], metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], metavar="NAME")
    parser.add_argument("--output", type=Path, help="write the page here")
    given = parser.parse_args()
    rows: list[list[str]] = []
    notes: dict[str, int] = {}
    failed = 0
    for name in given.architectures:
        cells = []
        for optimizer in given.optimizers:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
                outcomes = try_steps(make_model(name, Path(folder) / "model"), optimizer, Path(folder))
            failed += sum(not outcome.is_right for outcome in outcomes.values())
            cells.append(cell(outcomes, notes))
            print(name, optimizer, *(f"{step}:{outcome.status}" for step, outcome in outcomes.items()), file=sys.stderr, flush=True)
        rows.append([name, *cells])
    page = header() + table(["architecture", *given.optimizers], rows)
    page += "".join(f"\n{number}. {words}" for words, number in notes.items()) + ("\n" if notes else "")
    print(page)
    if given.output:
        given.output.write_text(page, encoding="utf-8")
    return 1 if failed else 0


def header() -> str:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return HEADER.format(steps="`, `".join(STEPS), date=date.today().isoformat(), **versions)


def cell(outcomes: dict[str, Outcome], notes: dict[str, int]) -> str:
    """ "yes", or the steps that are refused or fail, with the number of the note that says why."""
    said: dict[str, list[str]] = {}
    for step, outcome in outcomes.items():
        if outcome.status in ("refused", "fails"):
            said.setdefault(("FAILS: " if outcome.status == "fails" else "") + _plain(outcome.words), []).append(step)
    if not said:
        return "yes"
    numbered = [(steps, notes.setdefault(words, len(notes) + 1)) for words, steps in said.items()]
    if outcomes["pretrain"].status != "works":
        return ", ".join(f"[{number}]" for _, number in numbered)
    return "yes; " + ", ".join(f"{' and '.join(steps)} [{number}]" for steps, number in numbered)


def _plain(words: str) -> str:
    """The same refusal of two models is one note: without paths, names of layers and counts."""
    words = re.sub(r"/\S*/(\S+)", r"\1", words)
    words = re.sub(r" \(such as [^)]*\)", "", words)
    return re.sub(r"\b\d+ (weights|expert)", r"some \1", words)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
