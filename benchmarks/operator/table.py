"""Tables of the neural-operator benchmark and pictures of its fields, from the lines that `run.py` has written.

python benchmarks/operator/table.py > benchmarks/operator/results.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import heading, table

HERE = Path(__file__).resolve().parent
NAMES = {
    "adamw": "AdamW",
    "tensor": "Tensor-GaLore",
    "frequencies": "Tensor-GaLore, frequencies alone",
    "channels": "Tensor-GaLore, channels alone",
    "sparse": "TensorGRaD, a fifth in single elements",
    "matrix1": "GaLore, 1 + 3 dimensions",
    "matrix2": "GaLore, 2 + 2 dimensions",
    "matrix3": "GaLore, 3 + 1 dimensions",
}
TITLES = {"darcy": "Darcy flow", "burgers": "Burgers' equation", "navier_stokes": "Navier-Stokes, vorticity"}
Line = dict[str, Any]


def label(case: Line) -> str:
    return NAMES[case["method"]] + ("" if case["method"] == "adamw" else f", {case['ratio']:g}")


def cases_of(lines: Sequence[Line]) -> list[list[Line]]:
    """The final runs of each case, by method and then by falling ratio."""
    found: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        if not line["tuning"]:
            found.setdefault((line["case"]["method"], line["case"]["ratio"]), []).append(line)
    order = list(NAMES)
    return [found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), -key[1]))]


def spread(values: Sequence[float], digits: int = 2) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def results(lines: Sequence[Line]) -> str:
    """Errors in percent, mean and standard deviation over the seeds of each row."""
    groups = cases_of(lines)
    tests = list(groups[0][0]["errors"])
    header = ["method, ratio", "seeds", "rate", "state, MB", "of AdamW's"]
    header += [f"{kind} error %, {test}" for test in tests for kind in ("L2", "H1")] + ["peak, MB", "s an epoch"]
    base = next((group[0]["state_bytes"] for group in groups if group[0]["case"]["method"] == "adamw"), None)
    rows = []
    for group in groups:
        first = group[0]
        row = [label(first["case"]), str(len(group)), f"{first['lr']:g}", f"{first['state_bytes'] / 1e6:.2f}"]
        row += [f"{first['state_bytes'] / base:.0%}".replace("%", " %") if base else "–"]
        row += [spread([100 * line["errors"][test][kind] for line in group]) for test in tests for kind in ("l2", "h1")]
        row += [f"{first['peak_bytes'] / 1e6:.1f}", f"{statistics.median(line['seconds_an_epoch'] for line in group):.2f}"]
        rows.append(row)
    return table(header, rows)


def draw(problem: str, fields: Path, picture: Path) -> bool:
    """Input, truth, predictions and their errors on the first test sample of the finest test set; False where nothing was kept."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt
    import torch

    wanted = [("adamw", 1.0), ("tensor", 0.25), ("channels", 0.25), ("matrix1", 0.25)]
    found = {}
    for method, ratio in wanted:
        files = sorted(fields.glob(f"{problem}-{method}-{ratio}.*.pt"))
        if files:
            found[label({"method": method, "ratio": ratio})] = torch.load(files[-1], weights_only=True)
    if not found:
        return False
    figure, axes = plt.subplots(len(found), 4, figsize=(10, 2.4 * len(found)), squeeze=False)
    largest = max(float((each["prediction"][0] - each["truth"][0]).abs().max()) for each in found.values())
    for row, (name, each) in zip(axes, found.items(), strict=True):
        truth, prediction = each["truth"][0, 0], each["prediction"][0, 0]
        low, high = float(truth.min()), float(truth.max())
        for axis, title, image, scale in (
            (row[0], "input", each["input"][0, 0], {}),
            (row[1], "truth", truth, {"vmin": low, "vmax": high}),
            (row[2], "prediction", prediction, {"vmin": low, "vmax": high}),
            (row[3], f"error, to ± {largest:.2g}", prediction - truth, {"vmin": -largest, "vmax": largest, "cmap": "coolwarm"}),
        ):
            axis.imshow(image, **scale)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(title, fontsize=9)
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--fields", type=Path, default=HERE.parents[1] / "build" / "operator")
    parser.add_argument("--pictures", type=Path, default=HERE)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    print("# Neural operators: results\n")
    for problem, title in TITLES.items():
        mine = [line for line in lines if line["problem"] == problem]
        if not any(not line["tuning"] for line in mine):
            continue
        final = next(line for line in mine if not line["tuning"])
        sizes = f"{final['modes']} x {final['modes']} modes, {final['width']} channels, 4 layers, {final['epochs']} epochs"
        print(f"## {title}\n\n`python benchmarks/operator/run.py --problem {problem} --data FOLDER`\n")
        print(heading(f"{sizes}, batch {final['batch']}, gap {final['gap']}; mean ± standard deviation over seeds"))
        print(results(mine) + "\n")
        picture = arguments.pictures / f"{problem}.png"
        if draw(problem, arguments.fields, picture) or picture.exists():
            print(f"![Input, truth, prediction and error of one test sample]({problem}.png)\n")


if __name__ == "__main__":
    main()
