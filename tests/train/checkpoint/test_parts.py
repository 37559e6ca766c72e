"""Weights and state written in parts: what lies on the disk, and what a torch without its format is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from galore_torch import GaLoreAdamW8bit
from galore_torch.train.checkpoint import parts
from galore_torch.train.errors import UserError


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(80, 64)
    optimizer = GaLoreAdamW8bit([{"params": [model.weight], "rank": 8}, {"params": [model.bias]}], lr=0.1)
    model(torch.randn(4, 80)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_files_are_safetensors_and_give_weights_and_state_back_to_the_bit(tmp_path: Path) -> None:
    """Every tensor of the state, its scalars and bytes too; no file is a pickle."""
    model, optimizer = stepped()
    state = optimizer.state_dict()
    parts.save_parts(tmp_path, model, state)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert {file.suffix for file in files} == {".safetensors"}

    other = nn.Linear(80, 64)
    parts.load_weights(tmp_path, other)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), model.parameters(), strict=True))
    again = GaLoreAdamW8bit([{"params": [other.weight], "rank": 8}, {"params": [other.bias]}], lr=0.1)
    found = parts.load_state(tmp_path, parts.without_tensors(state), again)
    assert found["state"].keys() == state["state"].keys()
    for index, entry in state["state"].items():
        assert found["state"][index].keys() == entry.keys()
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert found["state"][index][key].dtype == value.dtype, key
                assert torch.equal(found["state"][index][key], value), key


def test_a_torch_without_the_format_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.hf_storage", None)
    with pytest.raises(UserError, match=r"need a newer torch than .*update it, or use --parallel ddp"):
        parts.formats()
