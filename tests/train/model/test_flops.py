"""Model FLOPs by formula against torch's own counter, and what a run makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.flops import flops_per_token, peak_flops
from galore_torch.train.model.gpus import find_gpu
from galore_torch.train.model.llama import ModelShape, build_model
from galore_torch.train.model.sizes import sizes_of
from galore_torch.train.optimizers.registry import build_optimizer
from support.whole_runs import Silent

Make = Callable[..., PretrainConfig]
LENGTH = 48
SHAPES = {
    "plain": ModelShape(64, 96, 3, 4, 64, 200),
    "tied": ModelShape(64, 96, 3, 4, 64, 200, extras=(("tie_word_embeddings", True),)),
    "grouped": ModelShape(64, 96, 3, 4, 64, 200, extras=(("num_key_value_heads", 2), ("head_dim", 24))),
}


def llama(shape: ModelShape) -> Any:
    model = build_model(shape, seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False)
    model.set_attn_implementation("eager")  # its products are ordinary ones, counted alike on every device
    return model


def counted(model: Any) -> int:
    ids = torch.randint(0, 200, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.float().square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
def test_formula_is_what_torch_counts(name: str) -> None:
    """Forward and backward of a LLaMA. Beyond the formula are only the rotary angles, head_dim / 2 products of two numbers a position:
    2 x 12 x 48 x 2 of ten million operations, under a hundredth of a per cent."""
    model = llama(SHAPES[name])
    by_formula = 2 * LENGTH * flops_per_token(model, LENGTH)
    assert by_formula <= counted(model) <= by_formula * (1 + 1e-4)


def test_frozen_matrices_have_no_gradient_to_compute() -> None:
    """LoRA: 4 a frozen entry, 6 an entry of the adapters."""
    pytest.importorskip("peft")
    model = llama(SHAPES["plain"])
    settings = {"rank": 4, "weight_decay": 0.0, "beta1": None, "cycle_length": None}
    build_optimizer("lora", model.train(), lr=1e-3, settings=settings)
    by_formula = 2 * LENGTH * flops_per_token(model, LENGTH)
    assert by_formula <= counted(model) <= by_formula * (1 + 1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_of_a_mixture_those_experts_count_that_a_token_goes_through(family: str) -> None:
    """Two of eight; the planner, which has no model, counts the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 200, "num_experts_per_tok": 2, "head_dim": 16}
    sizes |= {"num_local_experts": 8} if family == "mixtral" else {"num_experts": 8, "moe_intermediate_size": 48}
    config = AutoConfig.for_model(family, **sizes, pad_token_id=None, attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    by_formula = 2 * LENGTH * flops_per_token(model, LENGTH)
    assert by_formula <= counted(model) <= by_formula * (1 + 1e-3)
    assert flops_per_token(model, LENGTH) == sizes_of(model).flops_per_token(LENGTH)


def test_low_rank_factors_are_what_is_multiplied() -> None:
    model = llama(SHAPES["plain"])
    build_optimizer("low_rank", model, lr=1e-3, settings={"rank": 4, "weight_decay": 0.0, "beta1": None})
    by_formula = 2 * LENGTH * flops_per_token(model, LENGTH)
    assert by_formula <= counted(model) <= by_formula * (1 + 1e-4)


def test_sixty_million_by_hand() -> None:
    """LLaMA-60M at 256 tokens: 25.30 M in the layers and 16.38 M in the head, 6 each, and 12 x 8 x 512 x 256."""
    with torch.device("meta"):
        model = build_model(
            ModelShape(512, 1376, 8, 8), seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False
        )
    layers = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert flops_per_token(model, 256) == 6 * (layers + 32000 * 512) + 12 * 8 * 512 * 256


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5),
        ("NVIDIA A10", "bfloat16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 3090", "float32", 35.6),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("AMD Instinct MI300X", "bfloat16", None),
    ],
)
def test_peak_is_of_that_very_device_or_none(name: str, dtype: str, tflops: float | None) -> None:
    gpu = find_gpu(name)
    peak = gpu and gpu.peak_flops(dtype)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_share_is_told_only_of_a_known_peak(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """A CPU's peak is not guessed; --peak_tflops names it. TFLOP/s are always there: tokens/s times the formula."""
    assert peak_flops("cpu", "float32") is None
    for settings in ({}, {"peak_tflops": 0.5}):
        _, model = train(make_config(**settings), "adamw", 0.01, token_data, tmp_path, Silent())
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for row in rows[1:]:  # the first one warms up and tells no speed
            assert row["tflops"] == pytest.approx(row["tokens_per_s"] * flops_per_token(model, 16) / 1e12, rel=1e-3)
            assert ("mfu" in row) == bool(settings)
            assert "mfu" not in row or row["mfu"] == pytest.approx(row["tflops"] / 0.5, abs=1e-5)


def test_peak_has_to_be_positive() -> None:
    with pytest.raises(UserError, match=r"--peak_tflops 0.0 is out of bounds: give a number greater than 0"):
        PretrainConfig(peak_tflops=0.0)


def test_a_model_without_attention_has_the_products_of_its_matrices_alone() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30, "state_size": 4, "time_step_rank": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes, pad_token_id=None, bos_token_id=1, eos_token_id=2))
    assert flops_per_token(model, 8) == flops_per_token(model, 64) == 6 * sum(p.numel() for p in model.parameters() if p.dim() >= 2)
