"""The head's gradients by chunks and slices: in what precision they are made, and that no fp32 matrix of the head's size is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galore_torch.ops.int8_weight import Int8Weight
from galore_torch.train.model.chunked_loss import IGNORED, Products, head_loss, products_on
from galore_torch.train.model.llama import ModelShape, build_model
from galore_torch.train.model.loss import TokenLoss
from support.memory import peak_bytes, storage_bytes

BF16 = torch.bfloat16
TOKENS, VOCABULARY, WIDTH = 33, 300, 24
SLICED = Products(torch.float32, 40 * WIDTH)  # 40 rows or fewer at a time: 300 is not a multiple of them


def case(dtype: torch.dtype, tokens: int = TOKENS, vocabulary: int = VOCABULARY, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, targets), of which a whole chunk of 4 and a single one are padding."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[4:8] = targets[-1] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def grads(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle: (loss, gradients) by torch's own cross-entropy of whole logits in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = nn.functional.cross_entropy(h @ w.T, targets, ignore_index=IGNORED, reduction="sum")
    return loss.detach(), *grads(loss * upstream, h, w)


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square, over the truth's."""
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("upstream", [1.0, 1 / 28, -3.0])
@pytest.mark.parametrize("chunk", [1, 4, 33, 100])
@pytest.mark.parametrize("products", [SLICED, Products(torch.float32, 2**22)])
def test_a_16_bit_gradient_is_the_exact_one_rounded_once(products: Products, chunk: int, upstream: float) -> None:
    """Products in fp32 of bf16 numbers: every entry within one rounding, 2^-8 of itself, beside fp32's own errors. Sum and mean, padding,
    slices of the vocabulary that cut it unevenly."""
    hidden, weight, targets = case(BF16)
    loss = head_loss(hidden, weight, targets, chunk, products)
    truth, *expected = exact(hidden, weight, targets, upstream)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    for found, right in zip(grads(loss * upstream, hidden, weight), expected, strict=True):
        assert found.dtype == BF16
        roundings = 1 if found.shape == weight.shape else 2  # the hidden states' is rounded, then scaled
        assert ((found.double() - right).abs() <= roundings * 2**-8 * right.abs() + 1e-5 * right.abs().max()).all()


@pytest.mark.parametrize("elements", [WIDTH, 40 * WIDTH, 2**22])
@pytest.mark.parametrize("chunk", [5, 33])
def test_slices_change_nothing_in_float64(chunk: int, elements: int) -> None:
    hidden, weight, targets = case(torch.float64)
    loss = head_loss(hidden, weight, targets, chunk, Products(torch.float64, elements))
    truth, *expected = exact(hidden, weight, targets)
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=0)
    for found, right in zip(grads(loss, hidden, weight), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)


def test_bf16_is_at_least_as_exact_as_chunks_summed_in_fp32() -> None:
    """The other way to a gradient in chunks: bf16 products of each chunk, added up in fp32. It needs the fp32 buffer, and is no better."""
    hidden, weight, targets = case(BF16, tokens=256, width=32)
    with torch.no_grad():
        summed = torch.zeros(weight.shape)
        for rows in torch.arange(256).split(16):
            softmax = torch.softmax((hidden[rows] @ weight.T).float(), 1)
            of_logits = softmax - nn.functional.one_hot(targets[rows].clamp_min(0), len(weight))
            summed += (of_logits * (targets[rows] != IGNORED)[:, None]).to(BF16).T @ hidden[rows]
    (found,) = grads(head_loss(hidden, weight, targets, 16), weight)
    truth = exact(hidden, weight, targets)[2]
    assert error(found, truth) <= error(summed.to(BF16), truth) < 0.02


@pytest.mark.parametrize("frozen_hidden", [False, True])
@pytest.mark.parametrize("products", [Products(BF16, 2**22), Products(torch.float32, 2**16), Products(BF16, 2**16)])
def test_the_heads_bf16_gradient_has_no_fp32_buffer(products: Products, frozen_hidden: bool) -> None:
    """Allocator's log: the gradient itself, and a chunk of logits and a slice's copies beside it; less than the head in fp32 alone."""
    hidden, weight, targets = case(BF16, tokens=64, vocabulary=8192, width=256)
    hidden.requires_grad_(not frozen_hidden)
    chunk, head = 8, 2 * weight.numel()

    def step() -> None:
        weight.grad = hidden.grad = None
        (head_loss(hidden, weight, targets, chunk, products) / 64).backward()

    step()
    weight.grad = hidden.grad = None
    peak = peak_bytes(step)
    assert weight.grad is not None
    assert storage_bytes([weight.grad]) == head
    beside = 2 * 4 * 2**16 if products.elements == 2**16 else 0
    assert head < peak < head + 6 * chunk * len(weight) + beside + 200_000 < 2 * head


def test_frozen_halves_get_no_gradient_and_change_nothing_of_the_others() -> None:
    hidden, weight, targets = case(BF16)
    both = grads(head_loss(hidden, weight, targets, 4), hidden, weight)
    for trained, frozen, whole in ((hidden, weight, both[0]), (weight, hidden, both[1])):
        frozen.requires_grad_(False)
        (alone,) = grads(head_loss(hidden, weight, targets, 4), trained)
        assert torch.equal(alone, whole)
        frozen.requires_grad_(True)


@pytest.mark.parametrize("frozen_hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_second_backward_pass_is_refused(dtype: torch.dtype, frozen_hidden: bool) -> None:
    hidden, weight, targets = case(dtype)
    loss = head_loss(hidden.requires_grad_(not frozen_hidden), weight, targets, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_changed_before_its_gradient_is_refused() -> None:
    """Its logits are computed again, so it has to be what it was."""
    hidden, weight, targets = case(BF16)
    loss = head_loss(hidden, weight, targets, 4)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_micro_batches_add_up() -> None:
    """Two passes leave the sum of their gradients, rounded once more."""
    hidden, weight, targets = case(BF16)
    parts = (slice(0, 20), slice(20, None))
    each = [grads(head_loss(hidden[part], weight, targets[part], 4), weight)[0] for part in parts]
    for part in parts:
        head_loss(hidden[part], weight, targets[part], 4).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, each[0] + each[1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_bf16_llama_is_as_exact_as_with_whole_logits(tied: bool) -> None:
    """The gradients of all parameters against float64 of the same weights: at most 1.25 of the error of whole logits, as the hidden
    states' is rounded before it is scaled. Tied, the head's is added to the embedding's; on its own it is as exact as that of whole
    logits, which also is rounded once."""

    def run(chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = ModelShape(16, 24, 2, 2, 64, 50, extras=(("tie_word_embeddings", tied),))
        model: Any = build_model(shape, seed=0, dtype="bfloat16", bos_token_id=None, eos_token_id=None, activation_checkpointing=False)
        model.to(dtype)
        torch.manual_seed(0)
        ids = torch.randint(0, 50, (3, 12))
        (TokenLoss(model, chunk)(ids[:, :-1], ids[:, 1:]) / 33).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()]), model.lm_head.weight.grad

    chunked, whole, truth = run(5, BF16), run(0, BF16), run(0, torch.float64)
    assert error(chunked[0], truth[0]) <= 1.25 * error(whole[0], truth[0])
    assert tied or error(chunked[1], truth[1]) <= 1.01 * error(whole[1], truth[1])


@pytest.mark.parametrize("products", [SLICED, Products(torch.float32, WIDTH)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_an_int8_head_is_its_decoded_copy(dtype: torch.dtype, products: Products) -> None:
    """Rows of 24 numbers: 32 of them share whole blocks of 256, so slices are multiples of 32."""
    hidden, weight, targets = case(dtype)
    head = nn.Parameter(Int8Weight.quantize(weight.detach()))
    decoded = head.detach().dequantize(torch.float32).requires_grad_()
    loss = head_loss(hidden, head, targets, 4, products)
    torch.testing.assert_close(loss.double(), exact(hidden, decoded, targets)[0], rtol=1e-6, atol=0)
    for found, truth in zip(grads(loss, hidden, head), exact(hidden, decoded, targets)[1:], strict=True):
        assert found.dtype == dtype
        assert error(found, truth) < (2**-8 if dtype == BF16 else 1e-6)


def test_under_autocast_products_are_narrow_and_gradients_have_their_tensors_dtype() -> None:
    """fp32 weights: as exact as `nn.functional.linear` under autocast and torch's cross-entropy, and a rounding of bf16. float64 stays."""
    hidden, weight, targets = case(torch.float32)
    with torch.autocast("cpu", BF16):
        assert products_on("cpu", torch.float32).dtype == BF16
        assert products_on("cpu", torch.float64).dtype == torch.float64
        loss = head_loss(hidden, weight, targets, 4)
        logits = nn.functional.linear(hidden, weight)
        whole = nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    assert products_on("cpu", torch.float32).dtype == torch.float32
    assert loss.dtype == torch.float32
    truth, *expected = exact(hidden, weight, targets)
    assert error(loss.detach(), truth) <= error(whole.detach(), truth) + 2**-8
    assert error(loss.detach(), truth) > 1e-7, "products in fp32 would be closer"
    for mine, theirs, right in zip(grads(loss, hidden, weight), grads(whole, hidden, weight), expected, strict=True):
        assert mine.dtype == torch.float32
        assert error(mine, right) <= error(theirs, right) + 2**-8


def test_hidden_states_of_another_dtype_get_a_gradient_of_theirs() -> None:
    """As under autocast, where the last layer may leave bf16 before an fp32 head."""
    hidden, weight, targets = case(torch.float32)
    narrow = hidden.detach().to(BF16).requires_grad_()
    found = grads(head_loss(narrow, weight, targets, 4), narrow, weight)
    assert [grad.dtype for grad in found] == [BF16, torch.float32]
    for grad, truth in zip(found, exact(narrow, weight, targets)[1:], strict=True):
        assert error(grad, truth) < 2**-8
