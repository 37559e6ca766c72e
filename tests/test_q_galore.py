"""Q-GaLore as an optimizer: against a naive transcription, in every mode of training, through checkpoints and exports, in bytes."""

from __future__ import annotations

import copy
import gc
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import galore_torch as g
from galore_torch import elementwise, recovery
from galore_torch.codecs import levels, noise
from galore_torch.elementwise import has_compiler
from galore_torch.engine import _first_seed, plan_of
from galore_torch.int8_weight import Int8Weight, row_parts
from galore_torch.layout import state_spec
from galore_torch.linalg import CACHED
from galore_torch.low_rank_grad import LowRankGrad
from memory import peak_bytes, storage_bytes
from reference import QGaLoreReference, best_subspace

X = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))


def model(dtype: torch.dtype = torch.float32, quantized: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    m = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 6)).to(dtype)
    return g.quantize_linears(m, targets="all-linear") if quantized else m  # type: ignore[return-value]


def optimizer_of(m: nn.Module, **keys: Any) -> Any:
    return g.QGaLoreAdamW8bit(m.parameters(), **{"lr": 0.01, "rank": 3, "min_8bit_size": 0, "update_proj_gap": 4, **keys})


def loss(m: nn.Module, shift: float = 0.0) -> Tensor:
    return (m((X + shift).to(next(m.parameters()).dtype)) - 0.3).square().mean()


def train(m: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        loss(m, 0.1 * t).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(m: nn.Module) -> list[Tensor]:
    return [part for p in m.parameters() for part in (p.stored if isinstance(p, Int8Weight) else (p.detach(),))]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


# --- the oracle -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (21, 37)], ids=str)
def test_every_step_is_the_naive_transcriptions_to_the_last_code(shape: tuple[int, int], rounded: bool) -> None:
    """The engine's codes are floor(oracle's number + the noise), within a thousandth of a step; grids are equal."""
    hyper: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "scale": 0.25, "weight_decay": 0.1}
    oracle = QGaLoreReference(**hyper)
    W = nn.Parameter(Int8Weight.quantize(torch.randn(shape)))
    optimizer = g.QGaLoreAdamW8bit(
        [W],
        **hyper,
        rank=4,
        min_8bit_size=0,
        update_proj_gap=3,
        gap_range=None,
        projector="svd",
        transport="keep",
        stochastic_rounding=rounded,
    )
    state, left = optimizer.state[W], shape[0] < shape[1]
    G0 = torch.randn(shape)
    for t in range(1, 8):
        W.grad = G0 + 0.3 * torch.randn(shape)
        before, stored = copy.deepcopy(state), [tensor.clone() for tensor in W.stored]
        G = W.grad.clone()
        optimizer.step()
        if t % 3 == 1:  # a refresh: no element of the new basis is further than half a step from the singular vectors, up to sign
            exact = best_subspace(G, 4, "left" if left else "right")
            P = oracle.basis(state["basis_codes"], state["basis_scale"], state["basis_offset"], min(shape))
            turned = exact * (exact * P.to(exact)).sum(0).sign()
            assert ((P - turned).abs() <= 0.51 * state["basis_scale"].double()).all()
        P = oracle.basis(state["basis_codes"], state["basis_scale"], state["basis_offset"], min(shape))
        m, v = (
            oracle.moment(before[f"{key}_codes"], before[f"{key}_scale"], levels(signed, torch.device("cpu")), 1 if left else 0)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
        )
        exact_W, m, v = oracle.moved(oracle.weight(*stored), P, m, v, G, t)
        for key, value, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            table, axis = levels(signed, torch.device("cpu")), 1 if left else 0
            found = oracle.moment(state[f"{key}_codes"], state[f"{key}_scale"], table, axis)
            scale = state[f"{key}_scale"].double().repeat_interleave(max(shape), axis)
            nearest = (table * scale.unsqueeze(-1) - value.unsqueeze(-1)).abs().amin(-1)
            assert ((found - value).abs() <= nearest + 2.0**-7 * value.abs() + 6e-7 * scale).all()
        assert len(list(row_parts(W))) == 1  # one stream of noise, after those of the two moments
        a, b = noise(*shape, _first_seed(W, before, t) + 2, W.device) if rounded else (torch.tensor(0), torch.tensor(0x8000))
        uniform = (((a + b).expand(shape) % 0x10000 // 4 + (0.5 if rounded else 0)) / 2**14).double()
        for i, (values, random, codes) in enumerate(
            zip(exact_W.flatten().split(256), uniform.flatten().split(256), W.codes.flatten().split(256), strict=True)
        ):
            step, start = oracle.grid(values, float(stored[1][i]), float(stored[2][i]))
            assert (float(W.scale[i]), float(W.offset[i])) == (step, start)
            high = (values - start) / step + random - codes.double()
            assert high.min() > -1e-3
            assert high.max() < 1 + 1e-3


# --- modes of training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["project", "update"])
def test_one_fused_backward_pass_equals_the_plain_step_bit_for_bit_over_refreshes(mode: str, dtype: torch.dtype) -> None:
    plain, fused = model(dtype), model(dtype)
    a, b = optimizer_of(plain), optimizer_of(fused)
    start = copy.deepcopy(plain)
    with g.fused_backward(fused, b, mode):
        train(plain, a, range(10))
        train(fused, b, range(10))
    assert same(plain, fused)
    assert not same(plain, start)


def test_accumulated_micro_batches_are_projected_and_equal_one_large_batch() -> None:
    whole, parts = model(), model()
    a, b = optimizer_of(whole, update_proj_gap=100), optimizer_of(parts, update_proj_gap=100)
    train(whole, a, range(1))
    train(parts, b, range(1))  # a basis for both
    with g.fused_backward(parts, b):
        loss(whole).backward()
        for x in X.chunk(4):
            ((parts(x) - 0.3).square().mean() / 4).backward()
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            if isinstance(p, Int8Weight):
                assert isinstance(q.grad, LowRankGrad)
                low = b.state[q]["exp_avg_codes"].shape
                assert q.grad.low.shape == low
            else:
                torch.testing.assert_close(q.grad, p.grad)
        for optimizer in (a, b):
            optimizer.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        if isinstance(p, Int8Weight):  # sums in another order differ by an ulp, which rounds one code in thousands the other way
            assert ((p - q).abs() <= 1.01 * p.scale.max()).all()
            assert (p.codes != q.codes).float().mean() < 1e-2


@pytest.mark.parametrize("mode", [None, "project"])
def test_clip_grad_norm_measures_and_scales_what_the_step_uses(mode: str | None) -> None:
    clipped, scaled = model(), model()
    a, b = optimizer_of(clipped), optimizer_of(scaled)
    for m, optimizer in ((clipped, a), (scaled, b)):
        if mode:
            g.fused_backward(m, optimizer, mode)
        loss(m).backward()
    parts = [p.grad.low if isinstance(p.grad, LowRankGrad) else p.grad for p in scaled.parameters()]
    norm = torch.cat([part.flatten() for part in parts]).norm()
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(clipped.parameters(), 0.1), norm)
    for part in parts:
        part.mul_(0.1 / (norm + 1e-6))
    a.step()
    b.step()
    for p, q in zip(clipped.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p + 0, q + 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    plain, saving = model(), model()
    a, b = optimizer_of(plain), optimizer_of(saving)
    for t in range(5):
        x = (X + t).requires_grad_()
        (plain(x) - 0.3).square().mean().backward()
        (checkpoint(saving, x, use_reentrant=reentrant) - 0.3).square().mean().backward()
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    assert same(plain, saving)


def test_a_layers_product_and_gradients_are_those_of_its_decoded_weight() -> None:
    layer = g.quantize_linears(nn.Linear(24, 40), targets="all-linear")
    plain = g.dequantize_linears(copy.deepcopy(layer))
    for x in (torch.randn(24), torch.randn(5, 24), torch.randn(2, 3, 24)):
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for module, it in zip((layer, plain), inputs, strict=True):
            module.zero_grad()
            module(it).square().sum().backward()
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_autocast_computes_in_its_dtype_and_gradients_have_the_weights() -> None:
    m = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(X)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())


def test_a_weight_that_two_layers_share_stays_shared_and_learns_from_both() -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(2)
        m = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        m[2].weight = m[0].weight
        return m

    m, plain = g.quantize_linears(tied(), targets="all-linear"), tied()
    assert m[0].weight is m[2].weight
    plain.load_state_dict(g.dequantize_linears(copy.deepcopy(m)).state_dict())
    for each in (m, plain):
        each(X[:, :16]).square().mean().backward()
    torch.testing.assert_close(m[0].weight.grad, plain[0].weight.grad)
    optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(m, 4, targets="all-linear"), lr=0.01)
    assert sum(isinstance(p, Int8Weight) for group in optimizer.param_groups for p in group["params"]) == 1
    optimizer.step()
    back = g.dequantize_linears(m)
    assert back[0].weight is back[2].weight


def test_full_rank_and_other_classes_train_int8_weights_too() -> None:
    for make in (
        lambda p: g.QGaLoreAdamW8bit(p, lr=0.01),
        lambda p: g.GaLoreAdamW(p, lr=0.01, rank=3),
        lambda p: g.GaLoreAdafactor(p, lr=0.01, rank=3),
        lambda p: g.GaLoreSGD(p, lr=0.3, momentum=0.9, rank=3),
        lambda p: g.GaLore(torch.optim.RMSprop, p, lr=1e-3, rank=3),
    ):
        m = model()
        before = loss(m).item()
        train(m, make(m.parameters()), range(20))
        assert loss(m).item() < 0.7 * before


def test_each_matrix_finds_its_own_gap_unless_the_group_says_otherwise() -> None:
    W = nn.Parameter(torch.zeros(48, 32))
    assert g.QGaLoreAdamW8bit([W], rank=4, update_proj_gap=50).param_groups[0]["gap_range"] == (50, 400)
    assert g.QGaLoreAdamW8bit([{"params": [W], "rank": 4, "update_proj_gap": 10}]).param_groups[0]["gap_range"] == (10, 80)
    assert g.QGaLoreAdamW8bit([W], rank=4, gap_range=None).param_groups[0]["gap_range"] is None
    assert g.QGaLoreAdamW8bit([W], rank=4, gap_range=(100, 300)).param_groups[0]["gap_range"] == (100, 300)
    parameters = inspect.signature(g.QGaLoreAdamW8bit).parameters
    assert {"lr", "betas", "eps", "weight_decay", "rank", "min_8bit_size"} <= parameters.keys()
    assert parameters["gap_range"].default == "lazy"
    lazy = g.QGaLoreAdamW8bit([W], rank=4, update_proj_gap=4, lr=0.0)
    G = torch.randn(48, 4) @ torch.randn(4, 32)
    for _ in range(40):  # a gradient that never turns
        W.grad = G.clone()
        lazy.step()
    assert int(lazy.state[W]["gap"]) == 32


@pytest.mark.skipif(not has_compiler("cpu"), reason="needs a C++ compiler")
def test_the_compiled_move_of_a_weight_is_the_move() -> None:
    """An ulp of difference may round one code in thousands the other way."""
    start, update = Int8Weight.quantize(torch.randn(40, 200)), 0.1 * torch.randn(40, 200)
    plain, compiled = copy.deepcopy(start), copy.deepcopy(start)
    for seed in range(3):
        recovery.subtract(plain, update.clone(), 0.5, 0.99, seed)
        elementwise.subtract(compiled, update.clone(), 0.5, 0.99, seed)
    assert any(key[0] is elementwise._move_int8 and program for key, program in elementwise.programs.items()), "it was compiled"
    assert ((plain - compiled).abs() <= 1.01 * plain.scale.max()).all()
    assert (plain.codes != compiled.codes).float().mean() < 1e-2
    assert not torch.equal(plain.codes, start.codes)


# --- checkpoints and exports ----------------------------------------------------------------------------------------------


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


# --- bytes ----------------------------------------------------------------------------------------------------------------


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
        spec = state_spec(plan_of(W, optimizer.param_groups[0]), optimizer.param_groups[0], optimizer.rule)
        assert storage_bytes(state) == sum(tensor.nbytes for tensor in spec.values())


def layers(count: int = 20, size: int = 256) -> nn.Sequential:
    return g.quantize_linears(nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(count)]), targets="all-linear")


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


# --- bad input ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused_in_one_line_and_nothing_changes() -> None:
    tied = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    tied[1].weight = tied[0].weight
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
        (spoilt, r"2\.weight holds values that are not finite"),
    ):
        before = [(type(p), p.dtype) for p in m.parameters()]
        with pytest.raises(ValueError, match=words) as error:
            g.quantize_linears(m, targets="all-linear")
        assert "\n" not in str(error.value)
        assert [(type(p), p.dtype) for p in m.parameters()] == before
    with pytest.raises(ValueError, match="no attention or MLP layer"):
        g.quantize_linears(model(quantized=False))


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
