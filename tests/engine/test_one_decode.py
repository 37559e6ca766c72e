"""A step decodes each basis as often as it multiplies with it: to project, and to project back. bf16 is multiplied with as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.ops.codecs import StoredTensor


@pytest.mark.parametrize("basis_codec", ["fp32", "bf16", "int4"])
def test_a_step_decodes_its_basis_twice_at_most(basis_codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.randn(64, 48))
    optimizer = g.GaLoreAdamW([p], rank=8, update_proj_gap=100, basis_codec=basis_codec, compile=False)
    p.grad = torch.randn(64, 48)
    optimizer.step()
    seen: list[str] = []
    decode = StoredTensor.decode

    def counted(stored: StoredTensor, *arguments: object) -> Tensor:
        seen.append(stored.name)
        return decode(stored, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StoredTensor, "decode", counted)
    optimizer.step()
    assert seen.count("basis") == (0 if basis_codec == "bf16" else 2)
