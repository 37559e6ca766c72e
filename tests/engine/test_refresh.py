"""A refresh gives the same basis however the gradient comes: compiled, 16-bit, transposed; and never from one that is not finite."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from galore_torch import GaLoreAdamW, GaLoreMuon
from galore_torch.slots.projectors import PROJECTORS

EACH = [name for name, row in PROJECTORS.items() if row.find is not None and row.modes is None]
each_projector = pytest.mark.parametrize("projector", EACH)


def settings_of(projector: str) -> dict[str, Any]:
    turns = PROJECTORS[projector].overlap is not None
    return {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "projector": projector, "transport": "rotate" if turns else "keep"}


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(shape, generator=generator)
    return [common + 0.2 * torch.randn(shape, generator=generator) for _ in range(steps)]


def basis_of(optimizer: GaLoreAdamW) -> Tensor:
    (state,) = optimizer.state.values()
    return state["basis_seed" if "basis_seed" in state else "basis"]


def run(W: Parameter, grads: list[Tensor], projector: str, **settings: Any) -> GaLoreAdamW:
    optimizer = GaLoreAdamW([W], **settings_of(projector), **settings)
    for G in grads:
        W.grad = G
        optimizer.step()
    return optimizer


@each_projector
def test_under_a_compiled_training_step(projector: str) -> None:
    """Forward, backward and step() inside one torch.compile, over three gaps. Oracle: the same without it."""

    def train(wrap: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        layer, X = nn.Linear(20, 12, bias=False), torch.randn(9, 32, 20)
        optimizer = GaLoreAdamW(layer.parameters(), **settings_of(projector))

        def step(x: Tensor) -> None:
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        compiled = wrap(step)
        for x in X:
            compiled(x)
        return layer.weight.detach(), basis_of(optimizer)

    plain = train(lambda step: step)
    torch._dynamo.reset()
    compiled = train(lambda step: torch.compile(step, backend="aot_eager"))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projector", [name for name in EACH if not PROJECTORS[name].follows])  # a moment is of bf16 products
def test_a_bf16_gradient_gives_the_basis_of_its_fp32_value(projector: str) -> None:
    grads = [G.bfloat16() for G in gradients((12, 20), 7)]
    short = run(
        Parameter(torch.zeros(12, 20, dtype=torch.bfloat16)),
        grads,
        projector=projector,
        **({} if PROJECTORS[projector].basis else {"basis_codec": "fp32"}),
    )
    full = run(Parameter(torch.zeros(12, 20)), [G.float() for G in grads], projector=projector)
    assert basis_of(short).dtype == basis_of(full).dtype
    torch.testing.assert_close(basis_of(short), basis_of(full))


@each_projector
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize(
    ("weight", "grad"), [w for w in itertools.product(("transposed", "strided", "plain"), repeat=2) if w != ("plain",) * 2]
)
def test_whatever_the_strides_of_weight_and_gradient(projector: str, shape: tuple[int, int], weight: str, grad: str) -> None:
    def laid_out(value: Tensor, how: str) -> Tensor:
        if how == "transposed":
            return value.T.contiguous().T
        return torch.stack([value, value], -1)[..., 0] if how == "strided" else value

    start, grads = torch.randn(shape), gradients(shape, 7)
    plain = Parameter(start.clone())
    other = Parameter(laid_out(start.clone(), weight))
    strides = other.stride()
    bases = [basis_of(run(W, gs, projector=projector)) for W, gs in ((plain, grads), (other, [laid_out(G, grad) for G in grads]))]
    torch.testing.assert_close(bases[1], bases[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    assert other.stride() == strides


@pytest.mark.parametrize("projector", [name for name in EACH if PROJECTORS[name].looks and not PROJECTORS[name].follows])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_never_from_a_gradient_that_is_not_finite(projector: str, value: float) -> None:
    """The refresh is due at step 3 and meets a bad gradient: it happens at the next good one, from that one alone."""
    grads = gradients((12, 20), 5)
    spoilt = [G.clone() for G in grads]
    spoilt[3][5, 7] = value
    before = basis_of(run(Parameter(torch.zeros(12, 20)), grads[:3], projector=projector)).clone()
    optimizer = run(Parameter(torch.zeros(12, 20)), spoilt[:4], projector=projector)
    assert torch.equal(basis_of(optimizer), before)
    (W,) = optimizer.state
    W.grad = spoilt[4]
    optimizer.step()
    fresh = run(Parameter(torch.zeros(12, 20)), spoilt[4:], projector=projector)
    torch.testing.assert_close(basis_of(optimizer), basis_of(fresh))
    assert W.isfinite().all()


@pytest.mark.parametrize("projector", [name for name in EACH if not PROJECTORS[name].looks])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_does_not_look_at_the_gradient_takes_its_turn_whatever_that_is(projector: str, value: float) -> None:
    """A gradient of zeros, or not finite, at every refresh but the first: the same subspaces as without. Oracle: that run."""
    grads = gradients((12, 20), 10)
    spoilt = [G * value if t % 3 == 0 and t else G for t, G in enumerate(grads)]
    seen = []
    for t in range(1, 11):
        bases = [basis_of(run(Parameter(torch.zeros(12, 20)), given[:t], projector=projector)) for given in (grads, spoilt)]
        assert torch.equal(*bases)
        seen.append(bases[0])
    assert len({tuple(basis.flatten().tolist()) for basis in seen}) > 2, "they do change"


def test_the_random_bases_of_golore_change_whatever_the_gradient() -> None:
    grads = gradients((12, 20), 10)
    spoilt = [G * 0.0 if t % 3 == 0 and t else G for t, G in enumerate(grads)]
    bases = [basis_of(run(Parameter(torch.zeros(12, 20)), given, projector="power", random_after=1)) for given in (grads, spoilt)]
    assert torch.equal(*bases)


def test_rows_of_each_expert_take_turns_though_it_often_has_no_tokens() -> None:
    """Expert 1 has a gradient of zeros at every refresh."""
    W = Parameter(torch.randn(2, 16, 20))
    optimizer = GaLoreAdamW([W], **settings_of("rows"), batch_dims=1)
    firsts = []
    for t in range(12):
        W.grad = torch.randn(W.shape)
        if t % 3 == 0:
            W.grad[1] = 0.0
        optimizer.step()
        firsts.append(optimizer.state[W]["basis"][:, 0].tolist())
    assert firsts[::3] == [[0, 0], [4, 4], [8, 8], [12, 12]]


MU = 0.95  # of Muon


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_momentum_outlives_a_gradient_that_is_zero_or_not_finite(
    batch: tuple[int, ...], value: float, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon's M follows A = G + mu P M. Oracle: the recursion in full size, for gradients of a rank that the subspace holds."""
    if masked:
        from galore_torch.engine import refresh
        from galore_torch.ops import linalg

        for module in (linalg, refresh):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    A, B = torch.zeros(*batch, 32, 48), torch.zeros(*batch, 32, 48)
    A[..., range(4), range(4)] = torch.tensor([1.0, 0.5, 0.2, 0.1])
    B[..., range(4), range(4)] = torch.tensor([0.0, 0.1, 0.5, 0.3])
    W = Parameter(torch.zeros(*batch, 32, 48))
    optimizer = GaLoreMuon([{"params": [W], "rank": 4, "batch_dims": len(batch)}], lr=1e-3, state_codec="fp32", basis_codec="fp32")
    M = torch.zeros_like(A)
    odd = torch.zeros_like(A) if value == 0.0 else torch.where(A == 1.0, value, A)
    if batch:  # of one expert alone
        odd[0] = A[0]
    for G in [A] * 10 + [odd] + [B] * 3:
        W.grad = G.clone()
        optimizer.step()
        M = MU * M + G if G.isfinite().all() else M  # a batch is one parameter
        state = optimizer.state[W]
        assert bool(state["basis_ready"].all())
        torch.testing.assert_close(state["basis"] @ state["momentum_buffer"], M, rtol=1e-4, atol=1e-4)
    assert W.isfinite().all()


def test_optimizers_of_one_parameter_each_take_turns_and_a_resumed_one_keeps_its_turn() -> None:
    """As layer-wise frameworks make them: no step carries all refreshes."""

    def refreshed(optimizer: torch.optim.Optimizer, p: Parameter, steps: int = 40) -> list[int]:
        seen = []
        for step in range(steps):
            old = optimizer.state[p]["basis"].clone()
            p.grad = torch.randn(p.shape)
            optimizer.step()
            if not torch.equal(optimizer.state[p]["basis"], old):
                seen.append(step)
        return seen

    def make(p: Parameter) -> GaLoreAdamW:
        return GaLoreAdamW([{"params": [p], "rank": 4, "update_proj_gap": 20}], compile=False)

    weights = [Parameter(torch.randn(24, 16)) for _ in range(32)]
    optimizers = [make(p) for p in weights]
    turns = [next(step for step in refreshed(optimizer, p) if step) for optimizer, p in zip(optimizers, weights, strict=True)]
    assert turns[:8] == [20] * 8, "few are compared, and have one schedule"
    assert len(set(turns[8:])) >= 18
    assert max(turns[8:].count(turn) for turn in turns) <= 2
    later = [make(p) for p in weights[:8]]
    assert [optimizer.state[p]["index"] for optimizer, p in zip(later, weights, strict=False)] == [0] * 8
    later[0].load_state_dict(optimizers[9].state_dict())
    assert later[0].state[weights[0]]["index"] == 9
