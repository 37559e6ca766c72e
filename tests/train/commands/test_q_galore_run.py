"""`galore pretrain --optimizer qgalore_adamw8bit`: INT8 while it trains, ordinary files beside the codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from galore_torch.ops.int8_weight import Int8Weight
from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.loop.trainer import train
from support.whole_runs import Silent, command

Make = Callable[..., PretrainConfig]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_checkpoint_loads_as_an_ordinary_model_and_holds_the_codes_beside_it(
    dtype: str, make_config: Make, token_data: TokenData, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(optimizer="qgalore_adamw8bit", dtype=dtype)
    _, model = train(config, "qgalore_adamw8bit", 0.01, token_data, tmp_path, Silent())
    coded = {name: p for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    assert coded
    (checkpoint,) = checkpoints_in(tmp_path / "checkpoints")
    assert {path.suffix for path in checkpoint.iterdir()} <= {".safetensors", ".json", ".jsonl", ".jinja"}
    again = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.float32 if dtype == "float32" else torch.bfloat16}
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    held = load_file(checkpoint / "int8.safetensors").values()
    assert sum(tensor.nbytes for tensor in held) == sum(p.nbytes for p in coded.values())


def test_the_runs_model_is_ordinary_and_weights_are_counted_as_int8(make_config: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    measured: dict[str, Any] = {}
    for name in ("galore_adamw8bit", "qgalore_adamw8bit"):
        folder = tmp_path / name
        assert command(make_config(optimizer=name, save_dir=str(folder)))[0] == 0
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
        measured[name] = first["memory_mb"]
        AutoModelForCausalLM.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    layers = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    saved = 1e6 * (measured["galore_adamw8bit"]["weights"] - measured["qgalore_adamw8bit"]["weights"])
    assert saved == pytest.approx(layers * (4 - 1 - 4 / 256), rel=0.05)  # matrices of few elements have a block that is not full
    assert measured["qgalore_adamw8bit"]["activations"] == pytest.approx(measured["galore_adamw8bit"]["activations"], rel=0.05)
