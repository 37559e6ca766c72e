"""The family's rows of the slots against their papers. Oracles: naive transcriptions (tests/references/family.py)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.layout import layout_of
from galore_torch.engine.stored import stored_error
from galore_torch.ops.linalg import switched_basis
from galore_torch.ops.sketch import seeds, sketch
from galore_torch.optim.methods import METHODS
from galore_torch.slots.projectors import PROJECTORS, svd
from references.family import AliceReference, ApolloReference, FoldReference, FrugalReference, LDAdamReference
from references.galore import best_subspace
from support.memory import storage_bytes

SHAPES = [(12, 20), (20, 12)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """They grow and shrink, so that a limiter acts in some steps and not in others."""
    common = torch.randn(shape, dtype=torch.float64)
    return [(0.5 + t % 3) * (common + 0.5 * torch.randn(shape, dtype=torch.float64)) for t in range(steps)]


def basis_of(W: Parameter, optimizer: Any) -> Tensor:
    (stored,) = layout_of(W, optimizer.param_groups[0]).bases.values()
    return stored.decode(optimizer.state[W]).clone()


def follow(W: Parameter, optimizer: Any, reference: Any, grads: list[Tensor], with_basis: bool = False) -> None:
    for G in grads:
        W.grad = G.clone()
        optimizer.step()
        expected = reference.step(G, basis_of(W, optimizer)) if with_basis else reference.step(G)
        torch.testing.assert_close(W.detach(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("projector", ["gaussian", "svd", "power"])
@pytest.mark.parametrize("mini", [False, True])
@each_shape
def test_apollo_equals_the_paper(shape: tuple[int, int], mini: bool, projector: str, weight_decay: float) -> None:
    """Two new bases on the way; the moments stay as they are."""
    W = Parameter(torch.randn(shape).double())
    reference = ApolloReference(W.detach(), 2.0, 0.01, mini, weight_decay)
    settings: dict[str, Any] = {"projector": projector, "transport": "keep", "weight_decay": weight_decay, "update_proj_gap": 3}
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=1 if mini else 4, scale=2.0, recovery="apollo_mini" if mini else "apollo", **settings)
    follow(W, optimizer, reference, gradients(shape, 8), with_basis=True)


@each_shape
def test_alice_equals_the_paper(shape: tuple[int, int]) -> None:
    W, grads = Parameter(torch.randn(shape).double()), gradients(shape, 9)
    reference = AliceReference(W.detach(), grads[0], 4, 0.3, 0.02, (0.9, 0.8))
    settings: dict[str, Any] = {"betas": (0.9, 0.8), "eps": 1e-8, "correct_bias": False, "projector": "svd", "recovery": "alice"}
    follow(W, g.GaLoreAdamW([W], lr=0.02, rank=4, scale=0.3, **settings), reference, grads)


@pytest.mark.parametrize("recovery", ["sign", "rms"])
@each_shape
def test_frugal_equals_the_paper(shape: tuple[int, int], recovery: str) -> None:
    W = Parameter(torch.randn(shape).double())
    reference = FrugalReference(W.detach(), 5, 3, 0.5, 0.01, recovery == "sign")
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=5, update_proj_gap=3, scale=0.5, projector="rows", recovery=recovery)
    follow(W, optimizer, reference, gradients(shape, 10))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "proj_type"), list(itertools.product([(16, 24), (24, 16)], ["left", "right"])))
def test_fold_equals_its_formula(shape: tuple[int, int], proj_type: str, weight_decay: float) -> None:
    W = Parameter(torch.randn(shape, dtype=torch.float64))
    reference = FoldReference(W.detach(), -2 if proj_type == "left" else -1, 4, 0.25, 0.01, weight_decay)
    settings: dict[str, Any] = {"projector": "block_mean", "proj_type": proj_type, "recovery": "fold", "weight_decay": weight_decay}
    follow(W, g.GaLoreAdamW([W], lr=0.01, rank=4, scale=0.25, **settings), reference, gradients(shape, 6))


LDADAM: dict[str, Any] = {"update_proj_gap": 1, "scale": 1.0, "projector": "momentum", "transport": "predict", "carry": "momentum_feedback"}


@each_shape
def test_ldadam_equals_the_paper(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A basis, its transport, and an error that holds what the momentum lost, at every step. A full SVD stands in for the power step."""
    monkeypatch.setitem(PROJECTORS, "momentum", replace(PROJECTORS["momentum"], find=svd))
    W = Parameter(torch.randn(shape).double())
    reference = LDAdamReference(W.detach(), 4, 0.01, (0.9, 0.99))
    follow(W, g.GaLoreAdamW([W], lr=0.01, rank=4, betas=(0.9, 0.99), eps=1e-8, **LDADAM), reference, gradients(shape, 9))


def trained_with(start: Tensor, grads: list[Tensor], **carry: Any) -> tuple[Parameter, Any]:
    W = Parameter(start.clone())
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=32, **{**LDADAM, **carry}, compile=False)
    for G in grads:
        W.grad = G.clone()
        optimizer.step()
    return W, optimizer


# Of 128 normal numbers, which share a scale: 2^-9 / sqrt 3 of each; 1 / 71 of the largest, of 2.7 deviations, over sqrt 12; 1 / 15 of the
# range, of 5.3 deviations, over sqrt 12.
@pytest.mark.parametrize(("codec", "near"), [("bf16", 0.004), ("int8", 0.015), ("int4", 0.12)])
@pytest.mark.parametrize("carry", ["error_feedback", "momentum_feedback"])
def test_an_error_in_codes_is_near_the_exact_one_and_of_its_size(codec: str, near: float, carry: str) -> None:
    """After one step, from which no other rounding came. The size by hand: along the projected side of 128 there is one block."""
    start, grads = torch.randn(128, 256), [torch.randn(128, 256)]
    found = {}
    for each in ("fp32", codec):
        W, optimizer = trained_with(start, grads, carry=carry, carry_codec=each)
        error = stored_error(layout_of(W, optimizer.param_groups[0]), optimizer.param_groups[0])
        assert error is not None
        found[each] = error.decode(optimizer.state[W])
    assert (found[codec] - found["fp32"]).norm() < near * found["fp32"].norm()
    held = sum(optimizer.state[W][key].nbytes for key in error.keys)
    assert held == {"bf16": 2 * 128 * 256, "int8": 128 * 256 + 4 * 256, "int4": 128 * 256 // 2 + 4 * 256}[codec]


def test_eight_bits_of_error_go_nearer_to_exact_feedback_than_four_and_those_nearer_than_none() -> None:
    start, grads = torch.randn(128, 256), [grad.float() for grad in gradients((128, 256), 12)]
    exact, eight, four = (trained_with(start, grads, carry_codec=codec)[0].detach() for codec in ("fp32", "int8", "int4"))
    none = trained_with(start, grads, carry=None)[0].detach()
    assert (eight - exact).norm() < (four - exact).norm() < (none - exact).norm()


def test_a_small_error_keeps_fp32_where_codes_would_save_little() -> None:
    W = Parameter(torch.zeros(32, 48))
    optimizer = g.GaLoreAdamW([W], rank=4, carry="error_feedback", carry_codec="int4")
    assert optimizer.state[W]["error"].dtype == torch.float32


def test_golore_takes_the_gradients_basis_before_the_step_and_a_random_one_after_it() -> None:
    """Oracles: a full SVD of the gradient; the basis of the projector "random" at that step."""
    W, V = (Parameter(torch.randn(12, 20).double()) for _ in range(2))
    golore = g.GaLoreAdamW([W], rank=4, update_proj_gap=2, projector="svd", random_after=3)
    random = g.GaLoreAdamW([V], rank=4, update_proj_gap=2, projector="random")
    for t, G in enumerate(gradients((12, 20), 7)):
        W.grad, V.grad = G.clone(), G.clone()
        golore.step()
        random.step()
        if t % 2 == 0:
            found = basis_of(W, golore)
            expected = basis_of(V, random) if t >= 3 else best_subspace(G, 4, "left")
            torch.testing.assert_close(found @ found.T, expected @ expected.T)


def test_a_switched_basis_keeps_the_strongest_directions_and_draws_the_rest_from_the_complement() -> None:
    G = torch.diag(torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0.5])).double() @ torch.linalg.qr(torch.randn(10, 14).double().T)[0].T
    start = torch.linalg.qr(torch.eye(10, 6).double() + 0.1 * torch.randn(10, 6).double())[0]
    iterated = torch.linalg.qr(G @ G.T @ start)[0]
    _, rotation = torch.linalg.eigh(iterated.T @ G @ G.T @ iterated)
    sorted_span = iterated @ rotation.flip(-1)
    one, other = (switched_basis(G, start, 2, seed) for seed in (1, 2))
    for found in (one, other):
        torch.testing.assert_close(found.T @ found, torch.eye(6).double())
        assert ((found[:, :2].T @ sorted_span[:, :2]).diagonal().abs() > 1 - 1e-9).all()
        assert (sorted_span.T @ found[:, 2:]).abs().max() < 1e-9, "the others lie outside of all that the iteration found"
    torch.testing.assert_close(
        one[:, 2:] @ one[:, 2:].T, other[:, 2:] @ other[:, 2:].T
    )  # the complement has 10 - 6 directions: all of them
    wide = switched_basis(G, torch.linalg.qr(torch.randn(10, 8).double())[0], 2, 1)
    torch.testing.assert_close(wide.T @ wide, torch.eye(8).double())


def test_a_sketch_is_normal_of_variance_1_over_the_rank_and_the_same_for_the_same_seed() -> None:
    P = sketch(seeds((), 7, torch.device("cpu")), 4000, 64, torch.float64)
    assert torch.equal(P, sketch(seeds((), 7, torch.device("cpu")), 4000, 64, torch.float64))
    z = P * 8  # standard normal
    assert abs(float(z.mean())) < 5 / 506
    assert float(z.square().mean()) == pytest.approx(1, abs=5 * 2**0.5 / 506)
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=5 * 96**0.5 / 506)
    correlations = z.T @ z / 4000 - torch.eye(64).double()
    assert correlations.abs().max() < 6 / 4000**0.5
    other = sketch(seeds((), 8, torch.device("cpu")), 4000, 64, torch.float64) * 8
    assert (z.T @ other / 4000).abs().max() < 6 / 4000**0.5
    batch = sketch(torch.tensor([[7], [8]]), 40, 3, torch.float32)
    assert torch.equal(batch[0], sketch(torch.tensor([7]), 40, 3, torch.float32))


def test_apollo_keeps_two_moments_a_seed_and_a_norm() -> None:
    """By hand, of a 48 x 64 weight at rank 12: 8 bytes, a flag and a norm beside the moments; of the 8-bit class the same."""
    for cls, moments in ((g.GaLoreAdamW, 2 * 4 * 12 * 64), (g.GaLoreAdamW8bit, 2 * (12 * 64 + 4 * 12))):
        W = Parameter(torch.zeros(48, 64))
        optimizer = cls([W], rank=12, projector="gaussian", transport="keep", recovery="apollo", min_8bit_size=0)
        assert storage_bytes(optimizer.state[W]) == moments + 8 + 1 + 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"projector": "gaussian"}, "transport='rotate' turns moments .* projector='gaussian' are not: use transport='keep' or 'reset'"),
        ({"projector": "gaussian", "transport": "keep", "basis_codec": "int4"}, "basis_codec='int4' has no effect .* a seed: leave it out"),
        ({"recovery": "apollo", "proj_type": "full"}, "proj_type='full' projects both"),
        ({"recovery": "alice", "proj_type": "full"}, "proj_type='full' projects both"),
        ({"recovery": "fold"}, "recovery='fold' is Adam's step .* projector='block_mean' .* met projector='power'"),
        ({"carry_codec": "int8"}, "carry_codec='int8' has no effect without a carry"),
        ({"carry": "error_feedback", "carry_codec": "int3"}, "carry_codec='int3' is not known"),
        ({"random_after": -1}, "random_after=-1 is not a step"),
        ({"random_after": 5, "projector": "rows"}, "random_after=5 .* met projector='rows'"),
        ({"random_after": 5, "gap_range": (50, 800)}, r"random_after=5 .* gap_range=\(50, 800\)"),
        ({"random_after": 5, "tensor": True}, "random_after=5 .* tensor=True"),
        *[
            ({"recovery": name, "tensor": True}, f"recovery='{name}' is for projected sides of a matrix")
            for name in ("apollo", "sign", "rms")
        ],
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    for where in ({}, settings):
        with pytest.raises(ValueError, match=words):
            g.GaLoreAdamW([{"params": [Parameter(torch.zeros(8, 8))], "rank": 2, **where}], **({} if where else settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transport": "predict"}, "transport='predict' is for the two moments of Adam"),
        ({"recovery": "alice"}, "recovery='alice' is Adam's step .* it needs a class such as GaLoreAdamW"),
        ({"carry": "momentum_feedback"}, "carry='momentum_feedback' follows a first moment, and the rule 'adagrad' has none"),
        ({"projector": "momentum"}, "projector='momentum' follows a first moment, and the rule 'adagrad' has none"),
    ],
)
def test_what_other_rules_have_not_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        g.GaLoreAdagrad([Parameter(torch.zeros(8, 8))], lr=0.1, rank=2, **settings)


@pytest.mark.parametrize("recovery", ["sign", "rms", "alice", "fira", "apollo", "apollo_mini"])
@pytest.mark.parametrize("place", [(1, 3), (9, 3)])
def test_where_a_gradient_is_not_finite_does_not_matter(place: tuple[int, int], recovery: str) -> None:
    """In a row of the set or beside it: nothing moves, neither weight nor state. Signs beside the set answer for themselves."""
    W = Parameter(torch.randn(12, 20))
    optimizer = g.GaLoreAdamW([W], lr=0.1, rank=4, projector="rows", recovery=recovery)
    W.grad = torch.randn(12, 20)
    optimizer.step()
    before = W.detach().clone()
    kept = {key: value.clone() for key, value in optimizer.state[W].items() if isinstance(value, torch.Tensor)}
    W.grad = torch.randn(12, 20)
    W.grad[place] = float("nan")
    optimizer.step()
    if recovery == "sign" and place[0] > 3:
        assert torch.equal(before == W, W.grad.isnan())
        return
    assert torch.equal(W, before)
    assert all(torch.equal(optimizer.state[W][key], value) for key, value in kept.items())


def test_a_column_of_zeros_in_the_rows_of_the_set_takes_nothing_from_the_others() -> None:
    """phi_j = ||N_j|| / ||R_j|| says nothing where R_j is zero: that column's residual is left out, not all of them."""
    for recovery in ("fira", "apollo"):
        W = Parameter(torch.zeros(12, 20))
        optimizer = g.GaLoreAdamW([W], lr=0.1, rank=4, projector="rows", recovery=recovery)
        for t in range(3):
            before = W.detach().clone()
            W.grad = torch.randn(12, 20)
            W.grad[:4, 3] = 0.0 if t == 2 else W.grad[:4, 3]
            optimizer.step()
        expected = torch.ones(12, 20, dtype=torch.bool)
        expected[4 if recovery == "fira" else 0 :, 3] = False
        assert torch.equal(before != W, expected)


@pytest.mark.parametrize("recovery", ["sign", "rms", "alice", "fira", "apollo"])
def test_a_gradient_that_is_skipped_moves_nothing_even_where_what_lies_outside_of_the_subspace_is_finite(recovery: str) -> None:
    """One huge row is all that the basis holds, so that R overflows and the residual does not."""
    W = Parameter(torch.randn(12, 20))
    optimizer = g.GaLoreAdamW([W], lr=0.1, rank=4, projector="svd", update_proj_gap=2, recovery=recovery)
    for t in range(3):
        before = W.detach().clone()
        W.grad = torch.randn(12, 20)
        if t == 2:  # a refresh
            W.grad[3] *= 1e30
        optimizer.step()
        assert torch.equal(W, before) == (t == 2)


# --- edges ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_muon_on_rows_skips_a_gradient_that_is_not_finite_outside_of_them(value: float) -> None:
    W = Parameter(torch.zeros(24, 40))
    optimizer = g.GaLoreMuon([W], lr=1e-3, rank=8, projector="rows", transport="keep", update_proj_gap=200)
    for G in [G.float() for G in gradients((24, 40), 3)]:
        W.grad = G
        optimizer.step()
    before, G = W.detach().clone(), torch.randn(24, 40)
    G[20, 3] = value
    W.grad = G
    optimizer.step()
    assert torch.equal(W, before)


@pytest.mark.parametrize("recovery", ["project_back", "sign", "rms"])
def test_rows_have_a_set_also_where_the_first_gradient_is_not_finite(recovery: str) -> None:
    """Without one every index is 0, and the first row would be stepped as often as there are ranks."""
    W = Parameter(torch.zeros(24, 40))
    optimizer = g.GaLoreAdamW([W], lr=1.0, rank=8, projector="rows", recovery=recovery, scale=1.0, update_proj_gap=200)
    G = torch.randn(24, 40)
    G[20, 3] = float("inf")
    W.grad = G
    optimizer.step()
    assert W.detach().abs().max() < 1.01, "Adam's first step is at most lr long"
    assert torch.equal(optimizer.state[W]["basis"], torch.arange(8))


@pytest.mark.parametrize("shape", [(8, 0), (0, 8), (3, 0, 4)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_parameter_without_elements_is_stepped_over(name: str, shape: tuple[int, ...]) -> None:
    W, beside = Parameter(torch.zeros(shape)), Parameter(torch.zeros(12, 20))
    own = {"random_after": 1} if name == "golore" else {}
    optimizer = g.low_rank_optimizer([{"params": [W, beside], "rank": 2}], name, lr=0.1, **own)
    for _ in range(2):
        W.grad, beside.grad = torch.zeros(shape), torch.randn(12, 20)
        optimizer.step()
    assert beside.detach().abs().sum() > 0


def test_fira_leaves_out_a_residual_of_rounding_errors() -> None:
    """A first gradient of fewer directions than the rank: later ones must not be held to 1 % a step above nothing."""
    W = Parameter(torch.zeros(48, 64))
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=16, recovery="fira", update_proj_gap=200)
    W.grad = torch.randn(48, 8) @ torch.randn(8, 64)
    optimizer.step()
    assert optimizer.state[W]["residual_norm"] == 0
    W.grad = torch.randn(48, 64)
    optimizer.step()
    assert optimizer.state[W]["residual_norm"] > 1


def test_a_switch_keeps_each_direction_on_its_side() -> None:
    start = torch.linalg.qr(torch.randn(48, 16)).Q
    A = torch.randn(48, 6) @ torch.randn(6, 64)
    warm = switched_basis(A, switched_basis(A, start, 16, 0), 16, 1)
    again = switched_basis(A, warm, 16, 2)
    assert (again * warm)[:, :6].sum(0).min() > 0.9


def test_no_rank_means_nothing_is_random_later() -> None:
    with pytest.raises(ValueError, match="random_after=5 has no effect with rank='full'"):
        g.GaLoreMuon([Parameter(torch.zeros(8, 8))], rank="full", random_after=5)
