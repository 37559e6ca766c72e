"""The table of docs/family.md. Oracle: `state_spec` of each method, on tensors without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.recipe import needs_gradient
from galore_torch.optim.methods import METHODS

SIDE = 4096
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "family.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("` "): [cell.strip() for cell in cells]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for cells in [line.strip("|").split("|")]
}


def optimizer(name: str, dtype: torch.dtype, **settings: Any) -> Any:
    with torch.device("meta"):
        W = Parameter(torch.zeros(SIDE, SIDE, dtype=dtype))
    if name == "galore_adamw":
        return g.GaLoreAdamW([W], rank=SIDE // 4, **settings)
    own = {"random_after": 1} if name == "golore" else {}
    return g.low_rank_optimizer([W], name, rank=METHODS[name].rank or SIDE // 4, **own, **settings)


def bytes_of(made: Any) -> float:
    (state,) = made.state.values()
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)) / SIDE**2


def test_every_method_has_a_row() -> None:
    assert ROWS.keys() == {"galore_adamw", *METHODS}


@pytest.mark.parametrize("name", ROWS)
def test_bytes_and_what_is_read_are_the_codes(name: str) -> None:
    _, _, _, reads, exact, small, source = ROWS[name]
    error = {"carry_codec": "int4"} if name == "ldadam" else {}
    full, eight = optimizer(name, torch.float32), optimizer(name, torch.bfloat16, state_codec="int8", **error)
    for said, made in ((exact, full), (small, eight)):
        assert float(said) == pytest.approx(bytes_of(made), abs=0.5 * 10.0 ** -len(said.partition(".")[2]))
    assert reads == ("G" if needs_gradient(full.param_groups[0]) else "R")
    if name in METHODS:
        assert METHODS[name].source in source or name == "fold"
