"""Leading dimensions are a batch: the weights of E experts (E x m x n) train as E matrices do.

Oracle: E separate parameters, each with the same optimizer.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import galore_torch as g
from galore_torch.choices import PROJ_TYPES
from galore_torch.engine.layout import make_layout, matrices
from galore_torch.engine.recipe import PROJECTION_DEFAULTS, RECIPES
from galore_torch.slots.projectors import PROJECTORS

E, SHAPE = 3, (24, 40)
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (g.GaLoreAdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adafactor": (g.GaLoreAdafactor, {"lr": 0.02, "weight_decay": 0.1}),
    "adafactor, relative": (g.GaLoreAdafactor, {"beta1": 0.9, "weight_decay": 0.1}),
    "adagrad": (g.GaLoreAdagrad, {"lr": 0.05}),
    "sgd": (g.GaLoreSGD, {"lr": 0.05, "momentum": 0.9}),
    "any class": (lambda params, **kwargs: g.GaLore(torch.optim.Adafactor, params, **kwargs), {"lr": 0.01}),
    "any counter": (lambda params, **kwargs: g.GaLore(torch.optim.NAdam, params, **kwargs), {"lr": 0.01}),
}


def gradients(steps: int, shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of experts whose gradients differ by two orders of magnitude, in subspaces that drift."""
    common, sizes = torch.randn(E, *shape), torch.tensor([0.1, 1.0, 10.0]).view(E, 1, 1)
    return [(sizes * (common + 0.1 * torch.randn(E, *shape))).to(dtype) for _ in range(steps)]


def trained(make: Any, grads: list[Tensor], dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(the batch, the separate matrices) after the same steps from the same weights."""
    settings = {"rank": 6, "update_proj_gap": 3, "min_8bit_size": 0, "compile": False, **kwargs}
    start = torch.randn(grads[0].shape).to(dtype)
    together, apart = Parameter(start.clone()), [Parameter(matrix.clone()) for matrix in start]
    one, others = make([together], **settings), [make([p], **settings) for p in apart]
    for G in grads:
        together.grad = G.clone()
        one.step()
        for p, optimizer, grad in zip(apart, others, G, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    return together.detach(), torch.stack([p.detach() for p in apart])


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_experts_train_as_separate_matrices(rule: str, proj_type: str) -> None:
    make, hyper = RULES[rule]
    for shape in (SHAPE, SHAPE[::-1]):
        together, apart = trained(make, gradients(8, shape), proj_type=proj_type, **hyper)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projector", [name for name, row in PROJECTORS.items() if row.find is not None and row.modes is None])
@pytest.mark.parametrize("transport", ["rotate", "reset", "keep"])
def test_every_projector_and_transport(projector: str, transport: str) -> None:
    if transport == "rotate" and PROJECTORS[projector].overlap is None:
        pytest.skip("moments do not turn between bases that are not orthonormal")
    make, hyper = RULES["adamw"]
    together, apart = trained(make, gradients(8), projector=projector, transport=transport, **hyper)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize(("state_codec", "basis_codec"), [("int8", "bf16"), ("int8", "int4"), ("fp32", "bf16")])
def test_quantised_state(state_codec: str, basis_codec: str, rule: str) -> None:
    make, hyper = RULES[rule]
    together, apart = trained(make, gradients(8), state_codec=state_codec, basis_codec=basis_codec, **hyper)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "sgd"])
def test_bf16_weights(rule: str) -> None:
    make, hyper = RULES[rule]
    together, apart = trained(make, gradients(8, dtype=torch.bfloat16), torch.bfloat16, stochastic_rounding=False, **hyper)
    torch.testing.assert_close(together.float(), apart.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rule", ["adamw", "adafactor"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_expert_without_tokens_waits_for_its_first_gradient(rule: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero gradients at first, and at a refresh: that expert's basis is made later, those of the others are not touched."""
    if masked:  # the path of a device that the host cannot read
        from galore_torch.engine import refresh
        from galore_torch.ops import linalg

        for module in (linalg, refresh):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    make, hyper = RULES[rule]
    grads = gradients(10)
    for t, expert in ((0, 1), (1, 1), (3, 2), (6, 0)):
        grads[t][expert] = 0
    together, apart = trained(make, grads, projector="svd", **hyper)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["project", "update"])
def test_fused_backward_with_micro_batches(mode: str) -> None:
    """Oracle: the same steps without it. In "project" an expert that the first micro-batch leaves out gets its basis from the second."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = Parameter(torch.randn(E, *SHAPE))

        def forward(self, x: Tensor, used: list[int]) -> Tensor:
            return torch.stack([x @ self.weight[i] for i in used])

    def run(fused: bool) -> Tensor:
        model, generator = Experts(), torch.Generator().manual_seed(1)
        optimizer = g.GaLoreSGD(model.parameters(), lr=0.01, rank=6, update_proj_gap=2, projector="svd")
        attached = g.fused_backward(model, optimizer, mode) if fused else None
        for _ in range(5):
            for used in [[0, 2], [0, 1, 2]] if mode == "project" else [[0, 1, 2]]:
                x = torch.randn(7, SHAPE[0], generator=generator)
                if used == [0, 1, 2] and mode == "project":
                    x = x * 1e-3  # so that the first micro-batch decides on the subspaces of those it used
                model(x, used).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if attached:
            attached.remove()
        return model.weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-3, atol=1e-3)


def test_which_tensors_are_batches() -> None:
    assert matrices((8, 128, 64)) == (8, 128, 64)
    assert matrices((8, 16, 64)) == (8, 16, 64)
    assert matrices((768, 48, 3)) == (768, 144), "a 1-D convolution's kernel"
    assert matrices((64, 3, 16, 16)) == (64, 768), "a patch embedding's"
    assert matrices((768, 48, 128), batch_dims=0) == (768, 6144), "a long kernel, said so"
    assert matrices((4, 8, 128, 64), batch_dims=2) == (32, 128, 64)
    assert matrices((128, 64), batch_dims=1) == (128, 64), "a matrix in a group of experts"
    assert matrices((5,)) == (5,)


def test_batch_dims_as_a_group_key() -> None:
    """The state follows it, and another number of it is refused."""
    group = {**PROJECTION_DEFAULTS, **RECIPES["galore_adamw"].group_keys(), "rank": 8}
    assert make_layout((4, 32, 64), torch.float32, group).low_shape == (4, 8, 64)
    assert make_layout((64, 32, 64), torch.float32, {**group, "batch_dims": 0}).low_shape == (8, 2048)
    for bad in (-1, 1.5, "two"):
        with pytest.raises(ValueError, match="batch_dims"):
            g.GaLoreAdamW([Parameter(torch.zeros(4, 32, 64))], rank=8, batch_dims=bad)


def test_the_state_resumes_bit_by_bit() -> None:
    grads = gradients(8)

    def make() -> tuple[Parameter, Any]:
        W = Parameter(torch.ones(E, *SHAPE))
        return W, g.GaLoreAdamW8bit([W], lr=0.01, rank=6, update_proj_gap=3, min_8bit_size=0)

    W, optimizer = make()
    for t, G in enumerate(grads):
        if t == 4:
            saved, weights = optimizer.state_dict(), W.detach().clone()
            W, optimizer = make()
            optimizer.load_state_dict(saved)
            W.data.copy_(weights)
        W.grad = G.clone()
        optimizer.step()
    V, straight = make()
    for G in grads:
        V.grad = G.clone()
        straight.step()
    assert torch.equal(W, V)


def test_an_older_checkpoint_whose_experts_were_one_matrix_goes_on_with_it() -> None:
    """Its groups know no batch_dims. Oracle: the run that never stopped."""
    grads = gradients(8, (40, 48))

    def train(W: Parameter, optimizer: Any, part: list[Tensor]) -> None:
        for G in part:
            W.grad = G.clone()
            optimizer.step()

    W = Parameter(torch.ones(E, 40, 48))
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=2, update_proj_gap=3, batch_dims=0)
    train(W, optimizer, grads[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["batch_dims"]
    V = Parameter(W.detach().clone())
    fresh = g.GaLoreAdamW([V], lr=0.01, rank=2, update_proj_gap=3)
    fresh.load_state_dict(saved)
    train(W, optimizer, grads[4:])
    train(V, fresh, grads[4:])
    assert torch.equal(W, V)
