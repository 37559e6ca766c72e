"""bitsandbytes and torchao in the process of this package's optimizers: neither changes what the other does.

Oracles: the same run without them, an uninterrupted run, and AdamW.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import torchao
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import galore_torch as g
from integrations.compare import STEPS, WINDOWS, compare, held_out_loss
from support.hf_runs import RANK, difference, llama, windows

BNB, AO = ("bitsandbytes", "bitsandbytes"), ("torchao", "torchao")
OTHERS: dict[str, Any] = {
    "bitsandbytes": lambda params: bitsandbytes.optim.AdamW8bit(params, lr=0.01),
    "torchao": lambda params: torchao.optim.AdamW8bit(params, lr=0.01),
}


def galore(model: nn.Module) -> Any:
    return g.GaLoreAdamW8bit(g.galore_param_groups(model, **RANK, scale=1.0), lr=0.01, min_8bit_size=0)


def steps(model: nn.Module, optimizer: Any, which: range) -> None:
    data = windows(WINDOWS)
    for step in which:
        ids = torch.tensor([each["input_ids"] for each in data[4 * step : 4 * step + 4]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def alone() -> nn.Module:
    model = llama()
    steps(model, galore(model), range(STEPS))
    return model


@pytest.mark.parametrize(("name", "title"), [("bitsandbytes", BNB), ("torchao", AO)])
def test_their_optimizer_and_ours_take_turns(name: str, title: tuple[str, str], record: Any) -> None:
    """Two models in one process, a step of each at a time; ours is saved in the middle and goes on in a new optimizer."""
    ours, theirs = llama(), llama()
    optimizer, other = galore(ours), OTHERS[name](theirs.parameters())
    file = io.BytesIO()
    for step in range(STEPS):
        if step == STEPS // 2:
            torch.save({"model": ours.state_dict(), "optimizer": optimizer.state_dict()}, file)
        steps(ours, optimizer, range(step, step + 1))
        steps(theirs, other, range(step, step + 1))
    file.seek(0)
    saved, resumed = torch.load(file), llama()
    resumed.load_state_dict(saved["model"])
    again = galore(resumed)
    again.load_state_dict(saved["optimizer"])
    steps(resumed, again, range(STEPS // 2, STEPS))
    assert difference(ours, alone()) == 0.0
    compare(record, "its 8-bit AdamW in the same process", ours, resumed, theirs, framework=title, note="AdamW's loss is its own")


@pytest.mark.parametrize(("name", "title"), [("bitsandbytes", BNB), ("torchao", AO)])
def test_their_optimizer_inside_galore_is_refused(name: str, title: tuple[str, str], record: Any) -> None:
    base = type(OTHERS[name]([nn.Parameter(torch.zeros(4, 4))]))
    with pytest.raises(ValueError, match="AdamW8bit"):
        g.GaLore(base, [nn.Parameter(torch.randn(64, 64))], lr=0.01, rank=4)
    record(f"`GaLore({base.__name__}, ...)`", "refused", framework=title)


def test_frozen_4_bit_layers_of_bitsandbytes_are_left_out(record: Any) -> None:
    """What is not quantised trains around them: no state, no change of a code."""
    model = llama()
    for layer in model.model.layers:
        four = bitsandbytes.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32)
        four.weight = bitsandbytes.nn.Params4bit(layer.mlp.up_proj.weight.data.clone(), requires_grad=False)
        layer.mlp.up_proj = four.to("cpu")
    start, optimizer = held_out_loss(model), galore(model)  # the first pass on a CPU may lay its codes out anew
    before = [copy.deepcopy(layer.mlp.up_proj.weight.data) for layer in model.model.layers]
    steps(model, optimizer, range(STEPS))
    assert all(torch.equal(layer.mlp.up_proj.weight.data, data) for layer, data in zip(model.model.layers, before, strict=True))
    assert not any(layer.mlp.up_proj.weight in optimizer.state for layer in model.model.layers)
    loss = held_out_loss(model)
    assert loss < start - 0.5
    record("frozen `Linear4bit` layers are left out", framework=BNB, loss=loss)


def test_float8_training_of_torchao(record: Any) -> None:
    """Its linear layers compute in float8, emulated on a CPU; weights and gradients are as they were."""
    model = llama()
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True), module_filter_fn=lambda _, name: "lm_head" not in name)
    start, optimizer = held_out_loss(model), galore(model)
    assert sum("basis" in state for state in optimizer.state.values()) == 2 * 7
    steps(model, optimizer, range(STEPS))
    loss = held_out_loss(model)
    assert loss < start - 0.5
    record("float8 training", framework=AO, loss=loss)


def test_int8_weight_only_model_of_torchao_is_refused(record: Any, tmp_path: Path) -> None:
    """Its weights cannot train: nothing would be projected."""
    model = llama()
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="frozen"):
        g.galore_param_groups(model, 8)
    record("a model of int8 weights, which do not train", "refused", framework=AO)
