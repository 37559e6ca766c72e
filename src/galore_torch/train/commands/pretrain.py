"""The command `galore pretrain`, and what it shares with `galore finetune`: from checked settings to the closing table."""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import devnull
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape

from galore_torch.train.checkpoint.identity import check_identity, identity
from galore_torch.train.checkpoint.lock import run_lock
from galore_torch.train.checkpoint.parts import whole_weights
from galore_torch.train.checkpoint.resume import (
    METRICS,
    Starts,
    differences,
    find_starts,
    run_folder,
    save_weights,
)
from galore_torch.train.checkpoint.run_folder import check_save_dir, new_run_folder
from galore_torch.train.checkpoint.storage import plain_failures, step_of
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.check import check_data
from galore_torch.train.data.loader import Data, load_data
from galore_torch.train.device import memory_mb, pick_device
from galore_torch.train.loop.build import model_for
from galore_torch.train.loop.distributed import ALONE, Ranks, is_loss, joined, launched, reason
from galore_torch.train.loop.result import RunResult
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.baselines import to_dense
from galore_torch.train.model.compile import check_compiler
from galore_torch.train.model.pretrained import quiet_transformers
from galore_torch.train.optimizers.registry import build_optimizer, fused_pass, optimizer_spec
from galore_torch.train.plan.at_hand import check_memory
from galore_torch.train.report.progress import Display, make_console, show_table
from galore_torch.train.report.summary import (
    draw,
    headline,
    markdown_table,
    resolved_config,
    summary,
    table_rows,
    write_config,
    write_json,
)
from galore_torch.train.report.trackers import check_trackers, tracked

EXIT_DONE, EXIT_STOPPED, EXIT_SIGNAL = 0, 1, 128  # 128 + the signal, as shells have it: Ctrl-C 130, SIGTERM 143


Config = TypeVar("Config", bound=PretrainConfig)
Say = Callable[[str], None]
Load = Callable[[Config, Say], tuple[Config, Data]]  # what is read, and the settings that it settles


def pretrain(config: PretrainConfig, console: Console | None = None) -> int:
    """Run every contender of `config`; returns the exit code. UserError: nothing was started, or the disk refused to go on."""
    check_data(config)
    return run_all(config, lambda config, _: (config, load_data(config)), console)


def run_all(config: Config, load: Load[Config], console: Console | None) -> int:
    """`pretrain` on what `load` reads."""
    device = pick_device(config.device)
    try:
        with ExitStack() as held:
            ranks = held.enter_context(joined(launched() if config.processes > 1 else ALONE, device, bool(config.mesh)))
            return _run_all(config, load, held.enter_context(_place_to_speak(ranks, console)), device, ranks, held)
    except LostPeer as lost:
        print(f"galore: {lost}", file=sys.stderr, flush=True)
        return EXIT_STOPPED


def _run_all(config: Config, load: Load[Config], console: Console, device: str, ranks: Ranks, held: ExitStack) -> int:
    def note(text: str) -> None:
        _note(console, text)

    starts = find_starts(config)
    if starts.folder is None:
        check_save_dir(config.save_dir, config.resume)
    elif ranks.leads:
        held.enter_context(run_lock(starts.folder, note))
    ranks.wait()  # before the first one makes a folder there
    check_trackers(config.tracker)
    check_memory(config, device)
    quiet_transformers()
    if config.compile:
        check_compiler(device)
    for text in config.notes:
        note(text)
    with console.status("reading text, training or loading the tokenizer"):
        config, data = load(config, note)
    covered = _check_optimizers(config, data, note)
    _check_starts(config, data, starts)
    if config.dry_run:
        return _dry_run(console, config, data, covered, device)
    folder = held.enter_context(_place_to_write(ranks, starts, config, note))
    with plain_failures("the run", folder):
        write_config(folder, config, data, device)
    _introduce(console, config, data, covered, folder)
    _introduce_starts(console, starts, device)

    results: list[RunResult] = []
    with _peers(ranks, folder), Display(console) as display:
        for run_name, (name, lr) in zip(config.run_names, config.contenders, strict=True):
            if ranks.any(display.should_stop()):
                break
            own_folder = run_folder(folder, config, run_name)
            display.begin(run_name, config.num_training_steps, _planned_mb(config, data, name, device))
            with plain_failures("the run", folder):
                results.append(_one_run(config, name, lr, data, own_folder, display, starts.checkpoints.get(run_name), ranks))
                if ranks.leads:
                    _write_results(folder, config, results)
    return _close(console, config, folder, results, display.stopped_by)


class LostPeer(Exception):
    """Another process of the run has gone; the text says so, and how to go on."""


@contextmanager
def _peers(ranks: Ranks, folder: Path) -> Iterator[None]:
    """LostPeer where another process has gone, which the exchange with it finds out."""
    try:
        yield
    except RuntimeError as error:
        if ranks.size == 1 or not is_loss(error):
            raise
        where = shlex.quote(str(folder)) if ranks.leads else "FOLDER of the run"
        raise LostPeer(
            f"process {ranks.rank} of {ranks.size} stops, for another process of this run is gone ({reason(error)}); go on with the "
            f"same command and --save_dir {where} --resume auto"
        ) from error


@contextmanager
def _place_to_speak(ranks: Ranks, console: Console | None) -> Iterator[Console]:
    """The console; of several processes the first one's alone."""
    if ranks.leads:
        yield console or make_console()
        return
    with open(devnull, "w") as nowhere:
        yield Console(file=nowhere)


@contextmanager
def _place_to_write(ranks: Ranks, starts: Starts, config: PretrainConfig, note: Callable[[str], None]) -> Iterator[Path]:
    """The run's folder, locked; of several processes the others have one for the time of the run, and save nothing."""
    if not ranks.leads:
        with tempfile.TemporaryDirectory(prefix="galore-rank-") as folder:
            yield Path(folder)
    elif starts.folder is not None:  # locked before it was read
        yield starts.folder
    else:
        made = new_run_folder(config.save_dir, config.command)
        with run_lock(made, note):
            yield made


def _check_optimizers(config: PretrainConfig, data: Data, note: Callable[[str], None]) -> dict[str, str]:
    """Build each optimizer once on a model without memory, so that none is refused after hours of the one before.

    Returns how much of the model each of those projects that project; what they warn of is noted once.
    """
    import torch

    from galore_torch.optim.param_groups import coverage

    covered: dict[str, str] = {}
    warned: dict[str, None] = {}
    for name, lr in config.contenders:
        with torch.device("meta"):
            model = model_for(config, data)  # a new one for each: the baselines change its layers
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
            with fused_pass(name, model, optimizer, deferred=config.deferred, gradients=config.gradients_of(name)):
                pass
        warned |= dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
        if optimizer_spec(name).low_rank:
            found = coverage(model, optimizer.param_groups)
            covered[name] = str(found)
            if config.targets and not found.enough:
                warned[f"{found}: --targets leaves the rest at full rank, such as {found.left_out[0]}"] = None
    for text in warned:
        note(text)
    return covered


def _dry_run(console: Console, config: PretrainConfig, data: Data, covered: dict[str, str], device: str) -> int:
    """Print what would be trained; nothing is written but what reading the text has cached."""
    console.print_json(data=resolved_config(config, data, device))
    _introduce(console, config, data, covered, None)
    for name in dict(config.contenders):
        planned = _planned_mb(config, data, name, device)
        said = "not known: the formulas do not know this model" if planned is None else f"a peak of {planned:,.0f} MB on {device}"
        console.print(f"plan       {name}: {said}", highlight=False)
    with closing(data.batches(config)) as stream:
        inputs, targets = next(stream)
    ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    console.print(
        f"batch      inputs {tuple(ids.shape)}, targets {tuple(targets.shape)} of {str(ids.dtype).removeprefix('torch.')}; "
        f"{config.accumulation} in one step of each of {config.processes} process{'es' if config.processes > 1 else ''}\n"
        "--dry_run: no run was made",
        highlight=False,
        soft_wrap=True,
    )
    return EXIT_DONE


def _check_starts(config: PretrainConfig, data: Data, starts: Starts) -> None:
    """Refuse a checkpoint of another run before anything is changed."""
    for run_name, (name, lr) in zip(config.run_names, config.contenders, strict=True):
        if run_name in starts.checkpoints:
            check_identity(starts.checkpoints[run_name], config, identity(config, name, lr, data))


def _planned_mb(config: PretrainConfig, data: Data, name: str, device: str) -> float | None:
    """The peak that the run's memory is planned to have, as the display counts memory: on a CPU the process is in it."""
    from galore_torch.train.plan.answer import planned_peak_bytes

    tensors = planned_peak_bytes(config, data.vocab_size, name)
    process = memory_mb(device)["rss_mb"] if device == "cpu" else 0.0
    return None if tensors is None else process + tensors / 1e6


def _introduce_starts(console: Console, starts: Starts, device: str) -> None:
    for text in [f"skipped: {what}" for what in starts.skipped] + differences(starts.checkpoints.values(), device):
        _note(console, text)
    for run_name, path in starts.checkpoints.items():
        console.print(f"resumed    {run_name} after step {step_of(path)}", highlight=False)


def _one_run(
    config: PretrainConfig, name: str, lr: float, data: Data, folder: Path, display: Display, start: Path | None, ranks: Ranks
) -> RunResult:
    """Train with one optimizer and leave its metrics and its model in `folder`."""
    folder.mkdir(exist_ok=True)
    settings = {flag: getattr(config, flag) for flag in config.settings()} | {"optimizer": name, "lr": lr}
    after = 0 if start is None else step_of(start)
    with tracked(config.tracker if ranks.leads else (), display, folder, settings, display.warn, after) as watcher:
        result, model = train(config, name, lr, data, folder, watcher, start, ranks)
    if result.status not in ("finished", "interrupted"):
        return result
    whole = whole_weights(model, keep=ranks.leads) if ranks.sharded else None
    if ranks.leads:
        save_weights(to_dense(model), folder / "model", whole=whole)
        data.tokenizer.fast.save_pretrained(folder / "model")
    return result


def _write_results(folder: Path, config: PretrainConfig, results: Sequence[RunResult]) -> None:
    # After every run: a comparison that is cut short keeps what it has.
    write_json(folder / "summary.json", summary(results))
    (folder / "results.md").write_text(markdown_table(config, results), encoding="utf-8")
    draw(folder / "loss.png", config, results)


def _introduce(console: Console, config: PretrainConfig, data: Data, covered: dict[str, str], folder: Path | None) -> None:
    lines = [f"text       {data.text}: {data.amount(config)}", f"tokenizer  {data.tokenizer.size} ids, {data.tokenizer.source}"]
    if len(set(covered.values())) == 1:
        lines.append(f"projected  {next(iter(covered.values()))}")
    else:
        lines += [f"projected  {name}: {text}" for name, text in covered.items()]
    lines += [] if folder is None else [f"run        {folder}"]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    if data.tokenizer.end_id is None:
        _note(console, "this tokenizer names no end-of-text token; documents run together")


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _close(console: Console, config: PretrainConfig, folder: Path, results: Sequence[RunResult], stopped_by: int | None) -> int:
    if results:
        header, rows = table_rows(config, results)
        show_table(console, escape(headline(config, results)), header, rows)
        console.print(f"config, metrics, picture, checkpoints and model: {folder}", highlight=False, soft_wrap=True, markup=False)
    for result in results:
        if result.skipped:
            console.print(f"[yellow]{result.optimizer}: {result.skipped} steps were skipped, see {METRICS}[/]", highlight=False)
    interrupted = any(result.status == "interrupted" for result in results) or len(results) < len(config.contenders)
    if interrupted and stopped_by is not None:
        console.print(
            f"[yellow]interrupted by {signal.Signals(stopped_by).name}: what was trained so far is saved; "
            f"go on with the same command and --save_dir {escape(shlex.quote(str(folder)))} --resume auto[/]",
            highlight=False,
            soft_wrap=True,
        )
        return EXIT_SIGNAL + stopped_by
    stopped = [result for result in results if not result.finished]
    for result in stopped:
        console.print(f"[red]{result.optimizer} stopped: {escape(result.status)}[/]", highlight=False, soft_wrap=True)
    return EXIT_STOPPED if stopped else EXIT_DONE
