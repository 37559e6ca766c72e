"""An INT8 weight as a tensor: reads see its decoded values, and no write is lost. Oracle: the decoded copy, an ordinary tensor."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import galore_torch as g
from galore_torch.ops.int8_weight import Int8Weight


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(Int8Weight.quantize(torch.randn(32, 24)))


WRITES: dict[str, Callable[[Any], Any]] = {
    "w[0] = 0": lambda w: w.__setitem__(0, 0.0),
    "w[mask] = 0": lambda w: w.__setitem__(torch.eye(32, 24) > 0, 0.0),
    "w[0][1:3] += 1": lambda w: w[0][1:3].add_(1),
    "view": lambda w: w.view(-1).zero_(),
    "flatten": lambda w: w.flatten().zero_(),
    "reshape": lambda w: w.reshape(4, -1).zero_(),
    "t": lambda w: w.t().mul_(2),
    "mT": lambda w: w.mT.mul_(2),
    "narrow": lambda w: w.narrow(0, 0, 4).zero_(),
    "unbind": lambda w: w.unbind(0)[1].zero_(),
    "iteration": lambda w: next(iter(w)).zero_(),
    "diagonal": lambda w: w.diagonal().zero_(),
    "fill_diagonal_": lambda w: w.fill_diagonal_(0.0),
    "as_strided": lambda w: w.as_strided((4,), (1,)).zero_(),
    "data": lambda w: w.data.zero_(),
    "data[0]": lambda w: w.data[0].zero_(),
    "detach().t()": lambda w: w.detach().t().zero_(),
    "another dtype": lambda w: w.view(torch.int32).zero_(),
    "scatter_": lambda w: w[0].scatter_(0, torch.tensor([1]), 1.0),
    "foreach": lambda w: torch._foreach_mul_([w[0], w[1]], 2.0),
    "out=": lambda w: torch.add(torch.zeros(24), 1.0, out=w[0]),
    "init": lambda w: nn.init.orthogonal_(w),
    "div_": lambda w: w.div_(2),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_through_a_view_is_an_error_that_names_the_cure(name: str, weight: nn.Parameter) -> None:
    before = [tensor.clone() for tensor in weight.stored]
    with torch.no_grad(), pytest.raises(ValueError, match=r"would write to an INT8 weight.*copy_.*dequantize_linears"):
        WRITES[name](weight)
    assert all(torch.equal(new, old) for new, old in zip(weight.stored, before, strict=True))


def test_numpy_reads_and_cannot_write(weight: nn.Parameter) -> None:
    for tensor in (weight.detach(), weight.detach()[0]):
        array = tensor.numpy()
        assert not array.flags.writeable
        assert array.tolist() == tensor.tolist()
    with pytest.raises(RuntimeError, match="requires grad"):
        weight.numpy()


def test_whole_values_are_written_to_the_nearest_code(weight: nn.Parameter) -> None:
    """copy_, ``weight.data = values`` and vector_to_parameters: as quantising the values does."""
    values = torch.randn(32, 24)
    expected = Int8Weight.quantize(values).dequantize()
    for write in (
        lambda: weight.copy_(values),
        lambda: setattr(weight, "data", values),
        lambda: nn.utils.vector_to_parameters(values.flatten(), [weight]),
        lambda: setattr(weight, "data", Int8Weight.quantize(values)),
    ):
        with torch.no_grad():
            weight.copy_(torch.zeros(32, 24))
            write()
        assert torch.equal(weight.dequantize(), expected)
        assert isinstance(weight, Int8Weight)
    for other in (torch.zeros(24, 32), torch.zeros(32, 24, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"cannot become that of an INT8 weight of shape \(32, 24\)"):
            weight.data = other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_lost(value: float, weight: nn.Parameter) -> None:
    """One would make its whole block NaN."""
    before = weight.dequantize()
    values = torch.randn(32, 24)
    values[3, 3] = value
    for write in (lambda: weight.copy_(values), lambda: setattr(weight, "data", values), lambda: Int8Weight.quantize(values)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"of shape \(32, 24\) are not finite: INT8 cannot"):
            write()
    layer = nn.Linear(24, 32, bias=False)
    layer.weight = weight
    with pytest.raises(RuntimeError, match="are not finite: INT8 cannot"):
        layer.load_state_dict({"weight": values})
    assert torch.equal(weight.dequantize(), before)


def test_views_read_and_differentiate_like_the_decoded_weight(weight: nn.Parameter) -> None:
    plain = nn.Parameter(weight.dequantize().detach())
    X = torch.randn(5, 24)
    for read in (
        lambda w: X @ w.t(),
        lambda w: w[3] * 2 + w[:, 1].sum(),
        lambda w: torch.cat([w[0], w.view(-1)[5:9]]),
        lambda w: w.expand(2, 32, 24).mean((1, 2)),
        lambda w: torch.einsum("ij,kj->ik", w, X),
        lambda w: w.contiguous().view(-1) * 3,
        lambda w: torch.stack([row.exp() for row in w.unbind(0)]),
    ):
        outputs = []
        for w in (weight, plain):
            w.grad = None
            out = read(w)
            assert type(out) is Tensor
            out.square().sum().backward()
            outputs.append((out.detach(), w.grad))
        for found, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(found, expected)
    assert weight[0][1].item() == plain[0, 1].item()


def test_a_view_is_copied_and_saved_as_an_ordinary_tensor(weight: nn.Parameter) -> None:
    row, file = weight.detach()[2], io.BytesIO()
    torch.save({"row": row}, file)
    file.seek(0)
    for again in (copy.deepcopy(row), pickle.loads(pickle.dumps(row)), torch.load(file)["row"], row.clone(), row.contiguous()):
        assert type(again) is Tensor
        assert torch.equal(again, weight.dequantize()[2])


@pytest.mark.filterwarnings("ignore:Int8Weight does not implement _stable_hash_for_caching")
def test_views_compile(weight: nn.Parameter) -> None:
    compiled = torch.compile(lambda w: w.t()[0] * 2 + w.sum(), backend="aot_eager")
    plain = weight.dequantize()
    torch.testing.assert_close(compiled(weight.detach()), plain.t()[0] * 2 + plain.sum())


def test_other_processes_share_the_codes(weight: nn.Parameter) -> None:
    """What `torch.multiprocessing` hands over is the same memory: a code written on one side is seen on the other."""
    layer = nn.Linear(24, 32, bias=False)
    layer.weight = weight
    assert not weight.is_shared()
    layer.share_memory()
    assert weight.is_shared()
    handed = pickle.loads(ForkingPickler.dumps(weight))
    assert isinstance(handed, Int8Weight)
    with torch.no_grad():
        weight.copy_(torch.ones(32, 24))
    assert torch.equal(handed.dequantize(), torch.ones(32, 24))


def test_conv1d_keeps_nothing_floating_between_the_passes() -> None:
    """GPT-2's linear layer stores its weight transposed. Oracle: the same layer with the decoded weight."""
    Conv1D = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    layer = Conv1D(40, 24)
    plain = copy.deepcopy(layer)
    g.quantize_linears(layer, targets="all-linear")
    with torch.no_grad():
        plain.weight.copy_(layer.weight.dequantize())
    saved: list[Tensor] = []
    for shape in ((24,), (5, 24), (2, 3, 24)):
        inputs = [torch.ones(shape).cumsum(-1).sin().requires_grad_() for _ in range(2)]
        for module, x in zip((layer, plain), inputs, strict=True):
            module.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t if module is layer else t, lambda t: t):  # noqa: B023
                out = module(x)
            out.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert saved
    assert not [tensor for tensor in saved if tensor.shape in ((24, 40), (40, 24))]
