"""What a plan counts, against what is there: states and weights to the byte, peaks on the allocator's log."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.engine import step as engine
from galore_torch.ops.levels import code_table, nearest_codes
from galore_torch.ops.outer import OuterProduct
from galore_torch.optim.methods import METHODS
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop import trainer
from galore_torch.train.model.flops import flops_per_token
from galore_torch.train.model.llama import PRESETS, ModelShape, build_model, model_shape
from galore_torch.train.model.loss import TokenLoss
from galore_torch.train.model.sizes import llama_sizes, sizes_of
from galore_torch.train.optimizers.registry import OPTIMIZERS, build_optimizer, fused_pass, state_bytes
from galore_torch.train.plan.answer import _planned, plan_request, planned, planned_peak_bytes
from galore_torch.train.plan.optimizer_bytes import param_bytes, thin_bytes
from support.memory import peak_bytes
from support.whole_runs import Silent

TINY = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A file with a LLaMA that no compiler finds worth its while."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 128, **TINY}))
    return str(path)


def build(config: PretrainConfig, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        model: nn.Module = build_model(
            model_shape(config.model_config),
            seed=0,
            dtype=config.torch_dtype,
            bos_token_id=None,
            eos_token_id=None,
            activation_checkpointing=config.activation_checkpointing,
        )
    return model.train()


def update(config: PretrainConfig, model: Any, optimizer: Any) -> None:
    """As the trainer's, on random tokens."""
    tokens = torch.randint(0, TINY["vocab_size"], (config.batch_size, config.max_length))
    loss_of = TokenLoss(model, config.loss_chunk, tokens.numel())
    for _ in range(config.accumulation):
        (loss_of(tokens, tokens) / (tokens.numel() * config.accumulation)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def relevant(name: str) -> dict[str, Any]:
    return {"num_training_steps": 8, "warmup_steps": 1, "cycle_length": 4} if name == "relora" else {}


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_state_equal_what_a_real_run_holds(name: str, dtype: str, beta1: float | None, tiny: str) -> None:
    flags = OPTIMIZERS[name].flags
    if beta1 is not None and "beta1" not in flags:
        pytest.skip(f"{name} has no beta1")
    config = PretrainConfig(
        model_config=tiny, optimizer=name, dtype=dtype, beta1=beta1, rank=8, batch_size=1, max_length=8, device="cpu", **relevant(name)
    )
    model = build(config)
    optimizer = build_optimizer(name, model, lr=1e-3, settings=config.optimizer_settings)
    with fused_pass(name, model, optimizer, deferred=False):
        update(config, model, optimizer)
    request = plan_request(config, device="cpu")
    assert request.total("weight") == sum(p.nbytes for p in model.parameters())
    assert request.total("basis") + request.total("moments") == state_bytes(optimizer)


@pytest.mark.parametrize("targets", [("q_proj", r"down_proj$"), (r"layers\.[02]\.mlp",), ("all-linear",)])
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw8bit_per_layer", "qgalore_adamw8bit"])
def test_targets_are_planned(name: str, targets: tuple[str, ...], tiny: str) -> None:
    """Weights and state of a real optimizer on the chosen layers, of every layer alike or not; and less than on all of them."""
    settings = {"model_config": tiny, "optimizer": name, "dtype": "bfloat16", "rank": 8, "max_length": 8, "device": "cpu"}
    config = PretrainConfig(**settings, targets=targets)
    model = build(config)
    optimizer = build_optimizer(name, model, lr=1e-3, settings=config.optimizer_settings)
    request = plan_request(config, device="cpu")
    assert request.total("weight") == sum(p.nbytes for p in model.parameters())
    assert request.total("basis") + request.total("moments") == state_bytes(optimizer)
    everything = plan_request(PretrainConfig(**settings), device="cpu")
    assert request.total("basis") != everything.total("basis")
    assert plan_request(config, device="cpu", optimizer="adamw").sizes == everything.sizes, "adamw does not use them"
    assert planned_peak_bytes(config, TINY["vocab_size"], name), "the display has a planned peak"


@pytest.mark.parametrize("basis_codec", [None, "fp32", "bf16", "int4"])
@pytest.mark.parametrize("state_codec", [None, "fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw8bit", "qgalore_adamw8bit"])
def test_codecs_that_are_given_are_planned(name: str, state_codec: str | None, basis_codec: str | None, tiny: str) -> None:
    """Basis and moments, each against the storages of a real optimizer."""
    codecs = {"state_codec": state_codec, "basis_codec": basis_codec}
    settings = {"model_config": tiny, "optimizer": name, "dtype": "bfloat16", "rank": 16, "max_length": 8, "device": "cpu", **codecs}
    config = PretrainConfig(**settings)
    optimizer = build_optimizer(name, build(config), lr=1e-3, settings=config.optimizer_settings)
    request = plan_request(config, device="cpu")
    state = {(id(p), key): value for p, held in optimizer.state.items() for key, value in held.items() if isinstance(value, torch.Tensor)}
    basis = sum(value.untyped_storage().nbytes() for (_, key), value in state.items() if key.startswith("basis") and key != "basis_ready")
    assert request.total("basis") == basis
    assert request.total("basis") + request.total("moments") == state_bytes(optimizer)


@pytest.mark.parametrize("name", [*PRESETS, "tied", "biased"])
def test_sizes_by_arithmetic_equal_those_of_the_model_itself(name: str) -> None:
    extras: dict[str, tuple[tuple[str, Any], ...]] = {
        "tied": (("tie_word_embeddings", True), ("num_key_value_heads", 2), ("head_dim", 24)),
        "biased": (("attention_bias", True), ("mlp_bias", True)),
    }
    shape = PRESETS[name] if name in PRESETS else ModelShape(64, 172, 2, 4, vocab_size=500, extras=extras[name])
    shape = replace(shape, num_hidden_layers=2, vocab_size=shape.vocab_size or 2048)
    with torch.device("meta"):
        model = build_model(shape, seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False)
    counted, asked = llama_sizes(shape, shape.vocab_size or 0), sizes_of(model)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert replace(counted, layer=frozenset(counted.layer), outer=frozenset(counted.outer)) == replace(
        asked, layer=frozenset(asked.layer), outer=frozenset(asked.outer)
    )


@pytest.mark.parametrize("name", ["9m", "tied"])
def test_operations_of_a_token_equal_those_counted_on_the_model(name: str) -> None:
    shape = PRESETS["9m"] if name == "9m" else ModelShape(64, 172, 2, 4, vocab_size=500, extras=(("tie_word_embeddings", True),))
    with torch.device("meta"):
        model = build_model(shape, seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False)
    assert llama_sizes(shape, shape.vocab_size or 0).flops_per_token(64) == flops_per_token(model, 64)


@pytest.mark.parametrize("name", ["galore_adamw8bit", "qgalore_adamw8bit", "lora"])
def test_a_checkpoint_on_disk_has_the_planned_size(
    name: str, make_config: Callable[..., PretrainConfig], token_data: TokenData, tmp_path: Path
) -> None:
    """Of the tensors in its files, without their headers; the tokenizer and the metrics are not counted."""
    config = make_config(optimizer=name, num_training_steps=1, save_every=1)
    trainer.train(config, name, 1e-3, token_data, tmp_path, Silent())
    files = [path.read_bytes() for path in tmp_path.glob("checkpoints/*/*.safetensors")]
    written = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)
    plan = planned(plan_request(config, device="cpu", optimizer=name, vocab_size=token_data.vocab_size), traced=False)
    assert plan.on_disk == pytest.approx(written, rel=1e-3)


@pytest.fixture
def _tables() -> None:
    """The look-up tables of 8-bit codes: a process makes them once, which takes 3 MB for a moment."""
    for signed in (True, False):
        nearest_codes(torch.zeros(1), code_table(signed, torch.device("cpu")))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": "galore_adamw"},
    "adamw": {"optimizer": "adamw"},
    "8 bit, few tokens": {"optimizer": "galore_adamw8bit", "batch_size": 1, "max_length": 16},
    "accumulated": {"optimizer": "galore_adamw", "gradient_accumulation": 3, "batch_size": 1, "max_length": 16},
    "checkpointed": {"optimizer": "galore_adamw", "activation_checkpointing": True},
    "per layer, updated": {"optimizer": "galore_adamw_per_layer", "batch_size": 2},
    "per layer, projected": {"optimizer": "galore_adamw_per_layer", "gradient_accumulation": 2, "batch_size": 2},
    "bf16": {"optimizer": "galore_adamw8bit", "dtype": "bfloat16"},
    "bf16, few tokens": {"optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", "batch_size": 1, "max_length": 16},
    "chunked loss": {"optimizer": "galore_adamw", "batch_size": 16, "loss_chunk": 200, "activation_checkpointing": True},
    "chunked loss, bf16": {"optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", "batch_size": 16, "loss_chunk": 200},
    "Q-GaLore, per layer": {"optimizer": "qgalore_adamw8bit_per_layer", "batch_size": 2},
    "Q-GaLore, bf16": {"optimizer": "qgalore_adamw8bit", "dtype": "bfloat16", "batch_size": 2},
    "project": {"optimizer": "galore_adamw", "gradients": "project"},
    "project, per layer": {"optimizer": "galore_adamw8bit_per_layer", "gradients": "project", "batch_size": 2},
    "full": {"optimizer": "galore_adamw", "gradients": "full"},
    "direct, basis on the right": {"optimizer": "galore_adamw", "proj_type": "right", "loss_chunk": 16},
    "direct, both sides, checkpointed": {
        "optimizer": "galore_adamw",
        "proj_type": "full",
        "loss_chunk": 16,
        "activation_checkpointing": True,
    },
    "direct, large rank": {"optimizer": "galore_adamw", "rank": 40, "loss_chunk": 16},
    "direct, bf16, accumulated": {"optimizer": "galore_adamw8bit", "dtype": "bfloat16", "loss_chunk": 16, "gradient_accumulation": 2},
    "lora": {"optimizer": "lora"},
    "low_rank": {"optimizer": "low_rank", "activation_checkpointing": True},
}


@pytest.mark.usefixtures("_tables")
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", RUNS)
def test_predicted_peak_is_within_5_percent_of_the_allocators_log(run: str, traced: bool, tiny: str) -> None:
    settings = {"batch_size": 4, "max_length": 64, "rank": 8, "device": "cpu"} | RUNS[run]
    config = PretrainConfig(model_config=tiny, **settings)
    model, (name, lr) = build(config), config.contenders[0]
    optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
    static = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
    with fused_pass(name, model, optimizer, deferred=config.deferred, gradients=config.gradients_of(name)):
        measured = static + peak_bytes(lambda: [update(config, model, optimizer) for _ in range(2)])
    assert planned(plan_request(config, device="cpu"), traced=traced).peak == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", [{"proj_type": "right"}, {"rank": 40}, {"optimizer": "galore_adamw_per_layer"}, {"dtype": "bfloat16"}])
def test_a_step_after_the_first_holds_what_is_planned(run: dict[str, Any], traced: bool, tiny: str) -> None:
    """Inputs are kept projected then, but those of the matrices whose turn it is: the second update of a run, on the allocator's log."""
    common = {"optimizer": "galore_adamw", "batch_size": 8, "max_length": 64, "rank": 8, "device": "cpu", "loss_chunk": 16}
    config = PretrainConfig(model_config=tiny, update_proj_gap=1000, **(common | run))
    model, (name, lr) = build(config), config.contenders[0]
    optimizer = build_optimizer(name, model, lr=lr, settings=config.optimizer_settings)
    with fused_pass(name, model, optimizer, deferred=config.deferred):
        update(config, model, optimizer)
        static = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
        measured = static + peak_bytes(lambda: update(config, model, optimizer))
    later = _planned(replace(plan_request(config, device="cpu"), refreshing=False), traced)
    assert later.peak == pytest.approx(measured, rel=0.05)
    assert later.traced == traced


@pytest.mark.parametrize("tokens", [32, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 512), (512, 1024), (1024, 512)])
def test_what_a_layers_own_refresh_takes_for_a_moment(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    """A first basis and R from dy and x, within a tenth of the weight; in bf16 and with many tokens most of it are copies in fp32."""
    W = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = g.GaLoreAdamW([W], lr=1e-3, rank=64, compile=False)
    dy, x = (torch.randn(tokens, side).to(dtype) for side in shape)
    measured = peak_bytes(lambda: engine.compress(optimizer.view_of(W), OuterProduct(dy, x)))
    found = thin_bytes(shape, dtype, optimizer.param_groups[0], optimizer.rule, tokens)
    assert found == pytest.approx(measured, abs=0.1 * W.numel() * W.element_size())


@pytest.mark.usefixtures("_tables")
@pytest.mark.parametrize("rank", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [g.GaLoreAdamW, g.GaLoreAdamW8bit])
def test_what_a_step_takes_for_a_moment_is_the_engines(cls: Any, dtype: torch.dtype, rank: int | None) -> None:
    """Within a tenth of the weight of a real step and a real refresh, neither of them fused by a compiler."""
    W = nn.Parameter(torch.randn(512, 1024).to(dtype))
    optimizer = cls([W], lr=1e-3, rank=rank, update_proj_gap=1, compile=False)
    peaks = []
    for _ in range(2):
        W.grad = torch.randn_like(W)
        peaks.append(peak_bytes(optimizer.step))
    found = param_bytes(tuple(W.shape), dtype, optimizer.param_groups[0], optimizer.rule)
    assert found.transient == pytest.approx(max(peaks), abs=0.1 * W.numel() * W.element_size())


ALL_ROWS: dict[str, dict[str, Any]] = {
    **{name: dict(method.settings) for name, method in METHODS.items()},
    "golore": {"random_after": 2},
    "means": {"projector": "block_mean"},
    "rows": {"projector": "rows"},
    "rows, predicted": {"projector": "rows", "transport": "predict"},
    "both sides": {"proj_type": "full"},
    "a basis that follows the moment": {"projector": "momentum", "update_proj_gap": 1},
    "error feedback in codes": {"carry": "error_feedback", "carry_codec": "int8"},
    "error feedback in four bits": {"carry": "error_feedback", "carry_codec": "int4"},
    "a step by the weight": {"scale_parameter": True},
}


@pytest.mark.usefixtures("_tables")
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL_ROWS)
def test_a_step_of_every_row_takes_no_more_than_planned(name: str, dtype: torch.dtype, codec: str) -> None:
    """On the allocator's log, with and without a refresh, where no compiler fuses it; and not much less."""
    shape, settings = (512, 384), ALL_ROWS[name]
    gap = {} if settings.get("projector") == "block_mean" or settings.get("update_proj_gap") == 1 else {"update_proj_gap": 2}
    W = nn.Parameter(torch.randn(shape).to(dtype))
    group: dict[str, Any] = {"params": [W], "rank": 1 if name == "apollo_mini" else 96, **settings, **gap}
    optimizer = g.GaLoreAdamW([{**group, "state_codec": codec, "min_8bit_size": 1, "compile": False}], lr=1e-3)
    peaks = []
    for _ in range(4):
        W.grad = torch.randn_like(W)
        peaks.append(peak_bytes(optimizer.step))
    planned = param_bytes(shape, dtype, optimizer.param_groups[0], optimizer.rule).transient
    assert max(peaks[1:]) <= 1.05 * planned + 8192
    assert planned <= 1.7 * max(peaks)


def test_planned_peak_of_a_whole_run_of_the_trainer(
    make_config: Callable[..., PretrainConfig], token_data: TokenData, tmp_path: Path
) -> None:
    """`galore pretrain` itself, evaluation and checkpoint included; before it the model is measured, which a plan leaves out."""
    config = make_config(optimizer="galore_adamw", batch_size=8, num_training_steps=3)

    def run() -> None:
        trainer.train(config, "galore_adamw", 1e-2, token_data, tmp_path, Silent())

    assert planned_peak_bytes(config, token_data.vocab_size, "galore_adamw") == pytest.approx(peak_bytes(run), rel=0.05)


def test_an_optimizer_without_a_row_is_refused(tiny: str) -> None:
    with pytest.raises(UserError, match="not known"):
        planned(plan_request(PretrainConfig(model_config=tiny, max_length=64), device="cpu", optimizer="adamm"), traced=False)
