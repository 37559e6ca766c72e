"""Muon, of full rank and in a subspace: the rule, the recovery, the projector that follows a momentum, and the AdamW beside them.

Oracles: naive transcriptions (tests/references/muon.py), torch.optim.Muon and torch.optim.AdamW, storages for sizes, the run that was not
interrupted.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.testing import assert_close

import galore_torch as g
from galore_torch.ops.orthogonal import orthogonalize
from galore_torch.train.plan.optimizer_bytes import param_bytes
from references.muon import MuonReference, SubspaceMuonReference, newton_schulz
from support.memory import peak_bytes, storage_bytes
from support.planned_state import assert_state_is_as_planned

SHAPES = [(12, 20), (20, 12)]
FULL: dict[str, Any] = {"rank": "full"}
RANKS = pytest.mark.parametrize("rank", ["full", 4])
EXACT: dict[str, Any] = {"state_codec": "fp32"}  # fp64 for weights in fp64


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    common = torch.randn(shape, dtype=torch.float64)
    return [((0.5 + t % 3) * (common + 0.5 * torch.randn(shape, dtype=torch.float64))).to(dtype) for t in range(steps)]


def train(p: Parameter, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for G in grads:
        p.grad = G.clone()
        optimizer.step()


# --- Newton-Schulz -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (9, 9), (3, 7, 11), (3, 11, 7), (1, 5)])
def test_newton_schulz_is_the_polynomial_on_the_singular_values(shape: tuple[int, ...]) -> None:
    X = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([newton_schulz(one) for one in X]) if len(shape) > 2 else newton_schulz(X)
    assert_close(orthogonalize(X.clone()), expected, rtol=1e-9, atol=1e-10)


def test_newton_schulz_is_blind_to_scale_and_keeps_zeros_and_empty_shards() -> None:
    X = torch.randn(2, 6, 8)
    X[1] = 0
    found = orthogonalize(X.clone())
    assert torch.equal(found[1], torch.zeros(6, 8))
    for scale in (1e-30, 1e30):
        assert_close(orthogonalize(X * scale), found, rtol=1e-2, atol=1e-2)
    assert orthogonalize(torch.zeros(0, 4)).shape == (0, 4)


def test_newton_schulz_of_fp32_has_singular_values_near_one() -> None:
    """Of a matrix without small ones; in whatever the device multiplies."""
    U, _, Vh = torch.linalg.svd(torch.randn(24, 40), full_matrices=False)
    singular = torch.linalg.svdvals(orthogonalize(U @ torch.diag(torch.linspace(0.2, 1, 24)) @ Vh))
    assert 0.6 < float(singular.min()) < float(singular.max()) < 1.3


# --- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_equals_the_reference(shape: tuple[int, int], weight_decay: float) -> None:
    W = Parameter(torch.randn(shape).double())
    reference = MuonReference(W.detach(), lr=0.01, weight_decay=weight_decay)
    optimizer = g.GaLoreMuon([W], lr=0.01, weight_decay=weight_decay, **FULL, **EXACT)
    for G in gradients(shape, 9):
        train(W, optimizer, [G])
        assert_close(W.detach(), reference.step(G), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_equals_torchs_muon_but_for_its_bf16(shape: tuple[int, int]) -> None:
    """torch's averages its momentum where this sums it, which a scale of the matrix hides; its products are in bf16."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    W, V = (Parameter(start) for start in (torch.randn(shape),) * 2)
    V.data = W.detach().clone()
    start, grads = W.detach().clone(), gradients(shape, 6, torch.float32)
    train(W, g.GaLoreMuon([W], lr=0.01, weight_decay=0.1, **FULL, **EXACT), grads)
    train(V, torch.optim.Muon([V], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), grads)
    assert (W - V).norm() < 0.03 * (V - start).norm()


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_subspace_equals_the_reference(shape: tuple[int, int], gap: int) -> None:
    W = Parameter(torch.randn(shape).double())
    optimizer = g.GaLoreMuon([W], lr=0.01, rank=4, update_proj_gap=gap, weight_decay=0.1, basis_codec="fp32", **EXACT)
    start, grads = W.detach().clone(), gradients(shape, 9)
    train(W, optimizer, grads[:1])
    reference = SubspaceMuonReference(start, optimizer.state[W]["basis"], gap, lr=0.01, weight_decay=0.1)
    assert_close(W.detach(), reference.step(grads[0]), rtol=1e-9, atol=1e-10)
    for G in grads[1:]:
        train(W, optimizer, [G])
        assert_close(W.detach(), reference.step(G), rtol=1e-9, atol=1e-10)
        P = optimizer.state[W]["basis"]
        assert_close(P.T @ P, torch.eye(4).double())


def test_one_direction_is_followed_and_the_rest_is_only_orthogonalised() -> None:
    """The momentum of a matrix of rank 1 lies in the subspace, so that both recipes agree on it."""
    u, v = torch.randn(12, 1).double(), torch.randn(1, 20).double()
    W, V = Parameter(torch.zeros(12, 20).double()), Parameter(torch.zeros(12, 20).double())
    grads = [(1 + t) * u @ v for t in range(5)]
    train(W, g.GaLoreMuon([W], lr=0.1, rank=1, basis_codec="fp32", **EXACT), grads)
    train(V, g.GaLoreMuon([V], lr=0.1, **FULL, **EXACT), grads)
    assert_close(W.detach(), V.detach())


def test_a_rank_that_does_not_shorten_a_matrix_trains_it_as_rank_full() -> None:
    grads, start = gradients((12, 20), 4), torch.randn(12, 20).double()
    found = []
    for rank in ("full", 12, 64):
        W = Parameter(start.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = g.GaLoreMuon([W], lr=0.01, rank=rank, **EXACT)
        train(W, optimizer, grads)
        assert set(optimizer.state[W]) == {"step", "index", "momentum_buffer"}
        found.append(W.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@RANKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_are_a_batch(rank: Any, dtype: torch.dtype) -> None:
    start, grads = torch.randn(3, 18, 24).to(dtype), gradients((3, 18, 24), 5, dtype)
    together, apart = Parameter(start.clone()), [Parameter(matrix.clone()) for matrix in start]
    train(together, g.GaLoreMuon([together], lr=0.01, rank=rank, compile=False), grads)
    for i, p in enumerate(apart):
        train(p, g.GaLoreMuon([p], lr=0.01, rank=rank, compile=False), [G[i] for G in grads])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    assert_close(together.detach(), torch.stack([p.detach() for p in apart]), rtol=0.0, atol=tolerance)


@RANKS
def test_a_kernel_is_one_matrix_whatever_its_memory_format(rank: Any) -> None:
    start, grads = torch.randn(8, 4, 3, 3).double(), gradients((8, 4, 3, 3), 4)
    W = Parameter(start.clone().to(memory_format=torch.channels_last))
    V = Parameter(start.flatten(1).clone())
    train(W, g.GaLoreMuon([W], lr=0.01, rank=rank), grads)
    train(V, g.GaLoreMuon([V], lr=0.01, rank=rank), [G.flatten(1) for G in grads])
    assert_close(W.detach().flatten(1), V.detach())


@RANKS
def test_climbing_mirrors_descending(rank: Any) -> None:
    start = torch.randn(12, 20).double()
    W, V = Parameter(start.clone()), Parameter(start.clone())
    grads = gradients((12, 20), 5)
    train(W, g.GaLoreMuon([W], lr=0.01, rank=rank, maximize=True, **EXACT), grads)
    train(V, g.GaLoreMuon([V], lr=0.01, rank=rank, **EXACT), [-G for G in grads])
    assert_close(W.detach(), V.detach())


@RANKS
def test_decay_after_the_update_shrinks_the_update_too(rank: Any) -> None:
    W, V = Parameter(torch.ones(12, 20).double()), Parameter(torch.ones(12, 20).double())
    (G,) = gradients((12, 20), 1)
    train(W, g.GaLoreMuon([W], lr=0.1, rank=rank, weight_decay=0.5, decay="after", **EXACT), [G])
    train(V, g.GaLoreMuon([V], lr=0.1, rank=rank, **EXACT), [G])
    assert_close(W.detach(), 0.95 * V.detach())


@RANKS
def test_a_tensor_for_a_learning_rate_and_one_of_zero(rank: Any) -> None:
    start, grads = torch.randn(12, 20).double(), gradients((12, 20), 4)
    found = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        W = Parameter(start.clone())
        optimizer = g.GaLoreMuon([W], lr=lr, rank=rank, **EXACT)
        optimizer.param_groups[0]["lr"] = lr * 0.0
        train(W, optimizer, grads[:2])
        assert torch.equal(W.detach(), start)
        optimizer.param_groups[0]["lr"] = lr
        train(W, optimizer, grads[2:])
        found.append(W.detach())
    assert_close(found[0], found[1])


# --- two rules in one optimizer ----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16)) for _ in range(2))
        self.head = nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.mlps:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for t in steps:
        x = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(t))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), ((3 * x + 1) % 11).flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@RANKS
def test_what_is_no_hidden_matrix_trains_by_adamw(rank: Any) -> None:
    """Embedding, head and vectors, and the biases that share a group with the matrices. Oracle: torch's AdamW on the same gradients."""
    model = Net().double()
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]
    chosen = {id(p) for p in (*matrices, *biases)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": [*matrices, *biases], "rank": rank}, {"params": rest}]
    optimizer = g.GaLoreMuon(groups, lr=0.01, eps=0.0, weight_decay=0.1, **EXACT)
    assert all("momentum_buffer" in optimizer.state[p] for p in matrices)
    assert all("exp_avg_sq" in optimizer.state[p] for p in (*biases, *rest))
    theirs = [Parameter(p.detach().clone()) for p in (*biases, *rest)]
    oracle = torch.optim.AdamW(theirs, lr=0.01, eps=0.0, weight_decay=0.1)
    for t in range(4):
        model(torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(t))).square().mean().backward()
        for p, twin in zip((*biases, *rest), theirs, strict=True):
            p.grad = torch.where(p.grad == 0, 1e-3, p.grad)  # type: ignore[arg-type]  # without eps 0 / 0 is NaN
            twin.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
    for p, twin in zip((*biases, *rest), theirs, strict=True):
        assert_close(p.detach(), twin.detach())


@pytest.mark.parametrize("rank", ["full", 8])
def test_param_groups_leave_gap_and_scale_to_the_class_and_it_learns(rank: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = g.GaLoreMuon(g.galore_param_groups(model, rank), lr=0.02)
    group = optimizer.param_groups[-1]
    assert (group["update_proj_gap"], group["scale"]) == (1, 0.2)
    losses = descend(model, optimizer, range(60))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_without_any_rank_it_says_that_all_is_adamw() -> None:
    model = Net()
    with pytest.warns(UserWarning, match=r"no group has a rank, so all 6 matrices train by AdamW: .* rank='full'"):
        g.GaLoreMuon(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g.GaLoreMuon([model.embed.weight])  # as layer-wise loops make them
        g.GaLoreMuon(g.galore_param_groups(model, "full"))


# --- state -------------------------------------------------------------------------------------------------------------

CODECS = ("fp32", "bf16", "int8", "mulaw4")
each_codec = pytest.mark.parametrize("codec", CODECS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", ["full", 8])
@each_codec
def test_state_is_what_state_spec_says_and_the_planner_adds_up(codec: str, rank: Any, dtype: torch.dtype) -> None:
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in ((48, 64), (64, 48), (3, 20, 34), (7,))]
    optimizer = g.GaLoreMuon(params, rank=rank, state_codec=codec, min_8bit_size=0)
    assert_state_is_as_planned(optimizer, params)


def test_bytes_by_hand() -> None:
    """Of a 128 x 256 matrix: codes and a scale a block of 256 or 64; at rank 32 those of 32 x 256, 2 bytes of a 128 x 32 basis, a flag."""

    def size(**settings: Any) -> int:
        W = Parameter(torch.zeros(128, 256))
        return storage_bytes(g.GaLoreMuon([W], **settings).state[W])

    elements = 128 * 256
    assert size(rank="full", state_codec="fp32") == 4 * elements
    assert size(rank="full") == elements + 4 * elements // 256
    assert size(rank="full", state_codec="mulaw4") == elements // 2 + 4 * elements // 64
    assert size(rank=32) == 32 * 256 + 4 * 32 + 2 * 128 * 32 + 1
    assert size(rank=32, basis_codec="int4") == 32 * 256 + 4 * 32 + 128 * 32 // 2 + 4 * 32 + 1


@RANKS
@each_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(codec: str, rank: Any, dtype: torch.dtype) -> None:
    """Through a checkpoint at the sixth of eleven steps. Oracle: the run without a break."""

    def build() -> tuple[Net, Any]:
        torch.manual_seed(0)
        model = Net().to(dtype)
        groups = g.galore_param_groups(model, rank, **({} if rank == "full" else {"update_proj_gap": 2}))
        return model, g.GaLoreMuon(groups, lr=0.01, state_codec=codec, min_8bit_size=0)

    straight, whole = build()
    descend(straight, whole, range(11))
    first, one = build()
    descend(first, one, range(6))
    second, other = build()
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    descend(second, other, range(6, 11))
    for p, q in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        ours, theirs = whole.state[p], other.state[q]
        assert all(torch.equal(ours[key], value) for key, value in theirs.items() if isinstance(value, Tensor))


@RANKS
@pytest.mark.parametrize(("codec", "distance"), [("bf16", 0.05), ("int8", 0.2), ("mulaw4", 0.6)])
def test_codecs_move_weights_as_fp32_does(codec: str, distance: float, rank: Any) -> None:
    """After 20 steps, relative to the way gone; a gradient with 12 clear directions."""
    start, grads = torch.randn(64, 96), gradients((64, 96), 20, torch.float32)
    ends = []
    for state_codec in ("fp32", codec):
        W = Parameter(start.clone())
        train(W, g.GaLoreMuon([W], lr=0.01, rank=rank, state_codec=state_codec, min_8bit_size=0, compile=False), grads)
        ends.append(W.detach())
    assert 0 < (ends[1] - ends[0]).norm() < distance * (ends[0] - start).norm()


@pytest.mark.parametrize("shape", [(97, 64), (64, 97), (129, 40)])
def test_four_bits_in_few_rows_at_a_time_equal_all_at_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last block is not full, and where its length is odd."""
    from galore_torch.engine import fused

    start, grads, ends = torch.randn(shape), gradients(shape, 3, torch.float32), []
    for limit in (1 << 20, 1000):
        monkeypatch.setattr(fused, "chunk_elements", lambda device, limit=limit: limit)
        W = Parameter(start.clone())
        optimizer = g.GaLoreMuon([W], lr=0.01, state_codec="mulaw4", compile=False, min_8bit_size=0, **FULL)
        train(W, optimizer, grads)
        ends.append((W.detach(), optimizer.state[W]["momentum_buffer_codes"].clone()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@RANKS
@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_that_is_not_finite_leaves_no_trace_but_the_decay(masked: bool, rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:
        from galore_torch.engine import refresh
        from galore_torch.ops import linalg

        for module in (linalg, refresh):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    W = Parameter(torch.randn(12, 20))
    optimizer = g.GaLoreMuon([W], lr=0.1, rank=rank, weight_decay=0.5)
    for t in range(9):
        W.grad = torch.randn(12, 20)
        if t in (0, 4, 6):
            W.grad[11, 3] = (float("nan"), float("inf"), 1e38)[t // 3]
        weight, before = W.detach().clone(), {key: value.clone() for key, value in optimizer.state[W].items() if isinstance(value, Tensor)}
        optimizer.step()
        if t in (0, 4):
            assert_close(W.detach(), 0.95 * weight)
            assert all(torch.equal(optimizer.state[W][key], value) for key, value in before.items() if key != "basis_ready")
        assert W.isfinite().all()


@RANKS
def test_int8_weights_move_as_others_do(rank: Any) -> None:
    """Oracle: the same run on fp32 weights, within the INT8 rounding of a few steps."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).to(torch.bfloat16)
    plain = Parameter(model[0].weight.detach().float().clone())  # type: ignore[operator]
    g.quantize_linears(model, targets="all-linear")
    W = model[0].weight
    one, other = (g.GaLoreMuon([p], lr=0.01, rank=rank) for p in (W, plain))
    for G in gradients((48, 64), 6, torch.float32):
        W.grad, plain.grad = G.to(torch.bfloat16), G.clone()  # type: ignore[assignment]
        one.step()
        other.step()
    found: Tensor = W.dequantize(torch.float32)  # type: ignore[operator, assignment]
    assert (found - plain.detach()).abs().mean() < 2e-3 < plain.detach().abs().mean()


# --- what works with it, and what is refused ---------------------------------------------------------------------------


@RANKS
def test_fused_backward_updates_in_the_backward_pass_and_keeps_no_projection(rank: Any) -> None:
    """Mode "update" has the whole gradient. Oracle: the run without fused_backward, to the bit."""

    def run(mode: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = Net()
        optimizer = g.GaLoreMuon(g.galore_param_groups(model, rank), lr=0.01)
        if mode:
            with g.fused_backward(model, optimizer, mode):
                descend(model, optimizer, range(5))
        else:
            descend(model, optimizer, range(5))
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run("update"), run(None), strict=True))
    for mode in ("project", "direct", "direct_update"):
        with pytest.raises(ValueError, match=r"recovery='orthogonal' reads the full gradient, .* use mode='update'"):
            run(mode)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"rank": 4, "recovery": "project_back"},
            r"recovery='project_back' does not go with the rule 'muon': 'orthogonal' is",
        ),
        ({"rank": 4, "recovery": "fira"}, r"recovery='fira' does not go with the rule 'muon'"),
        ({"rank": 4, "tensor": True}, r"recovery='orthogonal' .*tensor=True projects every dimension"),
        ({"rank": "full", "tensor": True}, r"recovery='orthogonal' .*tensor=True projects every dimension"),
        ({"rank": 4, "tensor": "auto"}, r"recovery='orthogonal' .*tensor='auto' projects every dimension"),
        ({"rank": 4, "proj_type": "full"}, r"proj_type='full' projects both"),
        ({"rank": "full", "update_proj_gap": 50}, r"update_proj_gap=50 has no effect with rank='full'"),
        ({"rank": "full", "gap_range": (1, 8)}, r"gap_range=\(1, 8\) has no effect with rank='full'"),
        ({"rank": "full", "projector": "svd"}, r"projector='svd' has no effect with rank='full'"),
        ({"rank": "full", "transport": "keep"}, r"transport='keep' has no effect with rank='full'"),
        ({"rank": "full", "proj_type": "left"}, r"proj_type='left' has no effect with rank='full'"),
        ({"rank": "full", "basis_codec": "int4"}, r"basis_codec='int4' has no effect with rank='full'"),
        ({"rank": 4, "projector": "identity"}, r"projector='identity' is what rank='full' means"),
        ({"rank": "whole"}, r"rank='whole' is not a rank: .*'full' for GaLoreMuon"),
        ({"rank": 4, "momentum": 1.0}, r"Invalid momentum: momentum=1.0 must be a number in \[0, 1\)"),
        ({"rank": 4, "momentum": -0.1}, r"Invalid momentum"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        g.GaLoreMuon([Parameter(torch.zeros(8, 8))], **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": "full"}, r"rank='full' with recovery='project_back' is the same as no rank: leave rank None, or use GaLoreMuon"),
        ({"rank": 4, "recovery": "orthogonal"}, r"recovery='orthogonal' does not go with the rule 'adam'"),
        ({"rank": 4, "state_codec": "mulaw4"}, r"state_codec='mulaw4' is too coarse for the moments of the rule 'adam'"),
    ],
)
def test_other_classes_refuse_what_is_muons(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        g.GaLoreAdamW([Parameter(torch.zeros(8, 8))], **settings)


@pytest.mark.parametrize("cls", [g.GaLoreAdagrad, g.GaLoreAdafactor])
def test_a_basis_follows_a_first_moment_where_there_is_one(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"projector='momentum' follows a first moment, and the rule .* has none that it knows"):
        cls([Parameter(torch.zeros(8, 8))], lr=0.1, rank=2, projector="momentum")


def test_adams_basis_may_follow_its_first_moment() -> None:
    """Oracle: P' = orth(A A^T P) with A = beta1 P m + (1 - beta1) G, as one step of the naive product."""
    W, grads = Parameter(torch.randn(12, 20).double()), gradients((12, 20), 2)
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=3, update_proj_gap=1, projector="momentum")
    train(W, optimizer, grads[:1])
    P, m = optimizer.state[W]["basis"].clone(), optimizer.state[W]["exp_avg"].clone()
    train(W, optimizer, grads[1:])
    A = 0.9 * P @ m + 0.1 * grads[1]
    Q = torch.linalg.qr(A @ (A.T @ P))[0]
    found = optimizer.state[W]["basis"]
    assert_close(found @ found.T, Q @ Q.T)


def test_complex_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="complex"):
        g.GaLoreMuon([Parameter(torch.zeros(8, 8, dtype=torch.complex64))], rank=4)


@pytest.mark.parametrize("rank", ["full", 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_takes_for_a_moment_is_planned(dtype: torch.dtype, rank: Any) -> None:
    """Within a quarter of the weight of a real step, which the chunks of the elementwise pass fit into."""
    W = Parameter(torch.randn(384, 768).to(dtype))
    optimizer = g.GaLoreMuon([W], rank=rank, state_codec="fp32", compile=False)
    peaks = []
    for _ in range(2):
        W.grad = torch.randn_like(W)
        peaks.append(peak_bytes(optimizer.step))
    found = param_bytes(tuple(W.shape), dtype, optimizer.param_groups[0], optimizer.rule)
    assert found.transient == pytest.approx(max(peaks), abs=0.25 * W.numel() * W.element_size())
