"""What INT8 weights cannot do is refused in one clear line."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import galore_torch as g
from galore_torch.ops.int8_weight import Int8Weight
from support.q_galore_models import layers, loss, model, optimizer_of


def test_what_cannot_be_quantised_is_refused_in_one_line_and_nothing_changes() -> None:
    tied = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    tied[1].weight = tied[0].weight
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 10)), nn.utils.parametrizations.weight_norm(nn.Linear(10, 8)))
    spoilt = model(quantized=False)
    with torch.no_grad():
        spoilt[2].weight[0, 0] = float("nan")
    integers = nn.Sequential(nn.Linear(4, 4))
    integers[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for m, words in (
        (model(), r"0\.weight is INT8 already.*once"),
        (model(torch.float16, quantized=False), r"0\.weight is torch\.float16.*bfloat16 and float32.*model\.to"),
        (model(torch.float64, quantized=False), r"float64"),
        (integers, r"torch\.int8"),
        (tied, r"1\.weight is shared with a layer that stays as it is \(Embedding\)"),
        (normed, r"0\.weight is computed anew from original1 .*remove_parametrizations"),
        (spoilt, r"2\.weight holds values that are not finite"),
    ):
        before = [(type(p), p.dtype) for p in m.parameters()]
        with pytest.raises(ValueError, match=words) as error:
            g.quantize_linears(m, targets=r"^\d$")
        assert "\n" not in str(error.value)
        assert [(type(p), p.dtype) for p in m.parameters()] == before


def test_weights_outside_of_linear_layers_stay_floating_and_are_named() -> None:
    """Here the fused q, k, v of torch's attention; 3-D weights of experts are of the same kind."""
    m = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.warns(UserWarning, match=r"1 weights outside of linear layers.*768 elements beside 1,280.*self_attn\.in_proj_weight"):
        g.quantize_linears(m)
    coded = [name for name, p in m.named_parameters() if isinstance(p, Int8Weight)]
    assert coded == ["self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]


def test_an_int8_model_is_no_fp16_model_and_no_torch_optimizers() -> None:
    m = model()
    with pytest.raises(ValueError, match=r"torch\.float16: use torch\.bfloat16 or torch\.float32"):
        m.half()
    for optimizer in (torch.optim.AdamW(m.parameters()), g.GaLore(torch.optim.AdamW, m.parameters(), lr=1e-3)):
        loss(m).backward()
        with pytest.raises(ValueError, match=r"write to an INT8 weight.*galore_torch"):
            optimizer.step()


def test_int8_weights_can_be_traced_without_values() -> None:
    with FakeTensorMode():
        m = layers(2, 32)
        m(torch.zeros(4, 32)).sum().backward()
        assert m[0].weight.grad.shape == (32, 32)


def test_sharding_int8_weights_is_refused() -> None:
    """`fully_shard` begins by splitting each weight, and would go on with floating shards."""
    with pytest.raises(ValueError, match=r"not sharded yet.*fully_shard.*without quantize_linears"):
        model()[0].weight.chunk(2)


def test_a_weight_changed_between_the_passes_is_noticed() -> None:
    m = model()
    optimizer = optimizer_of(m)
    early = loss(m)
    loss(m).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        early.backward()


def test_an_optimizer_over_weights_that_the_model_no_longer_has_is_refused_at_the_step() -> None:
    """Such weights get no gradient: before, the step trained the biases alone and said nothing."""
    for change, quantized in ((g.quantize_linears, False), (g.dequantize_linears, True)):
        for fused in (False, True):
            m = model(quantized=quantized)
            early = g.GaLoreAdamW(g.galore_param_groups(m, 3, targets="all-linear"), lr=0.01)
            if fused:
                g.fused_backward(m, early)
            change(m)
            loss(m).backward()
            before = [p.detach().clone() for p in m.parameters()]
            with pytest.raises(ValueError, match=r"no longer in its model.*then make the groups and the optimizer"):
                early.step()
            assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True))
            late = g.GaLoreAdamW(g.galore_param_groups(m, 3, targets="all-linear"), lr=0.01)
            m.zero_grad()
            loss(m).backward()
            late.step()
            assert not any(torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True))
