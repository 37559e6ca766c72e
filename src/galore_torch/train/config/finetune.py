"""FinetuneConfig: what `galore finetune` is told. The loop's settings are those of `galore pretrain`; model and data differ.

Flags have the published fine-tuning script's names beside their own. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from galore_torch.train.config.bounds import check_choice
from galore_torch.train.config.compare import contenders
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.declare import PUBLISHED, published, refused, setting
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import HFShape, hf_shape
from galore_torch.train.optimizers.registry import OPTIMIZERS, optimizer_spec
from galore_torch.train.optimizers.schedule import SCHEDULERS

if TYPE_CHECKING:
    from galore_torch.train.model.sizes import Sizes

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
OWN_TASKS = ("classification", "regression", "prompts")  # on the user's own files
METHODS = {
    "full": "adamw",
    "galore": "galore_adamw",
    "galore8bit": "galore_adamw8bit",
    "qgalore": "qgalore_adamw8bit",
    "lora": "lora",
}
_LR = 3e-5  # the published example's; full fine-tuning takes the same
_LORA_LR = 5e-4  # arXiv 2106.09685, table 9: 4e-4 to 5e-4 for RoBERTa-base
_LENGTHS = {"prompts": 512}  # the others: 128, as published
HOLD_OUT = 10  # one example in ten is held out where there is no --validation_file


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """Settings of one `galore finetune` call; construction settles and checks them."""

    command: ClassVar[str] = "finetune"
    sorts_batches: ClassVar[bool] = True
    # Adam's step has entries of about 1: of rank r on a side of n that many of r / n are left, and sqrt(n / r) makes up for them.
    usual: ClassVar[tuple[tuple[str, Any], ...]] = (("update_proj_gap", 200), ("galore_scale", 2.0))
    left_out: ClassVar[frozenset[str]] = frozenset(
        {
            *("model_config", "vocab_size", "data", "eval_data", "text_field", "stream", "pad_documents", "workers"),
            *(
                "beta2_half_life",
                "max_train_tokens",
                "eval_tokens",
                "legacy_eval",
                "use_hf_model",
                "single_gpu",
                "tags",
                "name",
                "continue_from",
            ),
        }
    )

    # -- model
    hf_model: str | None = setting(None, "model", "the model to fine-tune: a transformers folder or hub name", also=("model_name_or_path",))
    max_length: int = setting(None, "model", "tokens of an example, at most (default: 128; prompts: 512)", at_least=2)
    freeze: tuple[str, ...] = setting(
        (), "model", "parameters that stay as they are: regular expressions searched in their names, such as embeddings", metavar="PATTERN"
    )
    # -- data
    task_name: str | None = setting(None, "data", f"one of GLUE's ({', '.join(GLUE_TASKS)}), or of your own files: {', '.join(OWN_TASKS)}")
    data_dir: str | None = setting(
        None, "data", "folder with GLUE's train and dev files as .jsonl or .csv (each also .gz), in it or in TASK/ (default: the hub)"
    )
    train_file: tuple[str, ...] = setting((), "data", "your examples: .csv, .tsv, .jsonl or .json (each also .gz)", metavar="FILE")
    validation_file: tuple[str, ...] = setting(
        (), "data", f"examples to evaluate on (default: one in {HOLD_OUT} of --train_file)", metavar="FILE"
    )
    text_columns: tuple[str, ...] = setting(
        (), "data", "the column with the text, or the two with a pair (default: the one or two that hold text)", metavar="NAME"
    )
    label_column: str = setting("label", "data", "the column with the answer: a class, or a number for regression")
    packing: bool = setting(False, "data", "prompts: several examples in one sequence, none of which sees another")
    # -- optimizer
    optimizer: str = setting(
        "galore", "optimizer", f"{', '.join(METHODS)}, or an optimizer by its name in galore pretrain", also=("method",)
    )
    compare: tuple[str, ...] = setting(
        (),
        "optimizer",
        "methods, comma-separated, trained one after the other on the same batches from the same weights; name:lr gives one its own lr",
        metavar="NAME[:LR],...",
        parse="names",
    )
    lr: float | None = setting(
        None, "optimizer", f"peak learning rate (default: {_LR:g}; lora: {_LORA_LR:g})", above=0, also=("learning_rate",)
    )
    rank: int | None = setting(
        None, "optimizer", "rank of the subspace, or of LoRA (default: short side of the matrices / 4)", at_least=1, also=("lora_r",)
    )
    update_proj_gap: int | None = setting(
        None, "optimizer", "steps between two subspaces (default: 200; other methods: their papers')", at_least=1
    )
    galore_scale: float | None = setting(
        None,
        "optimizer",
        "factor on the projected update; sqrt(width / rank) gives it the size of a full one (default: 2; other methods: their papers')",
        above=0,
    )
    find_lr: bool = setting(
        False, "optimizer", "first try rates in runs of 30 steps, of the matrices and of the rest, and then train at the best ones"
    )
    lora_alpha: float | None = setting(None, "optimizer", "LoRA's alpha: its update counts alpha / rank (default: 16)", above=0)
    # -- training
    batch_size: int = setting(
        16, "training", "examples in one forward pass of each process", at_least=1, also=("per_device_train_batch_size",)
    )
    gradient_accumulation: int | None = setting(
        None,
        "training",
        "forward passes in one step: another way to say --total_batch_size",
        at_least=1,
        also=("gradient_accumulation_steps",),
    )
    num_train_epochs: float = setting(3.0, "training", "passes over the examples", above=0)
    num_training_steps: int = setting(0, "training", "steps, 0: as many as --num_train_epochs takes", at_least=0, also=("max_train_steps",))
    warmup_steps: int | None = setting(0, "training", "steps of linear warm-up", also=("num_warmup_steps",))
    scheduler: str = setting(
        "linear", "training", "after warm-up: " + ", ".join(SCHEDULERS), choices=SCHEDULERS, also=("lr_scheduler_type",)
    )
    min_lr_ratio: float = setting(0.01, "training", "last lr as a share of --lr", at_least=0, at_most=1)
    # -- run
    eval_every: int = setting(0, "run", "steps between evaluations, 0: after every epoch", at_least=0)
    eval_batch_size: int = setting(
        32, "run", "examples in one forward pass of an evaluation", at_least=1, also=("per_device_eval_batch_size",)
    )
    save_every: int = setting(
        0, "run", "steps between checkpoints, 0 or epoch: after every epoch", parse="epoch", at_least=0, also=("checkpointing_steps",)
    )
    save_dir: str | None = setting(None, "run", "new folder for the run (default: runs/finetune-<date>-<time>)", also=("output_dir",))
    resume: str | None = setting(
        None,
        "run",
        "auto: go on from the newest whole checkpoint of --save_dir; or one checkpoint's folder",
        also=("resume_from_checkpoint",),
    )
    # -- flags of the published script
    enable_galore: bool = setting(False, PUBLISHED, "what --method galore says, which is the default")
    lora_all_modules: bool | None = published("the linear layers of the body are all projected; --targets chooses others")
    pad_to_max_length: bool | None = published("examples are padded to the longest of their batch")
    ignore_mismatched_sizes: bool | None = published("the head has the task's size in any case")
    use_slow_tokenizer: bool | None = published("the fast tokenizer reads the examples")
    eval_llama: bool | None = published("a decoder is evaluated as an encoder is")
    low_rank_method: str | None = published("nothing reads it, in the published script neither")
    with_tracking: bool | None = published("--tracker names what else to log to")
    report_to: str | None = published("--tracker names what else to log to")
    load_pretrained_model: str | None = refused(None, "give the weights' folder as --model_name_or_path")
    trust_remote_code: bool = refused(False, "no code of a model's folder is run; give a model that transformers has")
    push_to_hub: bool = refused(False, "nothing is uploaded here; `hf upload NAME RUN/model` does it")
    hub_model_id: str | None = refused(None, "nothing is uploaded here; `hf upload NAME RUN/model` does it")
    hub_token: str | None = refused(None, "nothing is uploaded here; `hf upload NAME RUN/model` does it")
    # How many examples there are: `for_examples` says it when they have been read.
    examples: int = field(default=0, repr=False)
    # What --find_lr has tried: records of `Tried`, for config.json.
    tried: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def contenders(self) -> list[tuple[str, float]]:
        return contenders(self.compare or (self.optimizer,), self.lr, True, dict.fromkeys(_adaptive(), _LR) | {"lora": _LORA_LR})

    @property
    def shape(self) -> HFShape:
        assert self.hf_model is not None
        return hf_shape(self.hf_model)

    @property
    def tokens_at_once(self) -> int:
        prompts = self.task_name == "prompts"  # whose tokens have logits in an evaluation too
        return max(self.batch_size, self.eval_batch_size if prompts else 0) * self.max_length

    @property
    def data_flags(self) -> tuple[str, ...]:
        if self.task_name not in OWN_TASKS:
            return ("data_dir" if self.data_dir else "task_name", "tokenizer")
        return ("train_file", "validation_file", *(() if self.task_name == "prompts" else ("text_columns",)), "tokenizer")

    @property
    def epochs(self) -> float:
        """Passes over the examples, settled."""
        return self.epoch_of(self.num_training_steps)

    def epoch_of(self, step: int) -> float:
        """How many passes over the examples end with `step`."""
        return step * self.accumulation / self._batches

    @property
    def _batches(self) -> int:
        """Batches of all processes in one pass over the examples, the last one smaller where they do not divide."""
        return max(1, math.ceil(self.examples / self.sequences_at_once))

    def for_examples(self, examples: int) -> FinetuneConfig:
        """This config for so many training examples, which settle the number of steps."""
        if examples < self.processes:
            what = ("sequence" if self.packing else "example") + ("s" if examples > 1 else "")
            raise UserError(
                f"{examples} training {what} for {self.processes} processes, each of which needs one in every batch; start {examples} at "
                "most, or give more examples"
            )
        counted = replace(self, examples=examples)
        steps = self.num_training_steps or math.ceil(self.num_train_epochs * counted._batches / self.accumulation)
        return replace(counted, num_training_steps=steps)

    def evaluates(self, step: int) -> bool:
        return super().evaluates(step) or (not self.throwaway and not self.eval_every and self._ends_epoch(step))

    def saves(self, step: int) -> bool:
        return self._ends_epoch(step) if not self.save_every else super().saves(step)

    def _ends_epoch(self, step: int) -> bool:
        done, before = (at * self.accumulation // self._batches for at in (step, step - 1))
        return step > 0 and done > before

    def sizes(self, targets: str | tuple[str, ...] | None = None, vocab_size: int | None = None) -> Sizes:
        from galore_torch.train.model.heads import classifier_sizes  # torch
        from galore_torch.train.model.sizes import hf_sizes

        assert self.hf_model is not None
        return (hf_sizes if self.task_name == "prompts" else classifier_sizes)(self.hf_model, targets, self.freeze)

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        alpha = 16.0 if self.lora_alpha is None else self.lora_alpha
        return super().optimizer_settings | {"lora_alpha": alpha, "lora_alone": True}

    def _own_notes(self) -> list[str]:
        return []

    # --- checks -----------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        for name, item in self.settings().items():
            if "refused" in item.metadata and getattr(self, name):
                raise UserError(f"--{name}: {item.metadata['refused']}; leave it out")
        if self.hf_model is None:
            raise UserError("galore finetune needs a model: give --model_name_or_path FOLDER, or a name on the hub")
        self._check_task()
        object.__setattr__(self, "optimizer", METHODS.get(self.optimizer.lower(), self.optimizer))
        object.__setattr__(self, "compare", tuple(_translated(item) for item in self.compare))
        super()._settle()

    def _usual_length(self) -> int:
        return min(_LENGTHS.get(self.task_name or "", 128), self.positions)

    def _check_task(self) -> None:
        if self.task_name is None:
            raise UserError(
                f"galore finetune needs a task: give --task_name with one of {', '.join(GLUE_TASKS)}, or --train_file FILE with "
                f"--task_name {', '.join(OWN_TASKS)}"
            )
        check_choice("task_name", self.task_name, (*GLUE_TASKS, *OWN_TASKS))
        own = self.task_name in OWN_TASKS
        if own and not self.train_file:
            raise UserError(f"--task_name {self.task_name} trains on your own examples: give them with --train_file FILE")
        foreign = {"data_dir": self.data_dir} if own else {name: getattr(self, name) for name in ("train_file", "validation_file")}
        if given := [name for name, value in foreign.items() if value]:
            where = "--train_file" if own else "the hub or --data_dir"
            raise UserError(f"--{given[0]} has no effect on --task_name {self.task_name}, which is read from {where}; leave it out")
        columns = self.given & {"text_columns", "label_column"} if self.task_name not in ("classification", "regression") else set()
        prompts = self.given & {"packing", "loss_chunk"} if self.task_name != "prompts" else set()
        if ignored := sorted(columns | prompts):
            raise UserError(f"--{ignored[0]} has no effect on --task_name {self.task_name}; leave it out")
        if len(self.text_columns) > 2:
            raise UserError(f"--text_columns {' '.join(self.text_columns)}: a text is one column, or a pair of two; name no more")
        if len(set(self.text_columns)) < len(self.text_columns):
            raise UserError(f"--text_columns {' '.join(self.text_columns)}: a pair is of two columns; name the other one, or one alone")
        if self.label_column in self.text_columns:
            raise UserError(
                f"--text_columns {' '.join(self.text_columns)} has the answer, --label_column {self.label_column}, in the text; name others"
            )

    def _check_model(self) -> None:
        super()._check_model()
        methods = dict(self.contenders)
        if self.enable_galore and not any(optimizer_spec(name).low_rank for name in methods):
            raise UserError(f"--enable_galore and {', '.join(methods)}: that trains without GaLore; leave one of them out")
        if self.find_lr and (len(methods) > 1 or self.processes > 1):
            raise UserError("--find_lr looks for the rates of one method in one process; leave --compare and torchrun out")
        if self.lora_alpha is not None and "lora" not in methods:
            raise UserError(f"--lora_alpha {self.lora_alpha:g} has no effect on {', '.join(methods)}; leave it out, or choose lora")

    def _check_schedule(self) -> None:
        if {"num_train_epochs", "num_training_steps"} <= self.given and self.num_training_steps:
            raise UserError("--num_train_epochs and --num_training_steps both say how long to train; leave one of them out")
        if self.num_training_steps:  # else it follows from the examples, and is checked when they have been read
            super()._check_schedule()


def _translated(item: str) -> str:
    """`full:1e-4` as `adamw:1e-4`."""
    name, colon, lr = item.partition(":")
    return METHODS.get(name.lower(), name) + colon + lr


def _adaptive() -> list[str]:
    """The optimizers whose step has the size of Adam's: one rate suits them all."""
    return [name for name, spec in OPTIMIZERS.items() if spec.adaptive]
