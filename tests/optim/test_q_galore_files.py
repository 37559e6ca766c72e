"""Q-GaLore through checkpoints, exports and changes of dtype and device: every code comes back."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.ops.int8_weight import Int8Weight
from support.q_galore_models import model, optimizer_of, same, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, "project", "update"])
def test_resume_is_bit_exact_through_torch_save_with_its_default_load(mode: str | None, dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, Any]:
        m = model(dtype)
        optimizer = optimizer_of(m)
        if mode:
            g.fused_backward(m, optimizer, mode)
        return m, optimizer

    straight, a = build()
    train(straight, a, range(11))
    first, b = build()
    train(first, b, range(6))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": b.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only is its default
    second, c = build()
    train(second, c, range(2))  # a used optimizer forgets what it was
    second.load_state_dict(saved["model"])
    c.load_state_dict(saved["optimizer"])
    train(second, c, range(6, 11))
    assert same(straight, second)
    for p, q in zip(straight.parameters(), second.parameters(), strict=True):
        for key, value in a.state[p].items():
            assert value == c.state[q][key] if isinstance(value, int) else torch.equal(value, c.state[q][key]), key


def test_parameters_and_seeds_make_the_rounding() -> None:
    """Two equal parameters round differently, two equal runs alike."""
    W = torch.randn(16, 256)
    runs = []
    for _ in range(2):
        pair = [nn.Parameter(Int8Weight.quantize(W)) for _ in range(2)]
        optimizer = g.QGaLoreAdamW8bit(pair, lr=0.01, rank=4)
        for p in pair:
            p.grad = W.cos()
        optimizer.step()
        runs.append([p.codes for p in pair])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(*runs[0])


def test_a_model_exports_to_ordinary_safetensors_that_transformers_loads(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="the export is read back with transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    m = g.quantize_linears(transformers.LlamaForCausalLM(config).to(torch.bfloat16))
    coded = {name for name, p in m.named_parameters() if isinstance(p, Int8Weight)}
    assert len(coded) == 2 * 7
    assert all("self_attn" in name or "mlp" in name for name in coded)
    assert {type(m.get_output_embeddings().weight), type(m.get_input_embeddings().weight)} == {nn.Parameter}
    tokens = torch.randint(0, 64, (2, 16))
    optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(m, 8), lr=0.01)
    m(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    with torch.no_grad():
        expected = m(input_ids=tokens).logits
    g.dequantize_linears(m).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for p, q in zip(m.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, expected, atol=0.05, rtol=0.05)


def test_changing_the_dtype_changes_no_code_and_the_same_optimizer_goes_on() -> None:
    m = model()
    optimizer = optimizer_of(m)
    train(m, optimizer, range(2))
    coded = [p for p in m.parameters() if isinstance(p, Int8Weight)]
    codes = [p.codes.clone() for p in coded]
    m.to(torch.bfloat16)
    assert all(p is q for p, q in zip(coded, (p for p in m.parameters() if p.dim() == 2), strict=True))
    assert all(p.dtype == torch.bfloat16 and torch.equal(p.codes, c) for p, c in zip(coded, codes, strict=True))
    train(m, optimizer, range(2, 4))
    assert not any(torch.equal(p.codes, c) for p, c in zip(coded, codes, strict=True))
