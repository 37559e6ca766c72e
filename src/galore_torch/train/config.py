"""PretrainConfig: every setting of `galore pretrain`, its default, its help and its bounds.

The only owner of defaults. Names are the published pre-training script's. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from galore_torch.train.errors import UserError
from galore_torch.train.model import model_shape
from galore_torch.train.optim import optimizer_spec, unused_flags

SCHEDULERS = ("cosine", "linear", "constant")
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
DEVICES = ("auto", "cpu", "cuda")
TRACKERS = ("tensorboard", "wandb", "trackio")


def _setting(default: Any, group: str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one `galore pretrain` call; construction refuses what cannot work."""

    # -- model
    model_config: str = _setting("demo", "model", "preset (demo, 9m ... 7b), a LLaMA config.json or its folder")
    vocab_size: int | None = _setting(None, "model", "rows of the embedding (default: the preset's; demo: the tokenizer's)")
    max_length: int = _setting(128, "model", "tokens in one training sequence")
    dtype: str = _setting("float32", "model", "weights: float32 or bfloat16")
    activation_checkpointing: bool = _setting(False, "model", "recompute activations in the backward pass: less memory, more time")
    # -- data
    data: tuple[str, ...] = _setting(
        (),
        "data",
        "training text: .txt, .jsonl (each also .gz) or .parquet files (default: the source of Python's standard library)",
        metavar="FILE",
    )
    eval_data: tuple[str, ...] = _setting((), "data", "held-out text (default: every 20th document of --data)", metavar="FILE")
    tokenizer: str | None = _setting(None, "data", "tokenizer folder or tokenizer.json (default: a BPE trained once and cached)")
    text_field: str = _setting("text", "data", "the column of .jsonl and .parquet with the text")
    # -- optimizer
    optimizer: str = _setting("galore_adamw", "optimizer", "one of the names listed below")
    compare: tuple[str, ...] = _setting(
        (),
        "optimizer",
        "optimizers, comma-separated, trained one after the other on the same batches from the same weights; name:lr gives one its own lr",
        metavar="NAME[:LR],...",
    )
    lr: float | None = _setting(None, "optimizer", "peak learning rate (default: per optimizer)")
    weight_decay: float = _setting(0.0, "optimizer", "weight decay")
    beta1: float | None = _setting(None, "optimizer", "first-moment decay; momentum of sgd (default: the optimizer's own)")
    rank: int | None = _setting(None, "optimizer", "rank of the subspace (default: width / 4)")
    update_proj_gap: int = _setting(50, "optimizer", "steps between two subspaces")
    galore_scale: float = _setting(0.25, "optimizer", "factor on the projected update")
    proj_type: str = _setting("std", "optimizer", "which side is projected: " + ", ".join(PROJ_TYPES))
    # -- training
    batch_size: int = _setting(16, "training", "sequences in one forward pass")
    total_batch_size: int | None = _setting(None, "training", "sequences in one update: a multiple of --batch_size (default: equal)")
    num_training_steps: int = _setting(400, "training", "updates")
    warmup_steps: int | None = _setting(None, "training", "updates of linear warm-up (default: a tenth)")
    scheduler: str = _setting("cosine", "training", "after warm-up: " + ", ".join(SCHEDULERS))
    min_lr_ratio: float = _setting(0.1, "training", "last lr as a share of --lr")
    grad_clipping: float = _setting(0.0, "training", "largest gradient norm, 0: no clipping")
    seed: int = _setting(0, "training", "weights and data order")
    device: str = _setting("auto", "training", "auto, cpu or cuda")
    # -- run
    eval_every: int = _setting(100, "run", "updates between evaluations, 0: before and after only")
    eval_tokens: int = _setting(65536, "run", "held-out tokens to evaluate on, at most")
    track_subspace: bool = _setting(False, "run", "write to metrics.jsonl how much of each matrix's subspace every refresh kept")
    tracker: tuple[str, ...] = _setting((), "run", "also log to: " + ", ".join(TRACKERS), metavar="NAME")
    save_dir: str | None = _setting(None, "run", "new folder for the run (default: runs/pretrain-<date>-<time>)")
    # Names the user typed; they must not be ignored by the optimizer.
    given: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "num_training_steps", "update_proj_gap"):
            self._number(name, lambda v: v >= 1, "at least 1")
        for name in ("vocab_size", "rank", "total_batch_size", "eval_tokens"):
            self._number(name, lambda v: v >= 1, "at least 1")
        for name in ("eval_every", "weight_decay", "grad_clipping"):
            self._number(name, lambda v: v >= 0, "at least 0")
        self._number("seed", lambda v: 0 <= v < 2**63, "between 0 and 2**63 - 1")
        for name in ("lr", "galore_scale"):
            self._number(name, lambda v: v > 0, "greater than 0")
        self._number("beta1", lambda v: 0 <= v < 1, "in [0, 1)")
        self._number("min_lr_ratio", lambda v: 0 <= v <= 1, "in [0, 1]")
        self._choice("scheduler", SCHEDULERS)
        self._choice("proj_type", PROJ_TYPES)
        self._choice("device", DEVICES)
        self._choice("dtype", tuple(DTYPES))
        self._check_together()
        self._check_optimizers()
        self._check_looking()

    def _number(self, name: str, holds: Callable[[Any], bool], bound: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise UserError(f"--{name} {value} is out of bounds: give a number {bound}")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise UserError(f"--{name} {value!r} is not known; choose one of: {', '.join(choices)}")

    def _check_together(self) -> None:
        shape = model_shape(self.model_config)
        if self.max_length > shape.max_position_embeddings:
            raise UserError(
                f"--max_length {self.max_length} is more than the {shape.max_position_embeddings} "
                f"positions of --model_config {self.model_config}; give a smaller --max_length"
            )
        if self.rank is not None and self.rank >= shape.hidden_size:
            raise UserError(
                f"--rank {self.rank} is not below the width {shape.hidden_size} of --model_config {self.model_config}, "
                f"so nothing would be projected; try --rank {max(1, shape.hidden_size // 4)}"
            )
        if self.accumulation * self.batch_size != (self.total_batch_size or self.batch_size):
            raise UserError(
                f"--total_batch_size {self.total_batch_size} is not a multiple of --batch_size "
                f"{self.batch_size}; try --total_batch_size "
                f"{max(1, self.accumulation) * self.batch_size}"
            )
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < self.num_training_steps:
            raise UserError(
                f"--warmup_steps {self.warmup_steps} must be at least 0 and less than --num_training_steps {self.num_training_steps}"
            )
        if self.scheduler == "constant" and "min_lr_ratio" in self.given:
            raise UserError(f"--min_lr_ratio {self.min_lr_ratio} has no effect on --scheduler constant; leave it out, or choose cosine")
        if self.eval_tokens < self.max_length:
            raise UserError(f"--eval_tokens {self.eval_tokens} is less than one sequence; give at least --max_length, {self.max_length}")

    def _check_optimizers(self) -> None:
        if self.compare and "optimizer" in self.given:
            raise UserError("--optimizer and --compare are both given; name every one in --compare")
        names = [name for name, _ in self.contenders]
        if len(set(self.contenders)) < len(names):
            raise UserError(f"--compare names one optimizer twice with one lr: {', '.join(self.compare)}; write name:lr")
        for flag in sorted(self.given):
            blind = [name for name in names if flag in unused_flags(name, self.given)]
            if len(blind) == len(names):
                raise UserError(
                    f"--{flag} has no effect on {', '.join(names)}; leave it out, or choose an optimizer that uses it, such as galore_adamw"
                )

    def _check_looking(self) -> None:
        unknown = [name for name in self.tracker if name not in TRACKERS]
        if unknown:
            raise UserError(f"--tracker {unknown[0]!r} is not known; choose from: {', '.join(TRACKERS)}")
        if self.track_subspace and not any(optimizer_spec(name).low_rank for name, _ in self.contenders):
            names = ", ".join(name for name, _ in self.contenders)
            raise UserError(f"--track_subspace has no effect on {names}; leave it out, or choose galore_adamw")

    @property
    def contenders(self) -> list[tuple[str, float]]:
        """(optimizer name in lower case, peak learning rate) of each run, in order."""
        result = []
        for item in self.compare or (self.optimizer,):
            name, _, own_lr = item.partition(":")
            spec = optimizer_spec(name)
            lr = spec.default_lr if self.lr is None else self.lr
            if own_lr:
                try:
                    lr = float(own_lr)
                except ValueError:
                    lr = -1.0
                if not (math.isfinite(lr) and lr > 0):
                    raise UserError(
                        f"--compare {item!r}: {own_lr!r} is no learning rate; write name:lr with "
                        f"lr greater than 0, as in {name}:{spec.default_lr}"
                    )
            result.append((name.lower(), lr))
        return result

    @property
    def run_names(self) -> list[str]:
        """A name for each contender's folder: the optimizer's, with the lr where that alone tells two apart."""
        names = [name for name, _ in self.contenders]
        return [f"{name}-lr{lr:g}" if names.count(name) > 1 else name for name, lr in self.contenders]

    @property
    def notes(self) -> list[str]:
        """What the user typed that some, not all, of the compared optimizers cannot use."""
        return [
            f"{name} does not use {', '.join('--' + flag for flag in unused)}"
            for name in dict(self.contenders)
            if (unused := unused_flags(name, self.given))
        ]

    @property
    def accumulation(self) -> int:
        """Forward passes in one update."""
        return (self.total_batch_size or self.batch_size) // self.batch_size

    @property
    def sequences_per_update(self) -> int:
        return self.accumulation * self.batch_size

    @property
    def warmup(self) -> int:
        """Updates of linear warm-up, settled."""
        return self.num_training_steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def resolved_rank(self) -> int:
        if self.rank is not None:
            return self.rank
        return max(1, model_shape(self.model_config).hidden_size // 4)

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """What `build_optimizer` takes beside the name and the learning rate."""
        names = ("update_proj_gap", "galore_scale", "proj_type", "weight_decay", "beta1")
        return {"rank": self.resolved_rank} | {name: getattr(self, name) for name in names}

    @property
    def torch_dtype(self) -> str:
        """The name of the dtype in torch."""
        return DTYPES[self.dtype]

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at update `step` (from 0): warm-up, then the schedule."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.num_training_steps - 1 - self.warmup)
        if self.scheduler == "constant":
            return 1.0
        share = 1 - progress if self.scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * share
