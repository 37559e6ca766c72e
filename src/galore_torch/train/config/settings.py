"""Settings: every setting of `galore pretrain`, its default and its help.

The only owner of defaults; derived.py says what follows from them, config.py checks them. Names are the published pre-training script's.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from galore_torch.choices import BASIS_CODECS, CARRY_CODECS, PROJ_TYPES, STATE_CODECS
from galore_torch.train.config.declare import PUBLISHED
from galore_torch.train.config.declare import published as _published
from galore_torch.train.config.declare import setting as _setting
from galore_torch.train.config.parallel import PARALLEL
from galore_torch.train.optimizers.registry import GRADIENTS
from galore_torch.train.optimizers.schedule import SCHEDULERS

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
DEVICES = ("auto", "cpu", "cuda")
TRACKERS = ("tensorboard", "wandb", "trackio")


def is_hub_name(name: str) -> bool:
    """Whether --data `name` is a data set of the hub and not a path."""
    return name == "c4" or name.startswith("hf:")


@dataclass(frozen=True)
class Settings:
    """What one `galore pretrain` call is given; not checked."""

    command: ClassVar[str] = "pretrain"
    left_out: ClassVar[frozenset[str]] = frozenset()  # settings that a command built on these does not have
    usual: ClassVar[tuple[tuple[str, Any], ...]] = ()  # gap and scale of GaLore's own optimizers, where they are not the table's
    sorts_batches: ClassVar[bool] = False  # whether which sequences are trained on together depends on how many a batch has

    # -- model
    model_config: str = _setting("demo", "model", "preset (demo, 9m ... 7b, llama3-8b), a LLaMA config.json or its folder")
    hf_model: str | None = _setting(None, "model", "go on training this causal LM: a transformers folder or hub name, not a --model_config")
    vocab_size: int | None = _setting(None, "model", "rows of the embedding (default: the preset's; demo: the tokenizer's)", at_least=1)
    max_length: int = _setting(None, "model", "tokens in one training sequence (default: 256; demo: 128)", at_least=1)
    dtype: str = _setting("float32", "model", "weights: float32 or bfloat16", choices=tuple(DTYPES))
    activation_checkpointing: bool = _setting(False, "model", "recompute activations in the backward pass: less memory, more time")
    # -- data
    data: tuple[str, ...] = _setting(
        (),
        "data",
        "training text: .txt, .jsonl (each also .gz) or .parquet files, folders or patterns of them; or, streamed from the hub, c4 or "
        "hf:NAME[:CONFIG] (default: the source of Python's standard library)",
        metavar="FILE",
    )
    eval_data: tuple[str, ...] = _setting(
        (), "data", "validation text (default: every 20th document of --data; from the hub: the validation split)", metavar="FILE"
    )
    tokenizer: str | None = _setting(None, "data", "tokenizer folder or tokenizer.json (default: a BPE trained once and cached)")
    text_field: str = _setting("text", "data", "the column of .jsonl and .parquet with the text")
    stream: bool = _setting(False, "data", "read and tokenise the files of --data during training, in their order: for more text than fits")
    pad_documents: bool = _setting(
        False,
        "data",
        "one document in one sequence, cut or padded to --max_length, as published (default: documents are packed end to end)",
    )
    workers: int = _setting(
        2, "data", "threads that tokenise streamed text ahead of training; they change no batch", at_least=0, at_most=64
    )
    # -- optimizer
    optimizer: str = _setting("galore_adamw", "optimizer", "one of the names listed below")
    compare: tuple[str, ...] = _setting(
        (),
        "optimizer",
        "optimizers, comma-separated, trained one after the other on the same batches from the same weights; name:lr gives one its own lr",
        metavar="NAME[:LR],...",
        parse="names",
    )
    lr: float | None = _setting(None, "optimizer", "peak learning rate (default: per optimizer; with --hf_model a tenth of that)", above=0)
    weight_decay: float = _setting(0.0, "optimizer", "weight decay", at_least=0)
    beta1: float | None = _setting(
        None, "optimizer", "first-moment decay; momentum of sgd (default: the optimizer's own)", at_least=0, below=1
    )
    beta2_half_life: int | None = _setting(
        None,
        "optimizer",
        "tokens after which Adam's second moment has half forgotten a gradient, such as 10M: its beta2 for this batch (default: 0.999)",
        parse="tokens",
        at_least=1,
    )
    rank: int | None = _setting(
        None, "optimizer", "rank of the subspace (default: short side of the matrices / 4; apollo_mini: 1)", at_least=1
    )
    update_proj_gap: int | None = _setting(
        None, "optimizer", "steps between two subspaces (default: 50; galore_muon: 1; other methods: their papers')", at_least=1
    )
    galore_scale: float | None = _setting(
        None, "optimizer", "factor on the projected update (default: 0.25; galore_muon: 0.2; other methods: their papers')", above=0
    )
    gap_range: tuple[int, int] | None = _setting(
        None, "optimizer", "each matrix finds its own gap between these, from --update_proj_gap on", metavar=("LEAST", "MOST"), pair=True
    )
    scale_parameter: bool = _setting(
        False, "optimizer", "the matrices' rate is relative to their root mean square, as Adafactor's; one of 0.02 has --lr"
    )
    proj_type: str = _setting("std", "optimizer", "which side is projected: " + ", ".join(PROJ_TYPES), choices=PROJ_TYPES)
    targets: tuple[str, ...] | None = _setting(
        None,
        "optimizer",
        "project these layers: regular expressions searched in their names, or all-linear (default: the linear layers of the body)",
        metavar="PATTERN",
    )
    state_codec: str | None = _setting(
        None, "optimizer", f"moments are kept in: {', '.join(STATE_CODECS)} (default: the optimizer's own)", choices=STATE_CODECS
    )
    basis_codec: str | None = _setting(
        None, "optimizer", f"the basis is kept in: {', '.join(BASIS_CODECS)} (default: the optimizer's own)", choices=BASIS_CODECS
    )
    carry_codec: str | None = _setting(
        None,
        "optimizer",
        f"ldadam: the error that it feeds back is kept in: {', '.join(CARRY_CODECS)} (default: as the weights)",
        choices=CARRY_CODECS,
    )
    random_after: int | None = _setting(
        None, "optimizer", "golore: the step from which on bases are random (default: half the steps)", at_least=0
    )
    gradients: str | None = _setting(
        None,
        "optimizer",
        "of the projected matrices: direct (made low-rank in the layer's backward pass, never in full), project (made in full one at a "
        "time, projected and freed) or full (kept whole until the step) (default: direct; under --parallel fsdp and hsdp full, or project "
        "for _per_layer)",
        choices=GRADIENTS,
    )
    # -- training
    batch_size: int = _setting(16, "training", "sequences in one forward pass of each process", at_least=1)
    total_batch_size: int | None = _setting(
        None,
        "training",
        "sequences in one step: a multiple of --batch_size x processes (default: equal)",
        at_least=1,
    )
    gradient_accumulation: int | None = _setting(
        None, "training", "forward passes in one step: another way to say --total_batch_size", at_least=1
    )
    num_training_steps: int = _setting(400, "training", "steps", at_least=1)
    max_train_tokens: int | None = _setting(
        None,
        "training",
        "budget in place of --num_training_steps, such as 500K, 100M or 1.5B",
        parse="tokens",
        at_least=1,
    )
    warmup_steps: int | None = _setting(None, "training", "steps of linear warm-up (default: a tenth)")
    scheduler: str = _setting("cosine", "training", "after warm-up: " + ", ".join(SCHEDULERS), choices=SCHEDULERS)
    decay_steps: int | None = _setting(None, "training", "steps of the decay that ends --scheduler wsd (default: a fifth)", at_least=1)
    cycle_length: int | None = _setting(
        None, "training", "steps between restarts: of --scheduler cosine_restarts, and of relora", at_least=1
    )
    restart_warmup_steps: int | None = _setting(
        None, "training", "steps of warm-up after a restart (default: a tenth of the cycle)", at_least=1
    )
    min_lr_ratio: float = _setting(0.1, "training", "last lr as a share of --lr", at_least=0, at_most=1)
    grad_clipping: float = _setting(0.0, "training", "largest gradient norm, 0: no clipping", at_least=0)
    max_loss_rise: float = _setting(
        0.0, "training", "skip a step whose loss is this far above the median of the last 50, 0: never", at_least=0
    )
    loss_chunk: int | None = _setting(
        None,
        "training",
        "tokens whose logits exist at once, 0: all of a forward pass (default: as many as take 256 MiB in float32)",
        at_least=0,
    )
    compile: bool = _setting(False, "training", "torch.compile for the model's layers: slow first steps, faster later ones")
    seed: int = _setting(0, "training", "weights and data order", at_least=0, at_most=2**63 - 1)
    device: str = _setting("auto", "training", "auto, cpu or cuda", choices=DEVICES)
    # -- processes
    nproc: int | None = _setting(
        None, "processes", "processes to start on this machine, which train together; torchrun starts its own (default: one)", at_least=1
    )
    parallel: str = _setting(
        "ddp",
        "processes",
        "what each process holds beside its share of every batch: ddp, the whole model; fsdp, a part of every weight and of its optimizer "
        "state; hsdp, as fsdp within a machine, and machines are replicas",
        choices=PARALLEL,
    )
    # -- run
    eval_every: int = _setting(100, "run", "steps between evaluations, 0: before and after only", at_least=0)
    eval_tokens: int = _setting(65536, "run", "validation tokens to evaluate on, at most", at_least=1)
    legacy_eval: bool = _setting(
        False, "run", "also write legacy_eval_loss, the published script's: mean of batch means, divided by their number + 1"
    )
    peak_tflops: float | None = _setting(
        None, "run", "the device's peak in TFLOP/s, which mfu is a share of (default: of known GPUs)", above=0
    )
    track_subspace: bool = _setting(False, "run", "write to metrics.jsonl how much of each matrix's subspace every refresh kept")
    tracker: tuple[str, ...] = _setting((), "run", "also log to: " + ", ".join(TRACKERS), metavar="NAME")
    save_dir: str | None = _setting(None, "run", "new folder for the run (default: runs/pretrain-<date>-<time>)")
    save_every: int = _setting(1000, "run", "steps between checkpoints, 0: only when the run ends or is stopped", at_least=0)
    keep: int = _setting(2, "run", "checkpoints to keep, the newest", at_least=1)
    resume: str | None = _setting(None, "run", "auto: go on from the newest whole checkpoint of --save_dir; or one checkpoint's folder")
    max_bad_steps: int = _setting(5, "run", "stop after so many skipped steps in a row; one is skipped where it is not finite", at_least=1)
    dry_run: bool = _setting(False, "run", "print the resolved config, the plan and the first batch's shapes, and stop: no run is made")
    force: bool = _setting(False, "run", "start although the plan needs more memory than there is")
    # -- flags of the published script that have nothing to set here: accepted, and a note says why
    use_hf_model: bool | None = _published("the model is transformers' LlamaForCausalLM in any case")
    single_gpu: bool | None = _published("one process is how this command runs in any case")
    tags: str | None = _published("nothing reads it, in the published script neither")
    name: str | None = _published("nothing reads it, in the published script neither; --save_dir names the folder")
    continue_from: str | None = _setting(None, PUBLISHED, "refused: --resume brings back everything, --hf_model weights alone")
    # What reading a config file had to leave out.
    remarks: tuple[str, ...] = field(default=(), repr=False)
    # A run that is only looked at while it lasts: not evaluated, and without a checkpoint.
    throwaway: bool = field(default=False, repr=False)
    # Processes that train together, one a rank: the launcher's to say.
    processes: int = field(default=1, repr=False)
    # Of these on one machine, 0: all. The launcher's to say, too.
    machine: int = field(default=0, repr=False)
    # Names the user typed; they must not be ignored by the optimizer.
    given: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def settings(cls) -> dict[str, Field[Any]]:
        """The settings that the command has, by name."""
        return {item.name: item for item in fields(cls) if "group" in item.metadata and item.name not in cls.left_out}
