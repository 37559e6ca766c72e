"""Who owns a fused gradient: only its optimizer steps on it, nothing it holds keeps a model alive, copies and conversions keep working."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.optim.fused_backward import attachment_of
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad

MODES = ["project", "update"]


def model_of(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48, bias=bias), nn.Linear(48, 32, bias=bias))


def optimizer_of(model: nn.Module, lr: float = 1e-2, **settings: Any) -> g.GaLoreAdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "rank": 4}, *([{"params": rest}] if rest else [])]
    return g.GaLoreAdamW(groups, lr=lr, compile=False, **settings)


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


OTHERS: dict[str, Any] = {
    "ours": optimizer_of,
    "torch's, foreach": lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0),
    "torch's, one by one": lambda model: torch.optim.SGD(model.parameters(), foreach=False),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_another_optimizer_cannot_step_on_them(mode: str, other: str) -> None:
    """The error names remove(), no weight moves, and after remove() and zero_grad() the second optimizer trains."""
    model = model_of()
    first = optimizer_of(model)
    attached = g.fused_backward(model, first, mode)
    second = OTHERS[other](model)
    backward(model)
    before = values(model)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"remove\(\)"):
        second.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    attached.remove()
    second.zero_grad()
    backward(model)
    second.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_an_optimizer_that_is_gone_are_refused_and_its_hooks_do_nothing(mode: str) -> None:
    model = model_of()
    first = optimizer_of(model)
    g.fused_backward(model, first, mode)
    backward(model)
    del first
    gc.collect()
    second = optimizer_of(model)
    with pytest.raises(ValueError, match=r"an optimizer that is gone.*zero_grad\(\)"):
        second.step()
    second.zero_grad()
    backward(model)
    assert [type(p.grad) for p in model.parameters()] == [torch.Tensor] * 2
    before = values(model)
    second.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    g.fused_backward(model, second, mode)  # a dead attachment is none
    second.zero_grad()
    backward(model)
    assert all(isinstance(p.grad, LowRankGrad | ConsumedGrad) for p in model.parameters())


@pytest.mark.parametrize("modes", [("project", "project"), ("project", "update")])
def test_two_optimizers_each_fused_with_its_half_of_the_model(modes: tuple[str, str]) -> None:
    """Oracle: the same two without fusing."""

    def trained(fused: bool) -> list[torch.Tensor]:
        model = model_of()
        halves = [optimizer_of(model[0]), optimizer_of(model[1], lr=1e-3)]
        attached = [g.fused_backward(model, half, mode) for half, mode in zip(halves, modes, strict=True)] if fused else []
        for step in range(4):
            backward(model, step)
            for half in halves:
                half.step()
                half.zero_grad()
        for attachment in attached:
            attachment.remove()
        return values(model)

    for p, q in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("end", ["step", "zero_grad", "remove", "nothing"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_freed_with_its_last_user(mode: str, quantised: bool, end: str) -> None:
    model = model_of()
    if quantised:
        g.quantize_linears(model, targets="all-linear")
    optimizer = optimizer_of(model)
    attached = g.fused_backward(model, optimizer, mode)
    for _ in range(1 if mode == "update" else 2):
        backward(model)
    if end == "step":
        optimizer.step()
    elif end == "zero_grad":
        optimizer.zero_grad()
    elif end == "remove":
        attached.remove()
    watched = weakref.ref(optimizer)
    weights = [weakref.ref(p) for p in model.parameters()]
    del model, optimizer, attached
    gc.collect()
    assert watched() is None
    assert [weight() for weight in weights] == [None, None]


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_not_fused(mode: str) -> None:
    """Copied or saved, a model is an ordinary one, which can be fused with an optimizer of its own; the original stays fused."""
    model = model_of()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, mode)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(attachment_of(p) is None for p in twin.parameters())
        backward(twin)
        assert [type(p.grad) for p in twin.parameters()] == [torch.Tensor] * 2
        twin.zero_grad()
        own = optimizer_of(twin)
        g.fused_backward(twin, own, mode)
        backward(twin)
        own.step()
    both = copy.deepcopy((model, optimizer))
    backward(both[0])
    both[1].step()
    backward(model)
    assert all(isinstance(p.grad, LowRankGrad | ConsumedGrad) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hooks_follow_a_quantised_model_to_another_dtype_and_remove_ends_them(dtype: torch.dtype) -> None:
    model = g.quantize_linears(model_of(), targets="all-linear")
    optimizer = g.QGaLoreAdamW8bit([{"params": list(model.parameters()), "rank": 4}], compile=False)
    attached = g.fused_backward(model, optimizer)
    for kind in (torch.float32, dtype, torch.float32):
        model.to(kind)
        backward(model)
        assert all(isinstance(p.grad, LowRankGrad) for p in model.parameters())
        before = [p.dequantize() for p in model.parameters()]
        optimizer.step()
        assert not any(torch.equal(p.dequantize(), old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.zero_grad()
    attached.remove()
    backward(model)
    assert [type(p.grad) for p in model.parameters()] == [torch.Tensor] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_converted_while_gradients_stand_in(mode: str) -> None:
    model = model_of()
    optimizer = optimizer_of(model, basis_codec="fp32")
    g.fused_backward(model, optimizer, mode)
    backward(model)
    low = [p.grad.low for p in model.parameters()] if mode == "project" else []  # type: ignore[union-attr]
    model.to(torch.bfloat16)
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in model.parameters())  # type: ignore[union-attr]
    for p, R in zip(model.parameters(), low, strict=False):
        assert torch.equal(p.grad.low, R)  # type: ignore[union-attr]
        assert p.grad.low.dtype == torch.float32  # type: ignore[union-attr]
    before = values(model)
    optimizer.step()
    assert mode == "update" or not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
def test_clipping_and_zeroing_in_either_form(foreach: bool) -> None:
    """Oracle: the norm and the clipped low-rank gradients by hand."""
    model = model_of(bias=True)
    optimizer = optimizer_of(model, foreach=foreach)
    g.fused_backward(model, optimizer)
    backward(model)
    parts = [p.grad.low.clone() if isinstance(p.grad, LowRankGrad) else p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    norm = torch.stack([part.norm() for part in parts]).norm()
    found = nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 3, foreach=foreach)
    torch.testing.assert_close(found, norm)
    for p, part in zip(model.parameters(), parts, strict=True):
        torch.testing.assert_close(p.grad.low if isinstance(p.grad, LowRankGrad) else p.grad, part / 3)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.low.abs().sum() == 0 if isinstance(p.grad, LowRankGrad) else p.grad.abs().sum() == 0 for p in model.parameters())  # type: ignore[union-attr]
    backward(model)
    torch.testing.assert_close(nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=foreach), norm, rtol=1e-2, atol=0)  # type: ignore[misc]


def test_a_foreach_zero_grad_after_updates_in_the_backward_pass() -> None:
    model = model_of(bias=True)
    optimizer = optimizer_of(model, foreach=True)
    g.fused_backward(model, optimizer, "update")
    for step in range(2):
        backward(model, step)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()


@pytest.mark.dist
@pytest.mark.parametrize("mode", MODES)
def test_a_wrapper_that_the_attachment_has_not_seen_is_refused_by_name(mode: str, tmp_path: Any) -> None:
    """Fused before there were processes: nothing tells it of the wrapper until the first gradient, which must not be used."""
    model = model_of()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, mode)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = values(model)
        with pytest.raises(ValueError, match=r"DistributedDataParallel that fused_backward has not seen.*init_process_group\(\) before"):
            backward(wrapped)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", [*MODES, "direct"])
@pytest.mark.parametrize("exchange", ["assign", "to_empty", "by hand"])
def test_parameters_that_the_model_exchanged_are_an_error_of_the_step(exchange: str, mode: str) -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, mode)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    if exchange == "assign":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    elif exchange == "to_empty":
        model.to_empty(device="meta")
    else:
        model[1].weight = torch.nn.Parameter(model[1].weight.detach().clone())
    if exchange != "to_empty":
        backward(model)
    before = [state["step"] for state in optimizer.state.values()]
    with pytest.raises(ValueError, match=r"[01]\.weight is another parameter now.*load_state_dict\(assign=True\).*Call them first"):
        optimizer.step()
    assert exchange == "by hand" or [state["step"] for state in optimizer.state.values()] == before


@pytest.mark.parametrize("moved", [True, False])
def test_a_layer_that_is_taken_out_or_has_another_place_is_no_error(moved: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    first, second = (layer.weight for layer in model)
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "project")
    if moved:
        model[0].weight, model[1].weight = second, first
    else:
        model[1] = nn.Identity()
    backward(model)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (first, second)] == [1, int(moved)]
