"""Tasks of EleutherAI's evaluation harness (lm-eval) on a model in memory. The harness is an extra of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from galore_torch.train.errors import UserError


def check_harness() -> None:
    """UserError where lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise UserError('--harness needs lm-eval; install it with: pip install "galore-torch[eval]"')


def run_harness(model: Any, folder: Path, tasks: tuple[str, ...], batch_size: int, limit: int | None) -> dict[str, dict[str, float]]:
    """Task -> metric -> value. `tasks`: names that lm-eval knows, or YAML files; `limit`: examples of each, at most."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from galore_torch.train.checkpoint.saved_model import load_tokenizer

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for path in files:
        if not path.is_file():
            raise UserError(f"--harness {path} does not exist; give a task's YAML file, or a name that lm-eval knows")
    manager = TaskManager(include_path=sorted({str(path.resolve().parent) for path in files}) or None)
    names = [_name_in(Path(task)) if Path(task) in files else task for task in tasks]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"--harness {unknown[0]} is no task that lm-eval knows; `lm-eval ls tasks` lists them, and a YAML file adds one")
    lm = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=batch_size)
    found = simple_evaluate(model=lm, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {key.removesuffix(",none"): float(value) for key, value in metrics.items() if isinstance(value, (int, float))}
        for task, metrics in found["results"].items()
    }


def _name_in(path: Path) -> str:
    """The name that a task's file gives it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "task":
            return value.strip().strip("\"'")
    raise UserError(f"--harness {path} names no task; it needs a line such as `task: {path.stem}`")
