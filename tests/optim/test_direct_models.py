"""mode="direct" in the hands of others: torch's own tools around a layer and a pass. Oracle: mode="project", or the plain model."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import galore_torch as g
from galore_torch.ops.outer import OuterProduct
from support.failing import Fails

Step = Callable[[nn.Module, Any, Tensor, int], None]


class Net(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(24, 32, bias=bias), nn.Linear(32, 24, bias=bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x), inplace=True))  # type: ignore[no-any-return]


def optimizer_of(model: nn.Module, **settings: Any) -> Any:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "rank": 4}]
    if vectors := [p for p in model.parameters() if p.dim() < 2]:
        groups.append({"params": vectors})
    return g.GaLoreAdamW(groups, **{"lr": 1e-2, "update_proj_gap": 5, "compile": False} | settings)


def inputs(steps: int = 12, shape: tuple[int, ...] = (4, 7, 24)) -> Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def weights_after(mode: str, step: Step, data: Tensor, net: Callable[[], nn.Module] = Net, **settings: Any) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = net()
    optimizer = optimizer_of(model, **settings)
    model.attachment = g.fused_backward(model, optimizer, mode)  # type: ignore[assignment]
    for i, x in enumerate(data):
        step(model, optimizer, x, i)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_as_in_project(step: Step, data: Tensor | None = None, update: bool = False, **settings: Any) -> None:
    """Weights after twelve steps with two refreshes, in fp64."""
    modes = ("update", "direct_update") if update else ("project", "direct")
    wanted, got = (weights_after(mode, step, inputs() if data is None else data, **settings) for mode in modes)
    for name, value in wanted.items():
        distance = (got[name] - value).norm() / value.norm()
        assert distance < 1e-9, (name, float(distance))


def compiled_by(model: nn.Module) -> Any:
    """The model compiled, once; without Inductor, which changes nothing in what the layers see."""
    called = vars(model).get("compiled")
    if called is None:
        called = vars(model)["compiled"] = torch.compile(model, backend="aot_eager")
    return called


# --- the forward pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (9, 24), (4, 7, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "right"])
def test_inputs_of_any_shape_before_an_activation_in_place(shape: tuple[int, ...], proj_type: str) -> None:
    """Few tokens make a gradient of a small rank, where a basis is free to choose: a projector that looks at no gradient fixes it."""
    assert_as_in_project(plain_step, inputs(shape=shape), proj_type=proj_type, projector="random")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_with_fewer_tokens_than_the_rank_the_gradient_is_the_plain_one_projected(proj_type: str, tokens: int) -> None:
    model = Net()
    optimizer = optimizer_of(model, proj_type=proj_type, update_proj_gap=3)
    g.fused_backward(model, optimizer, "direct")
    for x in inputs(7, (tokens, 24)):
        plain = copy.deepcopy(model)
        plain(x).square().mean().backward()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for layer, other in ((model.a, plain.a), (model.b, plain.b)):
            basis, low = optimizer.state[layer.weight]["basis"], layer.weight.grad.low  # type: ignore[union-attr]
            right = low.shape[0] == layer.weight.shape[0]
            torch.testing.assert_close(low, other.weight.grad @ basis if right else basis.mT @ other.weight.grad)
            torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64))
        optimizer.step()


@pytest.mark.parametrize("proj_type", ["std", "right"])
def test_batches_without_tokens_are_skipped_as_in_project(proj_type: str) -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        model(x[: 0 if i in (0, 5, 7, 10) else 4]).square().sum().backward()
        optimizer.step()

    assert_as_in_project(step, proj_type=proj_type)


def test_factors_without_tokens_are_in_range() -> None:
    empty = OuterProduct(torch.zeros(0, 3), torch.zeros(0, 4))
    is_usable, same = empty.measured()
    assert same is empty
    assert not is_usable
    assert torch.equal(empty.dense(), torch.zeros(3, 4))


# --- the backward pass ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("call", [lambda model: model, compiled_by], ids=["eager", "compiled"])
@pytest.mark.parametrize("proj_type", ["std", "right"])
def test_a_gradient_of_the_input_alone_adds_nothing(proj_type: str, call: Callable[[nn.Module], Any]) -> None:
    """As a saliency map is made, before the pass that trains; also in steps in which the basis is due."""

    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        torch.autograd.grad(call(model)(x.requires_grad_()).square().sum(), x)
        call(model)(x).square().mean().backward()
        optimizer.step()

    assert_as_in_project(step, proj_type=proj_type)


def all_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(model.parameters())


def weights_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """No more than needed: the pass then runs through no node but those of the layers."""
    return [p for p in model.parameters() if p.dim() == 2]


def last_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [weights_of(model, x)[-1]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [lambda model: model, compiled_by], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("named", [all_of, weights_of, last_of, lambda model, x: [x, *weights_of(model, x)]])
@pytest.mark.parametrize("update", [False, True], ids=["direct", "direct_update"])
def test_weights_that_a_pass_names_get_their_gradients(named: Any, bias: bool, update: bool, call: Callable[[nn.Module], Any]) -> None:
    """backward(inputs=[...]) in both of its forms, in steps with and without a refresh; what it leaves out gets none."""

    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        inputs = named(model, x.requires_grad_())
        for _ in range(1 if update else 2):
            loss = call(model)(x).square().mean()
            if i % 2:
                loss.backward(inputs=inputs)
            else:
                torch.autograd.backward(loss, inputs=inputs)
        assert {p for p in model.parameters() if p.grad is not None} == {p for p in inputs if p is not x}
        optimizer.step()

    assert_as_in_project(step, inputs(8), update, net=lambda: Net(bias))


def test_a_weight_with_gradient_hooks_is_warned_of_once_for_neither_they_nor_such_a_pass_find_it() -> None:
    model, _, _optimizer = fused()
    x = inputs(1)[0]
    model.a.weight.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match=r"a\.weight has hooks on its gradient.*mode='project'"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).square().mean().backward()  # it was said once


def test_a_pass_that_failed_leaves_nothing_behind() -> None:
    """It ends when one of the two products of a layer has been differentiated."""

    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        a: Any = model.a
        failing = a(2 * x) + a(Fails.apply(x.clone().requires_grad_()))  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match="out-of-memory"):
            failing.sum().backward()
        plain_step(model, optimizer, x, i)

    assert_as_in_project(step)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [lambda model: model, compiled_by], ids=["eager", "compiled"])
@pytest.mark.parametrize("proj_type", ["std", "right"])
def test_two_forward_passes_before_two_backward_passes(proj_type: str, call: Callable[[nn.Module], Any]) -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        losses = [call(model)(part).square().mean() for part in (x, 2 * x + 1)]
        for loss in losses:
            loss.backward()
        optimizer.step()

    assert_as_in_project(step, proj_type=proj_type)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_whole_input_of_a_compiled_layer_is_freed_with_its_graph() -> None:
    model = Net()
    optimizer = optimizer_of(model, proj_type="right")
    attachment = g.fused_backward(model, optimizer, "direct")
    layer: Any = attachment._direct[model.a.weight]
    torch._dynamo.reset()
    out = compiled_by(model)(inputs(1)[0])
    assert len(layer.kept) == 1
    del out  # no backward pass
    assert not layer.kept
    compiled_by(model)(inputs(1)[0]).sum().backward()
    assert not layer.kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [lambda model: model, compiled_by], ids=["eager", "compiled"])
def test_a_checkpoint_loaded_between_the_passes_is_an_error_where_the_input_is_projected(call: Callable[[nn.Module], Any]) -> None:
    model = Net()
    optimizer = optimizer_of(model, proj_type="right")
    g.fused_backward(model, optimizer, "direct")
    torch._dynamo.reset()
    for x in inputs(4):
        optimizer.zero_grad()
        call(model)(x).square().mean().backward()
        optimizer.step()
    loss = call(model)(inputs(1)[0]).sum()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"basis of layer \w.weight has changed.*load_state_dict"):
        loss.backward()


def test_a_checkpoint_loaded_between_the_passes_gives_the_basis_where_it_is_not() -> None:
    saved: dict[nn.Module, Any] = {}

    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if i == 7:
            optimizer.load_state_dict(saved[model])
        loss.backward()
        optimizer.step()
        if i == 3:
            saved[model] = copy.deepcopy(optimizer.state_dict())

    assert_as_in_project(step, proj_type="left", update_proj_gap=3)


def test_weights_that_are_frozen_between_the_passes_or_for_a_while() -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        model.a.weight.requires_grad_(i not in (3, 5))  # type: ignore[operator,union-attr]
        loss = model(x).square().mean()
        model.b.weight.requires_grad_(i not in (2, 5, 6))  # type: ignore[operator,union-attr]
        loss.backward()
        model.b.weight.requires_grad_(True)  # type: ignore[operator,union-attr]
        optimizer.step()

    assert_as_in_project(step)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", [False, True])
def test_nested_checkpoints(reentrant: bool, update: bool) -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        def inner(x: Tensor) -> Any:
            return checkpoint(model, x, use_reentrant=False)

        optimizer.zero_grad()
        checkpoint(inner, x.requires_grad_(), use_reentrant=reentrant).square().mean().backward()
        optimizer.step()

    assert_as_in_project(step, update=update)


def test_a_layer_in_a_reentrant_checkpoint_and_outside_of_it() -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        model(checkpoint(model, x.requires_grad_(), use_reentrant=True)).square().mean().backward()
        optimizer.step()

    assert_as_in_project(step)


def test_hooks_of_the_layers_see_and_change_what_they_see_in_a_plain_layer() -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        a: Any = model.a
        b: Any = model.b
        handles = [
            a.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,)),
            b.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] / 2,)),
            b.register_forward_hook(lambda module, inputs, out: 2 * out),
            b.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
        ]
        plain_step(model, optimizer, x.requires_grad_(), i)
        for handle in handles:
            handle.remove()

    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.silu(self.a(x)))  # type: ignore[no-any-return]

    assert_as_in_project(step, net=Plain)


class Penalised(Net):
    """Its loss reads a weight outside of its layer: the gradient of that part comes last where it is read ``first``."""

    first = False

    def forward(self, x: Tensor) -> Tensor:
        before = self.a.weight.square().sum() / 10 if self.first else torch.zeros(())
        loss = super().forward(x).square().mean()
        return loss + before if self.first else loss + self.a.weight.square().sum() / 10


class PenalisedFirst(Penalised):
    first = True


def penalised_step(call: Callable[[nn.Module], Any]) -> Step:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        call(model)(x).backward()
        optimizer.step()

    return step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:a.weight is used otherwise")
@pytest.mark.parametrize("call", [lambda model: model, compiled_by], ids=["eager", "compiled"])
@pytest.mark.parametrize("net", [Penalised, PenalisedFirst])
def test_a_loss_on_the_weight_itself(net: Callable[[], nn.Module], call: Callable[[nn.Module], Any]) -> None:
    """The layer is given up in the midst of the pass, whose other part still arrives."""
    assert_as_in_project(penalised_step(call), net=net, projector="random")


def test_a_loss_on_a_weight_that_the_pass_has_updated_already_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights_after("direct_update", penalised_step(lambda model: model), inputs(2), PenalisedFirst)


def test_a_mode_changed_between_steps_and_between_the_passes() -> None:
    modes = ("project", "direct", "update", "direct_update", "direct")

    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        attachment: Any = model.attachment
        if attachment.mode != "project" or vars(model).get("changing"):
            vars(model)["changing"] = True
            attachment.remove()
            model.attachment = g.fused_backward(model, optimizer, modes[i % len(modes)])  # type: ignore[assignment]
        loss.backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\w.weight is used otherwise")  # where a forward pass was an ordinary one
        assert_as_in_project(step)


# --- other tools ------------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_layer_that_is_parametrized_later_trains_as_in_project() -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        if i == 2:
            parametrize.register_parametrization(model.a, "weight", Doubled())  # type: ignore[arg-type]
        plain_step(model, optimizer, x, i)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a.weight is used otherwise")
        assert_as_in_project(step)


class Attention(nn.Module):
    """Its output layer's weight is read by a function, never by the layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.out = nn.MultiheadAttention(24, 4, batch_first=True), nn.Linear(24, 24)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("update", [False, True])
def test_attention_of_torch_trains_as_in_project(update: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_as_in_project(plain_step, net=Attention, update=update)


def fused() -> tuple[Net, Net, Any]:
    """A model in mode direct, the same model without it, and the optimizer, which has to live."""
    model = Net()
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, "direct")
    return model, Net(), optimizer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_and_recorded_models_are_plain() -> None:
    model, plain, _optimizer = fused()
    x = inputs(1)[0]
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, x))).tangent
        wanted = torch.autograd.forward_ad.unpack_dual(plain(torch.autograd.forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), plain(x))
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "galore" in str(node.target)]
    torch.testing.assert_close(exported.module()(x), plain(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("proj_type", [pytest.param("std", marks=pytest.mark.slow), "right"])
def test_a_compiled_backward_pass(proj_type: str) -> None:
    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):  # type: ignore[no-untyped-call]
            loss.backward()
        optimizer.step()

    assert_as_in_project(step, inputs(7), proj_type=proj_type, update_proj_gap=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [nn.Parameter, lambda t: t.clone().requires_grad_()], ids=["parameters", "tensors"])
def test_other_weights_in_compiled_layers_get_their_ordinary_gradients(kind: Callable[[Tensor], Tensor]) -> None:
    model, plain, _optimizer = fused()
    x = inputs(1)[0]
    other = {name: kind(p.detach().clone()) for name, p in model.named_parameters()}
    torch._dynamo.reset()
    torch.compile(lambda: torch.func.functional_call(model, other, (x,)).sum(), backend="aot_eager")().backward()
    plain(x).sum().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(other[name].grad, p.grad)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_whose_layer_is_compiled_in_place_is_copied() -> None:
    model, plain, _optimizer = fused()
    model.a.compile()
    twin = copy.deepcopy(model)
    assert type(twin.a) is nn.Linear
    torch.testing.assert_close(twin(inputs(1)[0]), plain(inputs(1)[0]))


@pytest.mark.parametrize("mode", ["project", "direct", "direct_update"])
def test_data_parallel_around_a_model_fused_before_there_were_processes_is_refused(mode: str) -> None:
    model = Net(bias=False)
    optimizer = optimizer_of(model)
    g.fused_backward(model, optimizer, mode)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            wrapped(inputs(1)[0]).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", [pytest.param("direct", marks=pytest.mark.slow), "direct_update"])
def test_no_tensor_stays_behind_in_a_hundred_steps(mode: str) -> None:
    counts = []

    def step(model: nn.Module, optimizer: Any, x: Tensor, i: int) -> None:
        plain_step(model, optimizer, x, i)
        if i in (20, 120):
            gc.collect()
            counts.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))

    weights_after(mode, step, inputs(121))
    assert counts[1] <= counts[0]
