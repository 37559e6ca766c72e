"""What a run leaves behind: the folder, the resolved config, the table and the picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.loop.result import RunResult, perplexity
from galore_torch.train.model.loss import counted
from galore_torch.train.report.palette import PALETTE
from galore_torch.train.report.series import number, reading, smooth


def write_config(folder: Path, config: PretrainConfig, data: TokenData, device: str) -> None:
    """config.json: see `resolved_config`."""
    write_json(folder / "config.json", resolved_config(config, data, device))


def resolved_config(config: PretrainConfig, data: TokenData, device: str) -> dict[str, Any]:
    """Every setting with its settled value, and what the run is made with."""
    settings = asdict(config)
    del settings["given"], settings["remarks"], settings["processes"]
    settings |= {
        "vocab_size": data.vocab_size,
        "rank": config.resolved_rank,
        "total_batch_size": config.sequences_per_update,
        "warmup_steps": config.warmup,
        "device": device,
    }
    made_with = {
        "optimizers": [{"optimizer": name, "lr": lr, "gradients": config.gradients_of(name)} for name, lr in config.contenders],
        "text": data.text,
        "tokenizer_source": data.tokenizer.source,
        "train_tokens_read": counted(data.train),
        "held_out_tokens_read": counted(data.held_out),
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
            "perplexity_before": first_perplexity(r),
            "perplexity_after": final_perplexity(r),
            "tokens_per_s": r.tokens_per_s,
            "steps": r.steps,
            "tokens_seen": r.tokens_seen,
            "seconds": r.seconds,
            "peak_memory_mb": r.peak_memory_mb,
        }
        for r in results
    ]


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
    return (
        f"{config.model_name}: {first.parameters:,} parameters, {config.num_training_steps} steps of "
        f"{config.sequences_per_update} x {config.max_length} tokens, rank {config.resolved_rank}, seed {config.seed}; "
        f"before training: perplexity {reading(first_perplexity(first))}; AdamW's state: {first.adamw_state_bytes / 1e6:.2f} MB"
    )


def table_rows(config: PretrainConfig, results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the closing table: one run reads downwards, a comparison has one row a run."""
    if not config.compare:
        return ["", results[0].optimizer], _single_rows(results[0])
    return ["optimizer", "lr", "state MB", "of AdamW", "perplexity", "tokens/s", "steps"], [
        [
            r.optimizer,
            f"{r.lr:g}",
            f"{r.state_bytes / 1e6:.2f}",
            f"{r.state_bytes / r.adamw_state_bytes:.0%}",
            reading(final_perplexity(r)),
            f"{r.tokens_per_s:,.0f}",
            str(r.steps) if r.finished else f"{r.steps}, stopped",
        ]
        for r in results
    ]


def _single_rows(r: RunResult) -> list[list[str]]:
    share = r.state_bytes / r.adamw_state_bytes
    return [
        ["parameters", f"{r.parameters:,}"],
        ["peak learning rate", f"{r.lr:g}"],
        [f"optimizer state, {r.optimizer}", f"{r.state_bytes / 1e6:.2f} MB ({share:.0%} of AdamW)"],
        ["optimizer state, AdamW", f"{r.adamw_state_bytes / 1e6:.2f} MB (measured, same model)"],
        ["validation perplexity before", reading(first_perplexity(r))],
        ["validation perplexity after", reading(final_perplexity(r))],
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
    """PNG: training loss on the left, validation perplexity on the right, one colour a run."""
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
        right.plot(
            [step for step, _ in result.evals],
            [perplexity(loss) for _, loss in result.evals],
            color=colour, marker="o", markersize=4, linewidth=1.8,
            label=f"{label}: {reading(final_perplexity(result))}, "
            f"state {result.state_bytes / 1e6:.2f} MB",
        )  # fmt: skip
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
