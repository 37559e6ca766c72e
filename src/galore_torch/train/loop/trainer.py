"""One optimizer, one model, one pass through the schedule: the training loop and its measurements.

Prints nothing and writes metrics.jsonl and checkpoints. What is shown goes through the `Watcher`.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any

from galore_torch.engine.sharding import local
from galore_torch.train.checkpoint.identity import identity
from galore_torch.train.checkpoint.resume import BEST, METRICS, bring, fill, fill_parts, read_position, restore
from galore_torch.train.checkpoint.storage import plain_failures, read_trainer, write_checkpoint
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import Batches, Data
from galore_torch.train.data.sampler import Lanes
from galore_torch.train.device import memory_mb, pick_device
from galore_torch.train.errors import UserError
from galore_torch.train.loop.build import model_for
from galore_torch.train.loop.distributed import ALONE, Ranks
from galore_torch.train.loop.probe import Probe, as_number
from galore_torch.train.loop.result import RunResult
from galore_torch.train.loop.sharded import as_parts, shard
from galore_torch.train.loop.tasks import Place, Task, task_for
from galore_torch.train.loop.watcher import Watcher
from galore_torch.train.model.compile import compile_layers, compiled_so_far
from galore_torch.train.model.flops import flops_per_token, peak_flops
from galore_torch.train.model.loss import counted, places
from galore_torch.train.optimizers.registry import (
    adamw_state_bytes,
    build_optimizer,
    fused_pass,
    set_lr,
    state_bytes,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from galore_torch import FusedBackward

_RECENT = 50  # steps whose median --max_loss_rise is measured from


class NonFiniteLoss(ArithmeticError):
    """The loss is NaN or infinite; the text names the step and the cure."""


def train(
    config: PretrainConfig,
    name: str,
    lr: float,
    data: Data,
    folder: Path,
    watcher: Watcher,
    start: Path | None = None,
    ranks: Ranks = ALONE,
) -> tuple[RunResult, nn.Module]:
    """Train with the optimizer `name`, from the seed's weights or from the checkpoint `start`; write metrics and checkpoints.

    UserError where the folder cannot be written or the text not be read on; the checkpoints made before stand.
    """
    device = pick_device(config.device)
    model, task = model_for(config, data), task_for(config, data)
    model = model if ranks.sharded else model.to(device)  # a whole one that is to be cut may be too large for a device
    own_loss = task.loss(model).train()  # a loaded model comes in eval mode
    if ranks.sharded:
        shard(own_loss, model, config.mesh, device)
    result = RunResult(name, lr, parameters=sum(p.numel() for p in model.parameters()))
    result.adamw_state_bytes = adamw_state_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is projected has been said at the start
        optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
    path = folder / METRICS
    with plain_failures("the run", folder):
        if start is not None:
            result.go_on(read_trainer(start), restore(start, model, optimizer, path))
            if ranks.any(ranks.leads and not _goes_on(start, folder)):
                _bring_best(result, start, folder, ranks)
        with (
            path.open("w" if start is None else "a", encoding="utf-8") as metrics,
            warnings.catch_warnings(),
            _attached(config, name, model, optimizer) as fused,
        ):
            warnings.filterwarnings("ignore", message=".*its gradient is made in full")  # `_Loop.tell_of_layers_left` says so
            loop = _Loop(config, model, optimizer, data, task, own_loss, device, result, metrics, watcher, folder, ranks, fused)
            loop.position = None if start is None else read_position(start)
            loop.saved = result.steps if start is not None and _goes_on(start, folder) else -1
            try:
                loop.run()
            except NonFiniteLoss as stop:
                result.status = str(stop)
            except UserError:  # the text cannot be read on
                if ranks.size == 1:  # of several processes the others do not know
                    loop.save()
                raise
            loop.save()
    as_parts(own_loss)
    return result, model


def _goes_on(start: Path, folder: Path) -> bool:
    """Whether the run goes on in the folder that the checkpoint `start` lies in; else it branches off into a new one."""
    return start.resolve().parent == (folder / "checkpoints").resolve()


def _bring_best(result: RunResult, start: Path, folder: Path, ranks: Ranks) -> None:
    """Copy the best checkpoint so far into a branch's folder; what there is no checkpoint of any more is not the best there."""
    while result.best is not None and not bring(result.best[0], start, folder / BEST, copy=ranks.leads):
        result.values.remove(result.best)


def _attached(
    config: PretrainConfig, name: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[FusedBackward | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which matrices are left out has been said at the start
        return fused_pass(name, model, optimizer, deferred=config.deferred, gradients=config.gradients_of(name))


@dataclass
class _Loop:
    config: PretrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Data
    task: Task
    own_loss: Any  # of the task
    device: str
    result: RunResult
    metrics: IO[str]
    watcher: Watcher
    folder: Path
    ranks: Ranks = ALONE
    fused: FusedBackward | None = None
    saved: int = -1  # the step of the last checkpoint
    starting: bool = True  # no step has been made since the start
    position: Lanes | None = None  # in the text, behind the last step

    def __post_init__(self) -> None:
        if self.own_loss.whole_because:
            self.watcher.warn(f"all logits of a forward pass exist at once, for {self.own_loss.whole_because}")
        if self.config.compile:
            compile_layers(self.model)
        self.flops = flops_per_token(self.model, self.task.length)
        known = peak_flops(self.device, self.config.torch_dtype)
        self.peak_flops = self.config.peak_tflops * 1e12 if self.config.peak_tflops else known
        self.shared_loss = self.ranks.wrap(self.own_loss)
        self.probe = Probe(self.model, self.optimizer, self.device, track_subspace=self.config.track_subspace)
        self.told = 0 if self.fused is None else len(self.fused.left)

    def run(self) -> None:
        """Go on from result.steps to the end of the schedule, or until the watcher asks to stop."""
        config, result = self.config, self.result
        with closing(self.data.batches(config, self.position, self.ranks.rank)) as stream:
            self.position = stream.state()
            self.evaluate_if_due()
            while result.steps < config.num_training_steps and not self.ranks.any(self.watcher.should_stop()):
                self.update(result.steps + 1, stream)
                if not result.state_bytes:
                    result.state_bytes = state_bytes(self.optimizer)
                self.evaluate_if_due()
                if config.saves(result.steps) and not result.skipped_in_a_row:
                    self.save()
        if result.steps < config.num_training_steps or self.evaluation_is_due():
            result.status = "interrupted"

    def update(self, step: int, stream: Batches) -> None:
        """One optimizer step over `accumulation` batches, left out where it would not be finite; writes one line of metrics."""
        config, result = self.config, self.result
        self.probe.begin()
        compiled, start = compiled_so_far(), time.perf_counter()
        lr = result.lr * config.lr_factor(step - 1, result.optimizer)
        set_lr(self.optimizer, lr)
        drawing = time.perf_counter()
        parts = [next(stream) for _ in range(config.accumulation)]
        data_s = time.perf_counter() - drawing
        # Not a mean of means: parts, and the other ranks' parts, may hold more padding than others.
        targets, tokens = (
            int(number)
            for number in self.ranks.total(sum(counted(own) for _, own in parts), sum(self.own_loss.tokens(*part) for part in parts))
        )
        mean_loss, auxiliary, bad = self.backward(parts, targets)
        row: dict[str, Any] = {"step": step, "loss": mean_loss, "lr": lr}
        row |= {"aux_loss": auxiliary} if self.own_loss.auxiliary_weight else {}
        if not bad:
            row |= self.gradient_norm()
            mine = row.get("grad_norm", 0.0)  # where updates inside the backward pass consume gradients, of this process alone
            bad = f"the gradient norm is {mine}" if self.ranks.any(not math.isfinite(mine)) else ""
        if bad:
            result.skipped += 1
            row["skipped"] = bad
        else:
            with self.probe.stepping():
                self.optimizer.step()
        self.tell_of_layers_left()
        result.skipped_in_a_row = result.skipped_in_a_row + 1 if bad else 0
        self.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - start
        result.steps, self.position = step, stream.state()
        result.tokens_seen += tokens
        result.seconds += seconds
        if math.isfinite(mean_loss):
            result.losses.append((step, mean_loss))
        row |= {"tokens_seen": result.tokens_seen, "seconds": round(seconds, 6)}
        row["data_s"] = round(data_s, 6)  # of these seconds, waited for text
        if warm_up := "compiling" if compiled_so_far() > compiled else "first step" if self.starting else "":
            row["warm_up"] = warm_up  # its time tells nothing of those that follow
        else:
            result.timed_tokens += tokens
            result.timed_seconds += seconds
            row["tokens_per_s"] = round(tokens / seconds, 1)
            row |= self.speed(sum(places(inputs) for inputs, _ in parts) / seconds)
        self.starting = False
        row |= {} if bad else self.probe.finish()
        row |= memory_mb(self.device)
        result.peak_memory_mb = max(result.peak_memory_mb, row["peak_rss_mb"])
        self.write(row)
        self.watcher.step(row, config.num_training_steps)
        if result.skipped_in_a_row >= config.max_bad_steps:
            raise self.not_finite(f"{bad} at step {step}, {result.skipped_in_a_row} skipped in a row")

    def backward(self, parts: list[tuple[Any, Tensor]], counted: int) -> tuple[float, float, str]:
        """Gradients of the mean loss over the `counted` targets of all ranks' `parts`; returns that loss as cross-entropy and auxiliary
        part, and why the step is to be left out, if it is."""
        mean_loss, auxiliary, bad = 0.0, 0.0, ""
        for index, (inputs, targets) in enumerate(parts, 1):
            with self.ranks.averaging(self.shared_loss, now=index == len(parts)):
                with self.probe.saving():
                    loss = self.loss(inputs, targets) / counted
                added = float(self.own_loss.auxiliary) / counted  # of `loss`, beside its cross-entropy
                mean_loss += self.ranks.total(loss.item() - added)[0]
                auxiliary += self.ranks.total(added)[0] if self.own_loss.auxiliary_weight else 0.0
                # Before the backward pass: with per-layer updates it is the one that moves weights.
                if index == len(parts) or not math.isfinite(mean_loss + auxiliary):
                    bad = self.why_bad(mean_loss, auxiliary)
                if bad:
                    break
                (loss * self.ranks.size).backward()  # what follows is an average over the ranks, and this a sum
        return mean_loss, auxiliary, bad

    def tell_of_layers_left(self) -> None:
        """One note on the layers whose gradient turned out to need its ordinary way."""
        new = [] if self.fused is None else self.fused.left[self.told :]
        if new:
            self.told += len(new)
            self.watcher.warn(
                f"{len(new)} matrices are used outside of their layers too, so from now on their gradients are made in full and then "
                f"projected: {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}"
            )

    def loss(self, inputs: Any, targets: Tensor) -> Tensor:
        """The sum over the targets of one part of a step."""
        return self.shared_loss(inputs.to(self.device), targets.to(self.device))

    def why_bad(self, loss: float, auxiliary: float) -> str:
        if not math.isfinite(loss + auxiliary):
            return f"the loss is {loss}" if not math.isfinite(loss) else f"the auxiliary loss is {auxiliary}"
        recent = [value for _, value in self.result.losses[-_RECENT:]]
        rise = loss - median(recent) if len(recent) == _RECENT else 0.0
        if 0 < self.config.max_loss_rise < rise:
            return f"the loss is {loss:.4g}, {rise:.3g} above the median of the last {_RECENT}"
        return ""

    def speed(self, tokens_per_s: float) -> dict[str, float]:
        """{"tflops": of the model alone, a second and device, "mfu": their share of the device's peak, where that is known}.

        `tokens_per_s` that one device reads, padding too: it costs what text costs.
        """
        achieved = tokens_per_s * self.flops
        shares = {"mfu": round(achieved / self.peak_flops, 5)} if self.peak_flops else {}
        return {"tflops": float(f"{achieved / 1e12:.5g}")} | shares

    def gradient_norm(self) -> dict[str, float]:
        """{"grad_norm": of all gradients}, which are clipped to --grad_clipping where that is given; {} where they are consumed."""
        import torch

        if self.config.grad_clipping > 0:
            return {"grad_norm": as_number(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clipping))}
        return self.probe.gradient_norm()

    def evaluation_is_due(self) -> bool:
        step = self.result.steps
        return self.config.evaluates(step) and [at for at, _ in self.result.evals[-1:]] != [step]

    def evaluate_if_due(self) -> None:
        """The validation loss, and a task's scores. Given up when the watcher asks to stop."""
        if not self.evaluation_is_due():
            return
        result = self.result
        start = time.perf_counter()
        last = result.steps == self.config.num_training_steps
        should_stop = self.ranks.together(self.watcher.should_stop)
        found = self.task.evaluate(self.own_loss, Place(self.device, self.ranks, should_stop, last))
        if found is None:
            return  # a resumed run makes up for it
        if not math.isfinite(found["eval_loss"]):
            raise self.not_finite(f"the validation loss is {found['eval_loss']} after step {result.steps}")
        result.evals.append((result.steps, found["eval_loss"]))
        if "scores" in found:
            result.scores.append((result.steps, found["scores"]))
        if (value := self.task.value(found)) is not None:
            result.values.append((result.steps, value))
        timed = {"tokens_seen": result.tokens_seen, "seconds": round(time.perf_counter() - start, 6)}
        row = {"step": result.steps, **found, **timed}
        self.write(row)
        self.watcher.evaluated(row)
        if self.ranks.any(result.best is not None and result.best[0] == result.steps):
            self.write_checkpoint(BEST, 1)

    def not_finite(self, what: str) -> NonFiniteLoss:
        return NonFiniteLoss(f"{what}; lower the lr (now {self.result.lr:g}), raise --warmup_steps, or set --grad_clipping 1.0")

    def save(self) -> None:
        """Write a checkpoint, but no second one of a step, and none of weights that are not finite: those push out good ones."""
        config, result = self.config, self.result
        as_parts(self.own_loss)
        broken = not all(bool(local(p).isfinite().all()) for p in self.model.parameters())
        if config.throwaway or self.ranks.any(result.steps == self.saved or broken):
            return
        self.saved = result.steps
        self.write_checkpoint("checkpoints", config.keep + result.skipped_in_a_row)  # doubtful ones push out none

    def write_checkpoint(self, folder: str, keep: int) -> None:
        """All of the run as it is now, in a folder of its own in `folder`, which keeps the newest `keep` of them; all processes call it."""
        config, result, ranks = self.config, self.result, self.ranks
        as_parts(self.own_loss)
        lanes: Lanes = {lane: place for part in ranks.every(self.position or {}) for lane, place in part.items()}
        if not ranks.leads:
            if ranks.sharded:
                place = Path(ranks.from_first())
                with plain_failures(f"the checkpoint of step {result.steps}", place.parent):
                    fill_parts(place, self.model, self.optimizer)
            return
        trainer = result.record() | {
            "positions": [place for _, place in sorted(lanes.items())],
            "sequences_drawn": result.steps * config.sequences_per_update,
            "last_lr": self.optimizer.param_groups[0]["lr"],
            "identity": identity(config, result.optimizer, result.lr, self.data),
        }

        def fill_all(place: Path) -> None:
            if ranks.sharded:
                ranks.from_first(str(place.resolve()))
            fill(place, self.model, self.optimizer, self.data.tokenizer.fast, trainer, self.folder / METRICS, self.device)

        write_checkpoint(self.folder / folder, result.steps, fill_all, keep)

    def write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN. Flushed at once: what a killed run has measured is on disk.
        finite = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        self.metrics.write(json.dumps(finite) + "\n")
        self.metrics.flush()
