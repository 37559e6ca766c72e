"""Small real runs of Hugging Face's Trainer: a tiny LLaMA that reads the bytes of torch's own source."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

LENGTH, STEPS = 32, 12
TARGETS = ["attn", "mlp"]
RANK = {"rank": 8, "update_proj_gap": 4}  # several refreshes in one run


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, use_cache=False)
    return LlamaForCausalLM(config)


def saved_llama(folder: Path, count: int) -> list[str]:
    """Write the tiny LLaMA and its tokenizer into ``folder``; so many texts for it, one shorter than its windows each."""
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = source()[: LENGTH * count].decode("latin-1")
    return [text[i : i + LENGTH - 1] for i in range(0, len(text), LENGTH)]


def source() -> bytes:
    """Text that is wherever torch is."""
    return Path(str(torch.nn.functional.__file__)).read_bytes()


def windows(count: int, first: int = 0) -> list[dict[str, list[int]]]:
    text = source()
    cut = [list(text[i * LENGTH : (i + 1) * LENGTH]) for i in range(first, first + count)]
    return [{"input_ids": ids, "labels": ids} for ids in cut]


def arguments(folder: Any, kind: Any = None, **options: Any) -> Any:
    """TrainingArguments, or those of class ``kind``, of a run of 12 steps that saves in the middle and at the end."""
    from transformers import TrainingArguments

    standard = {
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # 4.x leaves what the last run asked for
    return (kind or TrainingArguments)(output_dir=str(folder), **{**standard, **options})


Make = Callable[[nn.Module], Any] | None  # model -> optimizer, or None: by the arguments' name


def run(folder: Any, make: Make = None, trainer: Any = None, resume: bool = False, **options: Any) -> Any:
    """Train and return the Trainer; ``resume``: a fresh model and optimizer go on from the middle of the run in ``folder``.

    Options beside those of the arguments, whose class is ``kind``: ``model``, or ``dtype`` of the tiny LLaMA; ``data``, or ``count`` of
    windows.
    """
    from transformers import Trainer

    count, dtype = options.pop("count", 64), options.pop("dtype", torch.float32)
    data, model = options.pop("data", None) or windows(count), options.pop("model", None) or llama().to(dtype)
    pair = (None if make is None else make(model), None)
    settings = arguments(folder, **options)
    training = (trainer or Trainer)(model, settings, train_dataset=data, optimizers=pair)
    training.train(resume_from_checkpoint=f"{folder}/checkpoint-{settings.save_steps}" if resume else None)
    return training


def difference(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of any weight."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p.detach().float() - q.detach().float()).abs().max().item() for p, q in pairs)


def logged(trainer: Any, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def byte_tokenizer() -> Any:
    """Token i is byte i, under the letter that byte-level tokenizers give it: its own where it prints, else one from 256 on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte if byte in printed else 256 + others.index(byte)) for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0], pad_token=letters[0], bos_token=letters[0])
