"""What a run leaves behind: the folder, the resolved config, the table and the picture."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.loader import Data
from galore_torch.train.loop.result import RunResult, perplexity
from galore_torch.train.report.palette import PALETTE
from galore_torch.train.report.series import number, reading, smooth


def write_config(folder: Path, config: PretrainConfig, data: Data, device: str) -> None:
    """config.json: see `resolved_config`."""
    write_json(folder / "config.json", resolved_config(config, data, device))


def resolved_config(config: PretrainConfig, data: Data, device: str) -> dict[str, Any]:
    """Every setting with its settled value, and what the run is made with."""
    settings = {name: value for name, value in asdict(config).items() if name in config.settings()}
    settings |= {"vocab_size": data.vocab_size} if "vocab_size" in settings else {}
    settings |= {
        "rank": config.resolved_rank,
        "total_batch_size": config.sequences_per_update,
        "warmup_steps": config.warmup,
        "device": device,
    }
    made_with = {
        "optimizers": [{"optimizer": name, "lr": lr, "gradients": config.gradients_of(name)} for name, lr in config.contenders],
        "text": data.text,
        "tokenizer_source": data.tokenizer.source,
        **data.record(),
        **({"find_lr": list(config.tried)} if isinstance(config, FinetuneConfig) and config.tried else {}),
        "processes": config.processes,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("galore-torch", "torch", "transformers", "datasets")},
    }
    return settings | {"resolved": made_with}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def summary(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One flat record a run, for summary.json."""
    return [
        {
            "optimizer": r.optimizer,
            "lr": r.lr,
            "status": r.status,
            "parameters": r.parameters,
            "optimizer_state_mb": r.state_bytes / 1e6,
            "adamw_state_mb": r.adamw_state_bytes / 1e6,
            **_outcome(r),
            "tokens_per_s": r.tokens_per_s,
            "steps": r.steps,
            "tokens_seen": r.tokens_seen,
            "seconds": r.seconds,
            "peak_memory_mb": r.peak_memory_mb,
        }
        for r in results
    ]


def _outcome(result: RunResult) -> dict[str, Any]:
    """Perplexity before and after; of a task with scores those of the last and of the best evaluation."""
    if not result.scores:
        return {"perplexity_before": first_perplexity(result), "perplexity_after": final_perplexity(result)}
    step, last = result.scores[-1]
    at = result.best[0] if result.best else step
    best = dict(result.scores).get(at, last)
    return {"scores_last": last, "scores_best": best, "score_last_step": step, "score_best_step": at}


def first_perplexity(result: RunResult) -> float | None:
    """Before the first step; None where it was not measured, or is beyond a float."""
    return number(perplexity(result.evals[0][1])) if result.evals else None


def final_perplexity(result: RunResult) -> float | None:
    """After the last step; None where the run stopped before it was measured."""
    step, loss = result.evals[-1] if result.evals else (0, 0.0)
    return number(perplexity(loss)) if step and step == result.steps else None


def headline(config: PretrainConfig, results: Sequence[RunResult]) -> str:
    """One line above the table and the picture: what all runs share."""
    first = results[0]
    if isinstance(config, FinetuneConfig):
        return (
            f"{config.task_name} on {config.model_name}: {first.parameters:,} parameters, {config.epochs:.3g} epochs of "
            f"{config.examples:,} examples in {config.num_training_steps} steps, rank {config.resolved_rank}, seed {config.seed}; "
            f"AdamW's state: {first.adamw_state_bytes / 1e6:.2f} MB"
        )
    return (
        f"{config.model_name}: {first.parameters:,} parameters, {config.num_training_steps} steps of "
        f"{config.sequences_per_update} x {config.max_length} tokens, rank {config.resolved_rank}, seed {config.seed}; "
        f"before training: perplexity {reading(first_perplexity(first))}; AdamW's state: {first.adamw_state_bytes / 1e6:.2f} MB"
    )


def table_rows(config: PretrainConfig, results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the closing table: one run reads downwards, a comparison has one row a run."""
    if not config.compare:
        return ["", results[0].optimizer], _single_rows(results[0])
    measures = _measures(results[0])
    return ["optimizer", "lr", "state MB", "of AdamW", *measures, "tokens/s", "steps"], [
        [
            r.optimizer,
            f"{r.lr:g}",
            f"{r.state_bytes / 1e6:.2f}",
            f"{r.state_bytes / r.adamw_state_bytes:.0%}",
            *_measured(r),
            f"{r.tokens_per_s:,.0f}",
            str(r.steps) if r.finished else f"{r.steps}, stopped",
        ]
        for r in results
    ]


def _measures(result: RunResult) -> list[str]:
    """What a comparison shows of how good the models are."""
    if not result.scores:
        return ["perplexity"]
    name = next(iter(result.scores[-1][1]), "score")
    return [f"{name} last", "best"]


def _measured(result: RunResult) -> list[str]:
    if not result.scores:
        return [reading(final_perplexity(result))]
    last = next(iter(result.scores[-1][1].values()), None)
    best = result.best
    return [reading(last, ".4f"), "-" if best is None else f"{best[1]:.4f} at {best[0]}"]


def _outcome_rows(result: RunResult) -> list[list[str]]:
    if not result.scores:
        return [
            ["validation perplexity before", reading(first_perplexity(result))],
            ["validation perplexity after", reading(final_perplexity(result))],
        ]
    (first, before), (last, after) = result.scores[0], result.scores[-1]
    rows = [[f"{name} after the last step", reading(value, ".4f")] for name, value in after.items()]
    if result.best is not None:
        at = dict(result.scores)[result.best[0]]
        rows += [[f"{name} at its best evaluation, step {result.best[0]}", reading(value, ".4f")] for name, value in at.items()]
    if first == 0 and last > 0:
        name, at_first = next(iter(before.items()), ("score", None))
        best = None if result.best is None else dict(result.scores)[result.best[0]].get(name)
        worse = ", which no later evaluation reached" if at_first is not None and best is not None and best < at_first else ""
        rows.insert(0, [f"{name} before training", reading(at_first, ".4f") + worse])
    return rows


def _single_rows(r: RunResult) -> list[list[str]]:
    share = r.state_bytes / r.adamw_state_bytes
    return [
        ["parameters", f"{r.parameters:,}"],
        ["peak learning rate", f"{r.lr:g}"],
        [f"optimizer state, {r.optimizer}", f"{r.state_bytes / 1e6:.2f} MB ({share:.0%} of AdamW)"],
        ["optimizer state, AdamW", f"{r.adamw_state_bytes / 1e6:.2f} MB (measured, same model)"],
        *_outcome_rows(r),
        ["tokens/s", f"{r.tokens_per_s:,.0f}"],
        ["steps", f"{r.steps} ({r.tokens_seen:,} tokens, {r.seconds:.0f} s)"],
        ["peak memory of the process", f"{r.peak_memory_mb:,.0f} MB"],
    ]


def markdown_table(config: PretrainConfig, results: Sequence[RunResult]) -> str:
    """The closing table as Markdown, for results.md."""
    header, rows = table_rows(config, results)
    lines = [headline(config, results), "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(path: Path, config: PretrainConfig, results: Sequence[RunResult]) -> None:
    """PNG: training loss on the left, validation perplexity or the task's own score on the right, one colour a run."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.2 + 0.2 * len(results)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, result in enumerate(results):
        colour = PALETTE[index % len(PALETTE)]
        label = f"{result.optimizer}, lr {result.lr:g}"
        steps = [step for step, _ in result.losses]
        losses = [loss for _, loss in result.losses]
        if steps:
            left.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            left.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=label)
        measured = [(step, next(iter(scores.values()), math.nan)) for step, scores in result.scores]
        measured = measured or [(step, perplexity(loss)) for step, loss in result.evals]
        right.plot(
            [step for step, _ in measured],
            [value for _, value in measured],
            color=colour, marker="o", markersize=4, linewidth=1.8,
            label=f"{label}: {_measured(result)[0]}, state {result.state_bytes / 1e6:.2f} MB",
        )  # fmt: skip
    if any(result.scores for result in results):
        name = next((name for result in results for _, scores in result.scores for name in scores), "score")
        left.set(xlabel="step", ylabel="loss", title="training loss")
        right.set(xlabel="step", ylabel=name, title=f"validation {name}")
    else:
        left.set(xlabel="step", ylabel="loss (nats per token)", title="training loss")
        right.set(xlabel="step", ylabel="perplexity", title="validation perplexity", yscale="log")
        right.yaxis.set_major_formatter(LogFormatter())
        right.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            # Below the axes: inside, one curve or another would run through it.
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle(headline(config, results), fontsize=8)
    figure.savefig(path)
