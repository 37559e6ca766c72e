"""What Q-GaLore costs: bytes on storages, and floating copies on the allocator's log."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.engine.step import layout_of
from galore_torch.engine.stored import state_spec
from galore_torch.ops.chunks import CACHED
from galore_torch.ops.int8_weight import Int8Weight
from support.memory import peak_bytes, storage_bytes
from support.q_galore_models import layers, optimizer_of


def test_bytes_of_a_7b_layer_are_the_plans() -> None:
    """1.02 a weight, 0.53 a basis element, 2.03 a pair of moments, on the storages of LLaMA-7B's two shapes, and from state_spec."""
    for shape in ((4096, 4096), (11008, 4096)):
        W = nn.Parameter(Int8Weight.quantize(torch.zeros(shape, dtype=torch.bfloat16)))
        assert storage_bytes(W.stored) / W.numel() <= 1.0157
        optimizer = g.QGaLoreAdamW8bit([W], rank=1024)
        state = optimizer.state[W]
        basis, moments = ([value for key, value in state.items() if key.startswith(name)] for name in ("basis_", "exp_avg"))
        basis = [tensor for tensor in basis if tensor is not state["basis_ready"]]
        assert storage_bytes(basis) / (4096 * 1024) <= 0.5157
        assert storage_bytes(moments) / (shape[0] * 1024) <= 2.0313
        spec = state_spec(layout_of(W, optimizer.param_groups[0]), optimizer.param_groups[0], optimizer.rule)
        assert storage_bytes(state) == sum(tensor.nbytes for tensor in spec.values())


@pytest.mark.parametrize("mode", ["project", "update"])
def test_a_step_never_holds_more_than_a_few_floating_weights(mode: str) -> None:
    """On the allocator's log, of 20 weights: two in fp32 (a gradient, and one decoded), and what fits the cache a few times."""
    m = layers(20, 512)
    optimizer = g.QGaLoreAdamW8bit(m.parameters(), lr=1e-3, rank=8, compile=False)
    g.fused_backward(m, optimizer, mode)
    x = torch.randn(4, 512)

    def step() -> None:
        m(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert peak_bytes(step) <= 2 * 4 * 512 * 512 + 6 * 4 * CACHED


def test_the_forward_pass_decodes_one_weight_at_a_time() -> None:
    m, x = layers(), torch.randn(4, 256)
    m(x)
    assert peak_bytes(lambda: m(x).sum()) <= 1.5 * 4 * 256 * 256


def test_no_floating_tensor_of_a_weights_size_is_alive_between_steps_or_passes() -> None:
    m = layers(4, 192)
    optimizer = g.QGaLoreAdamW8bit(m.parameters(), lr=1e-3, rank=8, compile=False)

    def floating() -> list[Any]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        return [t.shape for t in tensors if t.is_floating_point() and t.numel() >= 192 * 192]

    before = floating()
    out = m(torch.randn(4, 192)).square().mean()
    assert floating() == before  # what waits for the backward pass
    out.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert floating() == before


def test_quantising_and_building_the_optimizer_make_no_floating_copies() -> None:
    m = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)])
    codes = 8 * 512 * 512
    assert peak_bytes(lambda: g.quantize_linears(m, targets="all-linear")) < 1.1 * codes + 4 * 2**20  # the cache's chunks
    state = peak_bytes(lambda: optimizer_of(m, rank=8))
    assert state < 2 * 8 * 512 * 8 * 3


def test_each_layer_can_be_quantised_as_soon_as_it_is_made_and_on_the_meta_device() -> None:
    transformers = pytest.importorskip("transformers", reason="the layer is one of transformers'")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=88, num_attention_heads=2)
    for device in ("cpu", "meta"):
        with torch.device(device):
            layer = g.quantize_linears(LlamaDecoderLayer(config, 0))
        coded = [p for p in layer.parameters() if isinstance(p, Int8Weight)]
        assert len(coded) == 7
        assert {p.device.type for p in coded} == {device}
        assert sum(p.nbytes for p in coded) == pytest.approx((4 * 32 * 32 + 3 * 32 * 88) * (1 + 4 / 256))
    layer.mlp(torch.empty(1, 4, 32, device="meta")).sum().backward()
    assert {p.grad.device.type for p in layer.mlp.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    assert [type(p) for p in layer.parameters()].count(Int8Weight) == 7
