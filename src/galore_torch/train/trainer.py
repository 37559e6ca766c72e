"""One optimizer, one model, one pass through the schedule: the training loop and its measurements.

Prints nothing and writes one file, metrics.jsonl. What is shown goes through the `Watcher`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from galore_torch.train.config import PretrainConfig
from galore_torch.train.data import TokenData, batches, windows_in_order
from galore_torch.train.measure import Probe
from galore_torch.train.model import build_model, model_shape
from galore_torch.train.optim import (
    adamw_state_bytes,
    build_optimizer,
    per_layer_updates,
    state_bytes,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_MB = 1e6


class Watcher(Protocol):
    """Who looks on: told of every update, asked whether to stop."""

    def step(self, row: dict[str, Any], total: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def should_stop(self) -> bool: ...


@dataclass
class RunResult:
    """What one run measured. Sizes in bytes, times in seconds, losses in nats per token."""

    optimizer: str
    lr: float
    parameters: int = 0
    state_bytes: int = 0
    adamw_state_bytes: int = 0
    steps: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0  # of updates alone, without evaluation
    peak_memory_mb: float = 0.0
    status: str = "finished"  # or "interrupted", or why it stopped
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, training loss)
    evals: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_seen / self.seconds if self.seconds else 0.0

    @property
    def finished(self) -> bool:
        return self.status == "finished"


class NonFiniteLoss(ArithmeticError):
    """The loss is NaN or infinite; the text names the step and the cure."""


def train(config: PretrainConfig, name: str, lr: float, data: TokenData, folder: Path, watcher: Watcher) -> tuple[RunResult, nn.Module]:
    """Train from the seed's weights with the optimizer `name`; write folder/metrics.jsonl."""
    device = pick_device(config.device)
    model = model_for(config, data).to(device)
    result = RunResult(name, lr, parameters=sum(p.numel() for p in model.parameters()))
    result.adamw_state_bytes = adamw_state_bytes(model)
    optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
    deferred = config.accumulation > 1 or config.grad_clipping > 0
    with (
        (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics,
        per_layer_updates(name, model, optimizer, deferred=deferred),
    ):
        loop = _Loop(config, model, optimizer, data, device, result, metrics, watcher)
        try:
            loop.run()
        except NonFiniteLoss as stop:
            result.status = str(stop)
    return result, model


def model_for(config: PretrainConfig, data: TokenData) -> nn.Module:
    """The seed's model with the tokenizer's end-of-text token and the settled vocabulary."""
    return build_model(
        model_shape(config.model_config).with_vocab(data.vocab_size),
        seed=config.seed,
        dtype=config.torch_dtype,
        bos_token_id=data.tokenizer.fast.bos_token_id,
        eos_token_id=data.tokenizer.end_id,
        activation_checkpointing=config.activation_checkpointing,
    )


@dataclass
class _Loop:
    config: PretrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: TokenData
    device: str
    result: RunResult
    metrics: IO[str]
    watcher: Watcher

    def __post_init__(self) -> None:
        self.probe = Probe(self.model, self.optimizer, self.device, track_subspace=self.config.track_subspace)

    def run(self) -> None:
        config, result = self.config, self.result
        stream = batches(self.data.train, config.max_length, config.batch_size, config.seed)
        self.evaluate()
        for step in range(1, config.num_training_steps + 1):
            if self.watcher.should_stop():
                result.status = "interrupted"
                return
            self.update(step, stream)
            if step == 1:
                result.state_bytes = state_bytes(self.optimizer)
            last = step == config.num_training_steps
            if last or (config.eval_every and step % config.eval_every == 0):
                self.evaluate()

    def update(self, step: int, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step over `accumulation` batches; writes one line of metrics."""
        import torch

        config, result = self.config, self.result
        self.probe.begin()
        start = time.perf_counter()
        lr = result.lr * config.lr_factor(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mean_loss = 0.0
        for _ in range(config.accumulation):
            inputs, targets = next(stream)
            with self.probe.saving():
                loss = self.loss(inputs, targets)
            mean_loss += loss.item() / config.accumulation
            # Before the backward pass: with per-layer updates it is the one that moves weights.
            self.check_finite(mean_loss, f"the loss is {mean_loss} at step {step}")
            (loss / config.accumulation).backward()
        row: dict[str, Any] = {"step": step, "loss": mean_loss, "lr": lr}
        if config.grad_clipping > 0:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clipping)
            row["grad_norm"] = norm.item()
            self.check_finite(row["grad_norm"], f"the gradient norm is {norm.item()} at step {step}")
        else:
            row |= self.probe.gradient_norm()
        with self.probe.stepping():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - start
        tokens = config.sequences_per_update * config.max_length
        result.steps = step
        result.tokens_seen += tokens
        result.seconds += seconds
        result.losses.append((step, mean_loss))
        row |= {"tokens_seen": result.tokens_seen, "tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 6)}
        row |= self.probe.finish()
        row |= memory_mb(self.device)
        result.peak_memory_mb = row["peak_rss_mb"]
        self.write(row)
        self.watcher.step(row, config.num_training_steps)

    def loss(self, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats over (B, L) targets, in float32 whatever the weights' dtype."""
        import torch

        logits = self.model(input_ids=inputs.to(self.device)).logits  # (B, L, vocabulary)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(self.device).flatten(), reduction=reduction)

    def evaluate(self) -> None:
        """Held-out loss: the sum over tokens divided by the number of tokens."""
        import torch

        config, result = self.config, self.result
        start = time.perf_counter()
        total, tokens = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for inputs, targets in windows_in_order(self.data.held_out, config.max_length, config.batch_size):
                total += self.loss(inputs, targets, reduction="sum").item()
                tokens += targets.numel()
        self.model.train()
        mean = total / tokens
        self.check_finite(mean, f"the held-out loss is {mean} after step {result.steps}")
        result.evals.append((result.steps, mean))
        row = {
            "step": result.steps,
            "eval_loss": mean,
            "eval_perplexity": perplexity(mean),
            "eval_tokens": tokens,
            "tokens_seen": result.tokens_seen,
            "seconds": round(time.perf_counter() - start, 6),
        }
        self.write(row)
        self.watcher.evaluated(row)

    def check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteLoss(f"{what}; lower the lr (now {self.result.lr:g}), raise --warmup_steps, or set --grad_clipping 1.0")

    def write(self, row: dict[str, Any]) -> None:
        # Flushed at once: what a killed run has measured is on disk.
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()


def perplexity(mean_loss: float) -> float:
    """exp of a loss in nats per token; infinity where that overflows."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def pick_device(name: str) -> str:
    """'cpu' or 'cuda' for auto, cpu or cuda."""
    import torch

    from galore_torch.train.errors import UserError

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def memory_mb(device: str) -> dict[str, float]:
    """Memory of this process in MB (10**6 bytes) as the system counts it; CUDA's peak beside it."""
    peak = _peak_rss_mb()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        import resource

        now = pages * resource.getpagesize() / _MB
    except OSError:  # no /proc: the peak is the best that is known
        now = peak
    row = {"rss_mb": round(now, 1), "peak_rss_mb": round(max(now, peak), 1)}  # the system's peak may lag behind
    if device == "cuda":
        import torch

        row["cuda_mb"] = round(torch.cuda.memory_allocated() / _MB, 1)
        row["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / _MB, 1)
    return row


def _peak_rss_mb() -> float:
    import sys

    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB
