"""What follows from the settings of a command: its optimizers, batch, schedule, sizes and notes. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_torch.optim.half_life import beta2_of_half_life
from galore_torch.train.config.compare import contenders, run_names
from galore_torch.train.config.parallel import mesh_shape
from galore_torch.train.config.settings import DTYPES, Settings, is_hub_name
from galore_torch.train.errors import UserError
from galore_torch.train.model.llama import DEMO_VOCAB, ModelShape, model_shape, preset_name
from galore_torch.train.model.pretrained import HFShape, hf_shape
from galore_torch.train.optimizers.registry import as_targets, optimizer_spec, settled_gradients, unused_flags
from galore_torch.train.optimizers.schedule import Schedule

if TYPE_CHECKING:
    from galore_torch.train.model.sizes import Sizes


@dataclass(frozen=True)
class DerivedSettings(Settings):
    """Settings, and what they amount to; not checked."""

    @property
    def contenders(self) -> list[tuple[str, float]]:
        """(optimizer name in lower case, peak learning rate) of each run, in order."""
        return contenders(self.compare or (self.optimizer,), self.lr, bool(self.hf_model))

    @property
    def run_names(self) -> list[str]:
        """A name for each contender's folder."""
        return run_names(self.contenders)

    @property
    def notes(self) -> list[str]:
        """What the user gave that does not act as he might think, one sentence each."""
        notes = [
            f"{name} does not use {', '.join('--' + flag for flag in unused)}"
            for name in dict(self.contenders)
            if (unused := unused_flags(name, self.given))
        ]
        if self.parallel != "ddp" and self.processes == 1:
            notes.append(f"--parallel {self.parallel}: one process holds all of the model; it trains as several would")
        if self.deferred:
            notes += [
                f"{name} keeps whole gradients under accumulation or clipping, as there is no low-rank form of them to keep"
                for name in dict(self.contenders)
                if optimizer_spec(name).per_layer and not optimizer_spec(name).low_rank_gradients
            ]
        if self.grad_clipping > 0 and self.gradients is None:
            notes += [
                f"--grad_clipping measures {name}'s projected gradients; --gradients full measures whole ones, as published"
                for name in dict(self.contenders)
                if self.gradients_of(name) != "full" and not optimizer_spec(name).per_layer
            ]
        notes += [f"--{item.name} has no effect: {item.metadata['note']}" for item in fields(self) if self._is_noted(item)]
        return [*self.remarks, *notes, *self._own_notes()]

    def _own_notes(self) -> list[str]:
        """Those on what this command alone trains, and on which text."""
        notes = []
        if self.model_config.endswith(".json") and (preset := preset_name(self.model_config)):
            notes.append(f"there is no file {self.model_config}; the preset {preset} has the published sizes")
        if "workers" in self.given and not self.streams:
            notes.append("--workers has no effect: text that is not streamed is tokenised before training starts")
        if "c4" in self.data + self.eval_data and Path("c4").exists():
            notes.append("c4 is the data set of the hub; the files here are ./c4")
        if self.hf_model and self.lr is None:
            rates = ", ".join(f"{name} {lr:g}" for name, lr in self.contenders)
            notes.append(f"no --lr: a trained model goes on at a tenth of the rate for one from scratch ({rates})")
        if not self.data and self.model_name != "demo":
            notes.append("no --data: this trains on the source of Python's standard library, not on C4")
        return notes

    def _is_noted(self, item: Field[Any]) -> bool:
        return "note" in item.metadata and getattr(self, item.name) is not None

    @property
    def model_name(self) -> str:
        """What the user calls the model."""
        return self.hf_model or self.model_config

    @property
    def shape(self) -> ModelShape | HFShape:
        """Width, positions and vocabulary of the model."""
        return hf_shape(self.hf_model) if self.hf_model else model_shape(self.model_config)

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the embedding; None: as many as the tokenizer has ids."""
        return self.vocab_size or self.shape.vocab_size

    @property
    def tokenizer_name(self) -> str | None:
        """The tokenizer to load; None: one is trained."""
        return self.tokenizer or self.hf_model

    @property
    def streams(self) -> bool:
        """Whether the training text is read and tokenised during training."""
        return self.stream or any(map(is_hub_name, self.data))

    @property
    def sequences_at_once(self) -> int:
        """Sequences in one forward pass, of all processes together."""
        return self.batch_size * self.processes

    @property
    def accumulation(self) -> int:
        """Forward passes in one step."""
        return (self.total_batch_size or self.sequences_at_once) // self.sequences_at_once

    @property
    def sequences_per_update(self) -> int:
        """Of all processes together."""
        return self.accumulation * self.sequences_at_once

    @property
    def deferred(self) -> bool:
        """Whether gradients wait for all of a step: forward passes are accumulated, or the norm of all gradients is clipped."""
        return self.accumulation > 1 or self.grad_clipping > 0

    def gradients_of(self, optimizer: str) -> str:
        """--gradients of one optimizer, settled: direct, project or full."""
        return settled_gradients(optimizer, self.gradients, self.sharded)

    @property
    def mesh(self) -> tuple[int, ...]:
        """Sizes of the device mesh that cuts the model, () where each process holds all of it."""
        return mesh_shape(self.parallel, self.processes, self.machine) if self.processes > 1 else ()

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of every weight; one process that holds all trains alike, so that runs can move."""
        return self.parallel != "ddp"

    @property
    def resolved_proj_type(self) -> str:
        """Of rows that are shared out the basis lies on the columns, whichever side is the short one."""
        return "right" if self.sharded and self.proj_type == "std" else self.proj_type

    @property
    def shards(self) -> int:
        """The parts into which a weight is cut."""
        return (1, *self.mesh)[-1]

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up, settled."""
        return self.num_training_steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def resolved_rank(self) -> int:
        """A quarter of the short side of what is projected: a LLaMA's width, a mixture's experts where they are narrower."""
        if self.rank is not None:
            return self.rank
        side = self.shape.hidden_size
        if self.hf_model or self.targets:
            with suppress(UserError):  # what builds the model, or the optimizer, refuses it
                side = self.sizes(as_targets(self.targets)).short_side
        return max(1, side // 4)

    def sizes(self, targets: str | tuple[str, ...] | None = None, vocab_size: int | None = None) -> Sizes:
        """The model's parameters; `vocab_size` where it is known from the text."""
        from galore_torch.train.model.sizes import hf_sizes, llama_sizes  # torch

        if self.hf_model:
            return hf_sizes(self.hf_model, targets)
        return llama_sizes(model_shape(self.model_config), vocab_size or self.embedding_rows or DEMO_VOCAB, targets)

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """What `build_optimizer` takes beside the name and the learning rate."""
        low_rank = ("update_proj_gap", "gap_range", "galore_scale", "proj_type", "targets", "state_codec", "basis_codec")
        names = (*low_rank, "weight_decay", "beta1", "cycle_length", "carry_codec", "scale_parameter")
        own: dict[str, Any] = {"rank": self.resolved_rank, "rank_is_given": self.rank is not None, "beta2": self.beta2, "usual": self.usual}
        own["random_after"] = self.num_training_steps // 2 if self.random_after is None else self.random_after
        return own | {name: getattr(self, name) for name in names} | {"proj_type": self.resolved_proj_type}

    @property
    def beta2(self) -> float | None:
        """Of Adam, by --beta2_half_life; None: the optimizer's own."""
        if self.beta2_half_life is None:
            return None
        return beta2_of_half_life(self.sequences_per_update * self.max_length, self.beta2_half_life)

    @property
    def torch_dtype(self) -> str:
        """The name of the dtype in torch."""
        return DTYPES[self.dtype]

    @property
    def derived_steps(self) -> dict[str, int]:
        """What the schedule takes where these flags are not given."""
        decay = max(1, min(self.num_training_steps // 5, self.num_training_steps - self.warmup))
        return {"decay_steps": decay, "restart_warmup_steps": max(1, (self.cycle_length or 0) // 10)}

    def evaluates(self, step: int) -> bool:
        """Whether the model is evaluated after `step`; before the first and after the last in any case."""
        return not self.throwaway and (step in (0, self.num_training_steps) or (self.eval_every > 0 and step % self.eval_every == 0))

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`; after the last in any case."""
        return self.save_every > 0 and step % self.save_every == 0

    def schedule(self, optimizer: str = "") -> Schedule:
        """The schedule of one optimizer: all share --scheduler, but relora's cosine restarts where it merges."""
        kind = "cosine_restarts" if optimizer == "relora" and self.scheduler == "cosine" else self.scheduler
        derived = self.derived_steps
        cycle = self.cycle_length or 0
        decay, restart = self.decay_steps or derived["decay_steps"], self.restart_warmup_steps or derived["restart_warmup_steps"]
        return Schedule(kind, self.num_training_steps, self.warmup, self.min_lr_ratio, decay, cycle, restart)

    def lr_factor(self, step: int, optimizer: str = "") -> float:
        """Share of the peak learning rate at step `step` (from 0)."""
        return self.schedule(optimizer).factor(step)
