"""`galore ls`: the runs below a folder, one line each, the newest last. Imports neither torch nor matplotlib."""

from __future__ import annotations

from pathlib import Path

from galore_torch.train.errors import UserError
from galore_torch.train.loop.result import perplexity
from galore_torch.train.report.runs import Run, read_runs
from galore_torch.train.report.series import reading

_HEADER = ("run", "optimizer", "status", "steps")


def list_runs(folder: str) -> str:
    """Of each run: its folder, optimizer, status, steps, and what was last measured after a step: its score, or validation perplexity."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} {'is a file' if root.exists() else 'does not exist'}; give a folder with runs: galore ls FOLDER")
    metrics = [path for pattern in ("", "*/", "*/*/") for path in root.glob(f"{pattern}metrics.jsonl")]  # a comparison has folders in it
    if not metrics:
        raise UserError(f"{folder} holds no run; give the folder that galore pretrain --save_dir wrote to, or one above it")
    runs = read_runs([path.parent for path in sorted(metrics, key=lambda path: path.stat().st_mtime)])
    scored = any(run.score for run in runs)
    rows = [(*_HEADER, "result" if scored else "perplexity"), *(_row(run, scored) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(run: Run, scored: bool) -> tuple[str, ...]:
    if run.score is not None:
        name, last, step, best, at = run.score
        measured = f"{name} {last:.4f} at {step}, best {best:.4f} at {at}"
    else:
        measured = "-" if run.result is None else f"{reading(perplexity(run.result[1]))} at {run.result[0]}"
        measured = f"perplexity {measured}" if scored and run.result else measured
    return str(run.folder), run.optimizer, run.status.split(":")[0], str(run.last_step), measured
