"""The command `galore finetune`: the loop of `galore pretrain` on a task's examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from galore_torch.train.commands.pretrain import run_all
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.prompts import load_prompts
from galore_torch.train.data.tasks import TaskData, load_labelled
from galore_torch.train.errors import UserError
from galore_torch.train.loop.find_lr import find_lr


def finetune(config: FinetuneConfig, console: Console | None = None) -> int:
    """Run every contender of `config`; returns the exit code. UserError: nothing was started, or the disk refused to go on."""
    return run_all(config, read, console)


def read(config: FinetuneConfig, say: Callable[[str], None] = print) -> tuple[FinetuneConfig, TaskData]:
    """The examples, and the config with what they settle: the number of steps, and with --find_lr the rates."""
    data = load_prompts(config) if config.task_name == "prompts" else load_labelled(config)
    settled = config.for_examples(len(data.train))
    known = _found_before(config) if config.find_lr and config.resume is not None else None
    if not config.find_lr or config.dry_run:
        return settled, data
    if known is not None:
        return replace(settled, **known), data
    found, tried = find_lr(settled, data, say)
    say(f"taking --lr {found.lr:.3g} --galore_scale {found.galore_scale:.3g}" if tried[0].of != "all" else f"taking --lr {found.lr:.3g}")
    return replace(found, tried=tuple(one.record() for one in tried)), data


def _found_before(config: FinetuneConfig) -> dict[str, Any] | None:
    """The rates that the run which goes on has found; None where it has not begun. UserError: it has looked for none."""
    folders = [Path(config.save_dir or "")] if config.resume == "auto" else [*Path(config.resume or "").parents]
    records = ((folder, json.loads(path.read_text(encoding="utf-8"))) for folder in folders if (path := folder / "config.json").is_file())
    begun = next(((folder, record) for folder, record in records if "resolved" in record), None)
    if begun is None:
        return None
    folder, record = begun
    if not (tried := record["resolved"].get("find_lr")):
        raise UserError(f"--find_lr has no effect on the run in {folder}, which has its rates and goes on with them; leave it out")
    return {"lr": record["lr"], "galore_scale": record["galore_scale"], "tried": tuple(tried)}
