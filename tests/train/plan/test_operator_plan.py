"""`galore plan --model fno:...`. Oracles: storages of real optimizers, neuraloperator's own model where it is installed."""

from __future__ import annotations

import re
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import Parameter

import galore_torch as g
from galore_torch.train.commands.plan import plan
from galore_torch.train.errors import UserError
from galore_torch.train.plan.operators import FourierOperator
from support.memory import storage_bytes


@pytest.mark.parametrize(
    ("class_name", "rank", "sparse"),
    [("GaLoreAdamW", None, None), ("TensorGaLoreAdamW", 0.25, None), ("GaLoreAdamW8bit", 0.25, None), ("TensorGaLoreAdamW", 0.2, 0.05)],
)
def test_state_is_that_of_the_real_optimizer(class_name: str, rank: float | None, sparse: float | None) -> None:
    model = FourierOperator.parse("fno:8x8:12:2")
    assert model.spectral == (12, 12, 8, 5)
    spectral = [Parameter(torch.zeros(model.spectral, dtype=torch.complex64)) for _ in range(2)]
    real = [Parameter(torch.zeros(shape)) for shape in model.real]
    assert model.nbytes == sum(p.numel() * p.element_size() for p in [*spectral, *real])
    cls: Any = getattr(g, class_name)
    optimizer = cls([{"params": real}, {"params": spectral, "rank": rank, "sparse": sparse, "tensor": True}])
    assert sum(model.state(class_name, rank, sparse)) == storage_bytes([optimizer.state[p] for p in [*spectral, *real]])


def test_weights_are_neuraloperators() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("neuralop.models", reason="neuraloperator is not installed")
        real = models.FNO(n_modes=(8, 6), hidden_channels=12, in_channels=1, out_channels=1, n_layers=3)
    model = FourierOperator.parse("fno:8x6:12:3")
    assert sorted(tuple(p.shape) for p in real.parameters()) == sorted([*model.real, *[model.spectral] * 3])


@pytest.mark.parametrize(("channels", "half"), [(3, 2), (5, 2), (7, 4), (12, 6)])
def test_the_channels_of_the_mlp_are_half_of_all_rounded_as_neuraloperator_does(channels: int, half: int) -> None:
    assert (half, channels, 1) in FourierOperator.parse(f"fno:8x6:{channels}:1").real


def test_the_published_model_beside_the_published_numbers() -> None:
    """64 modes x 64 channels x 4 layers: 4 x 64^2 x 64 x 33 complex numbers, of 16 bytes in AdamW."""
    out = StringIO()
    assert plan({"model": "fno:64x64:64:4"}, Console(file=out, width=100)) == 0
    said = out.getvalue()
    (row,) = [line for line in said.splitlines() if re.match(r" *Tensor-GaLore, 0.25", line)]
    assert "4.83 = 24.5 %" in row
    spectral = 4 * 64**2 * 64 * 33
    assert f"{16 * spectral / 1e9:.2f}" in said
    assert float(row.split()[3]) == pytest.approx(12 * spectral / 4 / 1e9, rel=0.01)


@pytest.mark.parametrize("name", ["fno:64:64", "fno:0x4:8:1", "fno:ax4:8:1", "fno:"])
def test_a_name_that_is_no_operator(name: str) -> None:
    with pytest.raises(UserError, match="fno:64x64:64:4"):
        plan({"model": name}, Console(file=StringIO()))


def test_other_flags_are_refused() -> None:
    with pytest.raises(UserError, match="--rank has no effect"):
        plan({"model": "fno:8x8:8:1", "rank": 4}, Console(file=StringIO()))


def test_the_table_of_the_documentation_is_what_the_command_prints() -> None:
    out = StringIO()
    plan({"model": "fno:64x64:64:4"}, Console(file=out, width=120))
    printed = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    page = (Path(__file__).resolve().parents[3] / "docs" / "tensors.md").read_text(encoding="utf-8")
    page = page.partition("## Memory, before it runs")[2].partition("## What it trains")[0]
    rows = [line for line in page.splitlines() if re.match(r"\| (torch's AdamW|GaLoreAdamW,|Tensor-GaLore,|TensorGRaD,)", line)]
    assert len(rows) == 11
    for row in rows:
        assert " ".join(row.replace("\\|", "¦").replace("|", " ").replace("¦", "|").split()) in printed
