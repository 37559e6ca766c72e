"""What the benchmarks share: a small LLaMA on text, trained by a given optimizer, with the data order and weights of a seed."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData, batches, load_data, windows_in_order
from galore_torch.train.loop.build import model_for


class Nobody:
    """A watcher that does not look."""

    def step(self, row: object, total: int) -> None: ...
    def evaluated(self, row: object) -> None: ...
    def warn(self, message: str) -> None: ...
    def should_stop(self) -> bool:
        return False


def machine(device: str = "cpu") -> str:
    """The processor, the cores in use, the accelerator if one is, and the versions, in words."""
    model, arithmetic = "unknown processor", ""
    if Path("/proc/cpuinfo").exists():
        info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in info.items()}
        model = fields.get("model name", model)
        if "flags" in fields and not {"avx512_bf16", "amx_bf16"} & set(fields["flags"].split()):
            arithmetic = " (no bf16 arithmetic)"
    threads = f"{torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}"
    accelerator = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    return f"{model}{arithmetic}{accelerator}, {threads}, {versions}"


def steps(
    config: PretrainConfig, data: TokenData, build: Callable[[nn.Module], torch.optim.Optimizer]
) -> Iterator[tuple[int, nn.Module, Any]]:
    """Yield (step, model, optimizer) with gradients ready, then step; the learning rate follows the config's schedule."""
    torch.manual_seed(config.seed)
    model = model_for(config, data)
    optimizer = build(model)
    base = [group["lr"] for group in optimizer.param_groups]
    stream = batches(data.train, config.max_length, config.batch_size, config.seed)
    for step in range(config.num_training_steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * config.lr_factor(step)
        inputs, targets = next(stream)
        loss(model, inputs, targets).backward()
        yield step, model, optimizer
        optimizer.step()
        optimizer.zero_grad()
    yield config.num_training_steps, model, optimizer


def loss(model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=inputs).logits.float()  # a bf16 model's loss would be bf16, in steps of 0.03 nats
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_perplexity(model: nn.Module, config: PretrainConfig, data: TokenData) -> float:
    """exp of the mean loss over the held-out tokens."""
    total = tokens = 0.0
    for inputs, targets in windows_in_order(data.held_out, config.max_length, config.batch_size):
        total += float(loss(model, inputs, targets, "sum"))
        tokens += targets.numel()
    return math.exp(total / tokens)


def text(arguments: Any, **settings: Any) -> tuple[PretrainConfig, TokenData]:
    """The standard library's source, or the files given, as `galore pretrain` reads them."""
    if arguments.data:
        settings |= {"data": tuple(arguments.data), "eval_data": tuple(arguments.eval_data), "tokenizer": arguments.tokenizer}
    config = PretrainConfig(**settings)
    return config, load_data(config)


def add_data_arguments(parser: Any) -> None:
    parser.add_argument("--data", nargs="*", help="training text; default: the source of Python's standard library")
    parser.add_argument("--eval_data", nargs="*", default=[])
    parser.add_argument("--tokenizer")
