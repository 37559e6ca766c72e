"""The command `galore pretrain`, from checked settings to the closing table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from galore_torch.train.config import PretrainConfig
from galore_torch.train.data import TokenData, check_data, load_data
from galore_torch.train.display import Display, make_console, show_table
from galore_torch.train.optim import build_optimizer
from galore_torch.train.report import (
    check_save_dir,
    draw,
    headline,
    markdown_table,
    new_run_folder,
    summary,
    table_rows,
    write_config,
    write_json,
)
from galore_torch.train.trackers import check_trackers, tracked
from galore_torch.train.trainer import RunResult, model_for, pick_device, train

EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 130


def pretrain(config: PretrainConfig, console: Console | None = None) -> int:
    """Run every contender of `config`; returns the exit code. UserError: nothing was started."""
    console = console or make_console()
    check_data(config)
    check_save_dir(config.save_dir)
    check_trackers(config.tracker)
    _quiet_libraries()
    device = pick_device(config.device)
    for note in config.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    with console.status("reading text, training or loading the tokenizer"):
        data = load_data(config)
    _check_optimizers(config, data)
    folder = new_run_folder(config.save_dir)
    write_config(folder, config, data, device)
    _introduce(console, config, data, folder)

    results: list[RunResult] = []
    with Display(console) as display:
        for run_name, (name, lr) in zip(config.run_names, config.contenders, strict=True):
            if display.should_stop():
                break
            own_folder = folder / run_name if config.compare else folder
            display.begin(run_name, config.num_training_steps)
            results.append(_one_run(config, name, lr, data, own_folder, display))
            _write_results(folder, config, results)
    return _close(console, config, folder, results)


def _check_optimizers(config: PretrainConfig, data: TokenData) -> None:
    """Build each optimizer once on a model without memory, so that none is refused after hours of the one before."""
    import torch

    with torch.device("meta"):
        model = model_for(config, data)
    for name, lr in config.contenders:
        build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)


def _one_run(config: PretrainConfig, name: str, lr: float, data: TokenData, folder: Path, display: Display) -> RunResult:
    """Train with one optimizer and leave its metrics and its model in `folder`."""
    folder.mkdir(exist_ok=True)
    settings = {key: value for key, value in asdict(config).items() if key != "given"}
    with tracked(config.tracker, display, folder, folder.name, settings | {"optimizer": name, "lr": lr}, display.warn) as watcher:
        result, model = train(config, name, lr, data, folder, watcher)
    if result.status in ("finished", "interrupted"):
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        data.tokenizer.fast.save_pretrained(folder / "model")
    return result


def _write_results(folder: Path, config: PretrainConfig, results: Sequence[RunResult]) -> None:
    # After every run: a comparison that is cut short keeps what it has.
    write_json(folder / "summary.json", summary(results))
    (folder / "results.md").write_text(markdown_table(config, results), encoding="utf-8")
    draw(folder / "loss.png", config, results)


def _introduce(console: Console, config: PretrainConfig, data: TokenData, folder: Path) -> None:
    used = config.num_training_steps * config.sequences_per_update * config.max_length
    console.print(
        f"text       {data.source}: {len(data.train):,} training tokens read, "
        f"{used / len(data.train):.1f} passes over them\n"
        f"tokenizer  {data.tokenizer.size} ids, {data.tokenizer.source}\n"
        f"run        {folder}",
        highlight=False,
        soft_wrap=True,
    )
    if data.tokenizer.end_id is None:
        console.print(
            "[yellow]note:[/] this tokenizer names no end-of-text token; documents run together",
            highlight=False,
        )


def _close(console: Console, config: PretrainConfig, folder: Path, results: Sequence[RunResult]) -> int:
    header, rows = table_rows(config, results)
    show_table(console, headline(config, results), header, rows)
    console.print(f"config, metrics, picture and model: {folder}", highlight=False, soft_wrap=True)
    if any(result.status == "interrupted" for result in results):
        console.print("[yellow]interrupted: what was trained so far is saved[/]")
        return EXIT_INTERRUPTED
    stopped = [result for result in results if not result.finished]
    for result in stopped:
        console.print(f"[red]{result.optimizer} stopped: {result.status}[/]", highlight=False, soft_wrap=True)
    return EXIT_STOPPED if stopped else EXIT_DONE


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
