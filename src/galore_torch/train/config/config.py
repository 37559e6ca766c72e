"""PretrainConfig: settings that have been checked. Construction refuses what cannot work. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from galore_torch.train.config.bounds import BOUNDS, check_choice, check_number
from galore_torch.train.config.compare import check_contenders
from galore_torch.train.config.derived import DerivedSettings
from galore_torch.train.config.settings import TRACKERS
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import hf_positions, model_folder
from galore_torch.train.optimizers.registry import check_shardable, optimizer_spec, own_settings


@dataclass(frozen=True)
class PretrainConfig(DerivedSettings):
    """Settings of one `galore pretrain` call; construction settles and checks them."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if bounds := item.metadata.keys() & BOUNDS:
                check_number(
                    item.name, getattr(self, item.name), **{bound: item.metadata[bound] for bound in item.metadata if bound in bounds}
                )
            if "choices" in item.metadata:
                check_choice(item.name, getattr(self, item.name), item.metadata["choices"])
        self._settle()
        self._check_model()
        self._check_batch()
        self._check_schedule()
        self._check_looking()
        self._check_processes()
        self._check_gradients()
        check_contenders(self.compare, self.contenders, self.given)

    def _settle(self) -> None:
        """Give the settings that follow from others their value, so that every reader sees numbers."""
        if self.nproc is not None and self.processes == 1:  # no launcher has started any
            object.__setattr__(self, "processes", self.nproc)
            object.__setattr__(self, "machine", self.nproc)
        object.__setattr__(self, "machine", self.machine or self.processes)
        if self.hf_model is not None:
            if self.hf_model.startswith(("/", "./", "../")) and not Path(self.hf_model).exists():
                raise UserError(f"--hf_model {self.hf_model} does not exist; give a folder with a model, or a name on the hub")
            object.__setattr__(self, "hf_model", model_folder(self.hf_model))
        if self.max_length is None:
            object.__setattr__(self, "max_length", self._usual_length())
        if self.gradient_accumulation is not None:
            total = self.gradient_accumulation * self.sequences_at_once
            if self.total_batch_size not in (None, total):
                raise UserError(
                    f"--gradient_accumulation {self.gradient_accumulation} times {self._at_once} is {total}, "
                    f"but --total_batch_size is {self.total_batch_size}; leave one of them out"
                )
            object.__setattr__(self, "total_batch_size", total)
        if self.max_train_tokens is not None:
            if self.pad_documents:
                raise UserError(
                    f"--max_train_tokens {self.max_train_tokens} and --pad_documents: how many tokens are not padding is known only when "
                    "they have been read; say how long to train with --num_training_steps, or leave --pad_documents out"
                )
            if {"max_train_tokens", "num_training_steps"} <= self.given:
                raise UserError("--max_train_tokens and --num_training_steps both say how long to train; leave one of them out")
            steps = self.max_train_tokens // (self.sequences_per_update * self.max_length)
            if not steps:
                raise UserError(
                    f"--max_train_tokens {self.max_train_tokens} is less than one step of "
                    f"{self.sequences_per_update * self.max_length} tokens; give more, or a smaller batch"
                )
            object.__setattr__(self, "num_training_steps", steps)

    def _usual_length(self) -> int:
        """--max_length where it is not given; the model is known to be there."""
        return 128 if (self.model_config, self.hf_model) == ("demo", None) else 256

    @property
    def tokens_at_once(self) -> int:
        """Tokens in the largest forward pass of one process whose logits are made."""
        return self.batch_size * self.max_length

    @property
    def data_flags(self) -> tuple[str, ...]:
        """The settings that decide what is trained on; the first one says where it is from."""
        return ("data", "eval_data", "tokenizer")

    @property
    def positions(self) -> int:
        """That a text may take."""
        return hf_positions(self.hf_model) if self.hf_model else self.shape.max_position_embeddings

    def _check_model(self) -> None:
        if self.continue_from is not None:
            raise UserError(
                f"--continue_from {self.continue_from}: to go on with a run where it stopped give --resume {self.continue_from}; "
                f"to go on from its weights alone, as the published script did, give --hf_model {self.continue_from}"
            )
        if self.hf_model is not None:
            if "model_config" in self.given:
                raise UserError(f"--model_config and --hf_model are both given, and {self.hf_model} has its own; leave one of them out")
            if "vocab_size" in self.given:
                raise UserError(
                    f"--vocab_size {self.vocab_size} has no effect on --hf_model {self.hf_model}, whose embedding has its rows; "
                    "leave it out, and --tokenizer too where that has more ids than the model's own"
                )
            if "low_rank" in dict(self.contenders):
                raise UserError(
                    "low_rank starts from random factors, not from the weights of --hf_model; leave one of them out, or take lora"
                )
        if self.max_length > self.positions:
            raise UserError(
                f"--max_length {self.max_length} is more than the {self.positions} "
                f"positions of {self.model_name}; give a smaller --max_length"
            )
        if self.rank is not None and self.rank >= self.shape.hidden_size:
            raise UserError(
                f"--rank {self.rank} is not below the width {self.shape.hidden_size} of {self.model_name}, "
                f"so nothing would be projected; try --rank {max(1, self.shape.hidden_size // 4)}"
            )
        for name, _ in self.contenders:
            if self.gap_range is None:
                break
            least, most = self.gap_range
            gap = self.update_proj_gap or own_settings(name, self.dtype, self.usual)["update_proj_gap"]
            if "gap_range" in optimizer_spec(name).flags and not 1 <= least <= gap <= most:
                raise UserError(
                    f"--gap_range {least} {most} must have --update_proj_gap {gap} between them; "
                    f"try --gap_range {max(1, gap // 4)} {8 * gap}"
                )

    def _check_batch(self) -> None:
        if self.sequences_per_update != (self.total_batch_size or self.sequences_at_once):
            raise UserError(
                f"--total_batch_size {self.total_batch_size} is not a multiple of {self._at_once}; try --total_batch_size "
                f"{max(1, self.accumulation) * self.sequences_at_once}"
            )
        if "eval_tokens" in self.settings() and self.eval_tokens < self.max_length * self.processes:
            each = (
                "one sequence; give at least --max_length"
                if self.processes == 1
                else f"one sequence for each of {self.processes} processes"
            )
            raise UserError(f"--eval_tokens {self.eval_tokens} is less than {each}, {self.max_length * self.processes}")
        if self.compare and self.resume not in (None, "auto"):
            raise UserError(f"--resume {self.resume} names one checkpoint, but --compare has {len(self.compare)} runs; use --resume auto")

    @property
    def _at_once(self) -> str:
        return f"--batch_size {self.batch_size}" + (f" x {self.processes} processes" if self.processes > 1 else "")

    def _check_processes(self) -> None:
        if self.nproc is not None and self.nproc != self.processes:
            raise UserError(
                f"--nproc {self.nproc} starts processes, and a launcher has started {self.processes} already: leave --nproc out, or the "
                "launcher"
            )
        assert len(self.mesh) < 3, "asked for what it refuses"
        for name, _ in self.contenders if self.sharded else ():
            check_shardable(name, self.parallel)
        for name, _ in self.contenders if self.processes > 1 and not self.sharded else ():
            if optimizer_spec(name).per_layer and not optimizer_spec(name).low_rank_gradients:
                raise UserError(
                    f"{name} frees each whole gradient in the backward pass, and {self.processes} processes keep theirs until they are "
                    f"averaged, so nothing would be saved; choose {name.removesuffix('_per_layer')}, or one process"
                )

    def _check_gradients(self) -> None:
        for name, _ in self.contenders if self.gradients == "full" else ():
            if optimizer_spec(name).per_layer and optimizer_spec(name).low_rank_gradients:
                raise UserError(
                    f"--gradients full keeps whole gradients until the step, and {name} keeps none; "
                    f"choose {name.removesuffix('_per_layer')}, or --gradients project"
                )

    def _check_looking(self) -> None:
        for name in self.tracker:
            check_choice("tracker", name, TRACKERS)
        if self.track_subspace and not any(optimizer_spec(name).low_rank for name, _ in self.contenders):
            names = ", ".join(name for name, _ in self.contenders)
            raise UserError(f"--track_subspace has no effect on {names}; leave it out, or choose galore_adamw")

    def _check_schedule(self) -> None:
        steps, names = self.num_training_steps, [name for name, _ in self.contenders]
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < steps:
            raise UserError(
                f"--warmup_steps {self.warmup_steps} must be at least 0 and less than --num_training_steps {steps}; "
                f"try --warmup_steps {steps // 10}"
            )
        if self.random_after is not None and self.random_after >= steps:
            raise UserError(
                f"--random_after {self.random_after} is not below --num_training_steps {steps}: no basis would be random; "
                f"try --random_after {steps // 2}"
            )
        if self.scheduler == "constant" and "min_lr_ratio" in self.given:
            raise UserError(f"--min_lr_ratio {self.min_lr_ratio} has no effect on --scheduler constant; leave it out, or choose cosine")
        if self.decay_steps is not None and self.scheduler != "wsd":
            raise UserError(f"--decay_steps {self.decay_steps} has no effect on --scheduler {self.scheduler}; leave it out, or choose wsd")
        if self.decay_steps is not None and self.decay_steps > steps - self.warmup:
            raise UserError(
                f"--decay_steps {self.decay_steps} is more than the {steps - self.warmup} steps after warm-up; "
                f"try --decay_steps {max(1, steps // 5)}"
            )
        restarts = "relora" if "relora" in names else "--scheduler cosine_restarts" if self.scheduler == "cosine_restarts" else None
        for name in ("cycle_length", "restart_warmup_steps"):
            if getattr(self, name) is not None and restarts is None:
                raise UserError(
                    f"--{name} {getattr(self, name)} has no effect here; leave it out, or choose --scheduler cosine_restarts or relora"
                )
        if restarts and not (self.cycle_length and self.warmup < self.cycle_length < steps):
            raise UserError(
                f"{restarts} needs --cycle_length, the steps between two restarts, above --warmup_steps {self.warmup} and below "
                f"--num_training_steps {steps} (now {self.cycle_length})"
            )
        if restarts and self.restart_warmup_steps is not None and self.restart_warmup_steps >= (self.cycle_length or 0):
            raise UserError(f"--restart_warmup_steps {self.restart_warmup_steps} must be less than --cycle_length {self.cycle_length}")
