"""Rows of the slots that no dense projection and no plain GaLore would need, alone and as the family's methods have them.

Oracles: naive transcriptions (tests/references/slots.py); storages for sizes; the run that was not interrupted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import galore_torch as g
from galore_torch.engine.recipe import needs_gradient
from galore_torch.engine.refresh import GOLDEN
from galore_torch.galore_projector import GaLoreProjector
from galore_torch.optim.methods import METHODS
from references.slots import ErrorFeedbackReference, FiraReference, RowsReference
from support.memory import storage_bytes
from support.planned_state import assert_state_is_as_planned

SHAPES = [(12, 20), (20, 12)]
PLAIN = {"rank": 1, "projector": "power", "recovery": "project_back", "carry": None}
CHOICES: dict[str, dict[str, Any]] = {
    "rows": {"projector": "rows"},
    "fira": {"recovery": "fira"},
    "error_feedback": {"carry": "error_feedback"},
    "rows, fira": {"projector": "rows", "recovery": "fira"},
    "rows, error_feedback": {"projector": "rows", "carry": "error_feedback"},
    "block_mean": {"projector": "block_mean", "update_proj_gap": 200},
    "foam": {"projector": "block_mean", "recovery": "foam", "update_proj_gap": 200},
    "means, error_feedback": {"projector": "block_mean", "carry": "error_feedback", "update_proj_gap": 200},
}
CHOICES |= {
    name: {
        **method.settings,
        "update_proj_gap": 200 if name in ("foam", "fold") else 3,
        **({"random_after": 4} if name == "golore" else {}),
    }
    for name, method in METHODS.items()
    if name not in ("fira", "foam")
}
CHOICES |= {
    "rms": {"projector": "rows", "recovery": "rms"},
    "ldadam, int8": {**CHOICES["ldadam"], "carry_codec": "int8"},
    "ldadam, int4": {**CHOICES["ldadam"], "carry_codec": "int4"},
}
ADAM_ALONE = [name for name, choice in CHOICES.items() if {"foam", "fold", "alice", "predict", "momentum"} & {*map(str, choice.values())}]
READ_IT_ALL = {name: words for name, choice in CHOICES.items() if (words := needs_gradient({**PLAIN, **choice})) is not None}
each_choice = pytest.mark.parametrize("choice", CHOICES)


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    common = torch.randn(shape, dtype=torch.float64)
    return [((0.5 + t % 3) * (common + 0.5 * torch.randn(shape, dtype=torch.float64))).to(dtype) for t in range(steps)]


def follow(W: Parameter, optimizer: torch.optim.Optimizer, reference: Any, grads: list[Tensor]) -> None:
    for G in grads:
        W.grad = G.clone()
        optimizer.step()
        torch.testing.assert_close(W.detach(), reference.step(G), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_fira_equals_the_paper(shape: tuple[int, int], weight_decay: float) -> None:
    """The gradients grow and shrink, so that the limiter acts in some steps and not in others."""
    W, grads = Parameter(torch.randn(shape).double()), gradients(shape, 9)
    reference = FiraReference(W.detach(), grads[0], 4, 0.25, 0.01, weight_decay)
    optimizer = g.GaLoreAdamW([W], lr=0.01, rank=4, scale=0.25, weight_decay=weight_decay, projector="svd", recovery="fira")
    follow(W, optimizer, reference, grads)


@pytest.mark.parametrize("rank", [3, 5, 9])
def test_rows_train_in_turn_and_nothing_else_moves(rank: int) -> None:
    for shape in SHAPES:
        W, grads = Parameter(torch.randn(shape).double()), gradients(shape, 13)
        reference = RowsReference(W.detach(), rank, 3, 0.5, 0.01)
        follow(W, g.GaLoreAdamW([W], lr=0.01, rank=rank, update_proj_gap=3, scale=0.5, projector="rows"), reference, grads)


def test_every_row_has_its_turn_at_a_quarter_of_the_rows() -> None:
    W = Parameter(torch.zeros(32, 8))
    optimizer = g.GaLoreSGD([W], lr=1.0, rank=0.25, update_proj_gap=1, scale=1.0, projector="rows")
    for t in range(4):
        W.grad = torch.ones(32, 8)
        optimizer.step()
        assert (W.detach() == 0).all(1).sum() == 32 - 8 * (t + 1)
    assert (W.detach() == -1).all()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_leave_the_gradient_and_without_a_decay_all_other_rows_as_they_are(dtype: Any, weight_decay: float, compile: bool) -> None:
    """They are read and written in place. Oracle of the decay: torch's product."""
    W = Parameter(torch.randn(12, 20).to(dtype))
    optimizer = g.GaLoreAdamW(
        [W], lr=0.1, rank=5, projector="rows", weight_decay=weight_decay, compile=compile, stochastic_rounding=False, update_proj_gap=1
    )
    for rows in (slice(0, 5), slice(5, 10), slice(7, 12), slice(0, 5)):
        W.grad, before = torch.randn(12, 20).to(dtype), W.detach().clone()
        grad = W.grad.clone()
        optimizer.step()
        assert torch.equal(W.grad, grad)
        moved = torch.zeros(12, dtype=torch.bool)
        moved[rows] = True
        decayed = (before.float() * (1 - 0.1 * weight_decay)).to(dtype)
        assert torch.equal(W[~moved], decayed[~moved])
        assert (W[moved] != decayed[moved]).any(1).all()


def test_a_block_of_an_older_checkpoint_that_goes_on_at_the_first_row_is_still_stepped() -> None:
    W, V = (Parameter(torch.ones(8, 4)) for _ in range(2))
    optimizer = g.GaLoreSGD([W], lr=0.5, rank=3, projector="rows", scale=1.0, update_proj_gap=3)
    W.grad = torch.ones(8, 4)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["basis"] = torch.tensor([6, 7, 0])
    other = g.GaLoreSGD([V], lr=0.5, rank=3, projector="rows", scale=1.0, update_proj_gap=3)
    other.load_state_dict(saved)
    for t in range(3):
        V.grad = torch.ones(8, 4)
        other.step()
        moved = [0, 6, 7] if t < 2 else [0, 1, 2, 6, 7]
        assert (V.detach() != 1).any(1).nonzero().flatten().tolist() == moved


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_feedback_equals_the_paper(shape: tuple[int, int], gap: int) -> None:
    W, grads = Parameter(torch.randn(shape).double()), gradients(shape, 8)
    reference = ErrorFeedbackReference(W.detach(), 4, gap, 0.5, 0.1)
    optimizer = g.GaLoreSGD([W], lr=0.1, rank=4, update_proj_gap=gap, scale=0.5, projector="svd", carry="error_feedback")
    follow(W, optimizer, reference, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_choice
def test_a_batch_trains_as_its_matrices(choice: str, dtype: torch.dtype) -> None:
    start, grads = torch.randn(3, 18, 24).to(dtype), gradients((3, 18, 24), 7, dtype)
    together, apart = Parameter(start.clone()), [Parameter(matrix.clone()) for matrix in start]
    settings = {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "stochastic_rounding": False, "compile": False, **CHOICES[choice]}
    one, others = g.GaLoreAdamW([together], **settings), [g.GaLoreAdamW([p], **settings) for p in apart]
    for G in grads:
        together.grad = G.clone()
        one.step()
        for p, optimizer, grad in zip(apart, others, G, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(together.detach().float(), torch.stack([p.detach() for p in apart]).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("choice", "cls"),
    [
        (choice, cls)
        for choice in CHOICES
        for cls in (g.GaLoreAdamW, g.GaLoreAdamW8bit, g.GaLoreAdafactor)
        if cls is not g.GaLoreAdafactor or choice not in ADAM_ALONE
    ],
)
def test_state_is_what_state_spec_says_and_the_planner_adds_up(choice: str, cls: Any, dtype: torch.dtype) -> None:
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in ((48, 64), (64, 48), (3, 20, 32), (7,))]
    optimizer = cls(params, **{"lr": 1e-3, "rank": 8, "min_8bit_size": 0, "update_proj_gap": 2, **CHOICES[choice]})
    assert_state_is_as_planned(optimizer, params)


def test_the_size_of_what_each_row_owns() -> None:
    """By hand, of a 48 x 64 weight at rank 8: 8 indices of 8 bytes and a flag; one norm; as much as the weight."""

    def size(dtype: torch.dtype, **choice: Any) -> int:
        W = Parameter(torch.zeros(48, 64, dtype=dtype))
        return storage_bytes(g.GaLoreAdamW([W], rank=8, **choice).state[W])

    assert size(torch.float32, projector="rows") == 8 * 8 + 1 + 2 * 4 * 8 * 64
    plain = size(torch.float32)
    assert size(torch.float32, recovery="fira") == plain + 4
    assert size(torch.float32, carry="error_feedback") == plain + 4 * 48 * 64
    assert size(torch.bfloat16, carry="error_feedback") == size(torch.bfloat16) + 2 * 48 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_choice
def test_resume_is_exact(choice: str, dtype: torch.dtype) -> None:
    grads = gradients((48, 64), 8, dtype)

    def make() -> tuple[Parameter, Any]:
        W = Parameter(torch.ones(48, 64, dtype=dtype))
        return W, g.GaLoreAdamW8bit([W], **{"lr": 0.01, "rank": 6, "update_proj_gap": 3, "min_8bit_size": 0, **CHOICES[choice]})

    def train(W: Parameter, optimizer: Any, part: list[Tensor]) -> None:
        for G in part:
            W.grad = G.clone()
            optimizer.step()

    V, straight = make()
    train(V, straight, grads)
    W, first = make()
    train(W, first, grads[:4])
    X, second = make()
    second.load_state_dict(first.state_dict())
    X.data.copy_(W.data)
    train(X, second, grads[4:])
    assert torch.equal(X, V)
    assert all(torch.equal(value, straight.state[V][key]) for key, value in second.state[X].items() if isinstance(value, Tensor))


@pytest.mark.parametrize("masked", [False, True])
@each_choice
def test_a_gradient_that_is_not_finite_leaves_no_trace(choice: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between refreshes and at one; in a row that `rows` does not look at, too. Oracle: isfinite, and state that stays."""
    if masked:
        from galore_torch.engine import refresh
        from galore_torch.ops import linalg

        for module in (linalg, refresh):
            monkeypatch.setattr(module, "readable", lambda tensor: False)
    W = Parameter(torch.randn(12, 20))
    optimizer = g.GaLoreAdamW([W], **{"lr": 0.01, "rank": 4, "update_proj_gap": 3, **CHOICES[choice]})
    for t in range(9):
        W.grad = torch.randn(12, 20)
        if t in (0, 4, 6):
            W.grad[11, 3] = (float("nan"), float("inf"), 1e38)[t // 3]
        before = {key: value.clone() for key, value in optimizer.state[W].items() if key.startswith(("error", "residual", "update_norm"))}
        optimizer.step()
        assert W.isfinite().all()
        state = optimizer.state[W]
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))
        if t in (0, 4, 6):
            assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize("choice", READ_IT_ALL)
def test_what_reads_the_full_gradient_works_where_it_is_kept_and_is_refused_where_it_is_not(choice: str) -> None:
    """mode "update" has it inside the backward pass. Oracle: the run without fused_backward."""

    def run(mode: str | None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(64, 32)
        optimizer = g.GaLoreAdamW(
            [{"params": [model.weight], "rank": 4, "update_proj_gap": 2, **CHOICES[choice]}, {"params": [model.bias]}]
        )
        attached = g.fused_backward(model, optimizer, mode) if mode else None
        for _ in range(5):
            model(torch.randn(4, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if attached:
            attached.remove()
        return model.weight.detach()

    assert torch.equal(run("update"), run(None))
    with pytest.raises(ValueError, match=rf"{READ_IT_ALL[choice]} reads the full gradient, .*mode='project'.* use mode='update'"):
        run("project")


def test_a_key_set_after_attaching_is_refused_too_and_a_group_without_a_rank_is_not() -> None:
    model = nn.Linear(64, 32)
    optimizer = g.GaLoreAdamW(model.parameters(), recovery="fira")
    with g.fused_backward(model, optimizer, "project"):
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
    optimizer = g.GaLoreAdamW([model.weight], rank=4)
    with g.fused_backward(model, optimizer, "project"):
        optimizer.param_groups[0]["carry"] = "error_feedback"
        with pytest.raises(ValueError, match="now asks for state error"):
            model(torch.randn(4, 64)).sum().backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recovery": "fire"}, "recovery='fire' is not known"),
        ({"carry": "luggage"}, "carry='luggage' is not known"),
        ({"recovery": "fira", "proj_type": "full"}, "proj_type='full' projects both"),
        ({"projector": "rows", "proj_type": "right"}, "proj_type='right' has no effect with projector='rows'"),
        ({"projector": "rows", "gap_range": (50, 800)}, "needs a projector that looks at the gradient"),
        ({"projector": "block_mean", "gap_range": (50, 800)}, "needs a projector that looks at the gradient"),
        ({"projector": "block_mean", "update_proj_gap": 50}, "update_proj_gap=50 has no effect with projector='block_mean'"),
        ({"projector": "block_mean", "transport": "reset"}, "transport='reset' has no effect with projector='block_mean'"),
        ({"projector": "block_mean", "basis_codec": "int4"}, "basis_codec='int4' has no effect .* nothing that is stored"),
        ({"recovery": "fira", "carry": "error_feedback"}, "recovery='fira' has made a step of it: leave one of them out"),
        ({"projector": "gaussian", "transport": "keep", "carry": "error_feedback"}, "needs orthonormal bases.*projector='gaussian'"),
        ({"recovery": "foam"}, "recovery='foam' is Adam's step .* met projector='power'"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    for where in ({}, settings):
        with pytest.raises(ValueError, match=words):
            g.GaLoreAdamW([{"params": [Parameter(torch.zeros(8, 8))], "rank": 2, **where}], **({} if where else settings))


@pytest.mark.parametrize("cls", [g.GaLoreSGD, g.GaLoreAdafactor, g.GaLoreAdagrad])
def test_foam_is_refused_by_other_rules(cls: Any) -> None:
    with pytest.raises(
        ValueError, match=r"recovery='foam' is Adam's step with the residual of block means: it needs .* such as GaLoreAdamW"
    ):
        cls([Parameter(torch.zeros(8, 8))], lr=0.1, rank=2, projector="block_mean", recovery="foam")


@pytest.mark.parametrize("recovery", ["fira", "foam", "fold", "apollo", "apollo_mini", "sign", "rms", "alice"])
def test_climbing_mirrors_descending(recovery: str) -> None:
    """With maximize the weight moves as without it on the negated gradient: the residual too."""
    settings = {"rank": 4, "lr": 0.01, "recovery": recovery, "projector": "block_mean" if recovery in ("foam", "fold") else "svd"}
    start = torch.randn(12, 20)
    W, V = (Parameter(start.clone()) for _ in range(2))
    up, down = g.GaLoreAdamW([W], maximize=True, **settings), g.GaLoreAdamW([V], **settings)
    for G in gradients((12, 20), 4, torch.float32):
        W.grad, V.grad = G.clone(), -G
        up.step()
        down.step()
    torch.testing.assert_close(W.detach(), V.detach())


def test_classes_of_torch_take_rows_and_error_feedback_but_not_fira() -> None:
    with pytest.raises(ValueError, match="recovery='fira' needs a rule of this package"):
        g.GaLore(torch.optim.RMSprop, [Parameter(torch.zeros(8, 8))], rank=2, recovery="fira")
    W, grads = Parameter(torch.randn(12, 20).double()), gradients((12, 20), 6)
    V = Parameter(W.detach()[:5].clone())
    ours = g.GaLore(torch.optim.NAdam, [W], rank=5, lr=0.01, scale=1.0, projector="rows", carry="error_feedback")
    theirs = torch.optim.NAdam([V], lr=0.01)
    for G in grads:
        W.grad, V.grad = G.clone(), G[:5].clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(W.detach()[:5], V.detach())
    torch.testing.assert_close(ours.state[W]["error"][5:], torch.stack(grads)[:, 5:].sum(0))


@pytest.mark.parametrize("cls", [g.GaLoreAdamW, g.QGaLoreAdamW8bit])
@each_choice
def test_on_int8_weights(choice: str, cls: Any) -> None:
    """Oracle: the same run on fp32 weights, within the INT8 rounding of a few steps."""
    lr = 0.001 if choice == "apollo_mini" else 0.01  # its updates are ten times as large, and rounding grows with the weights
    settings = {"lr": lr, "rank": 8, "update_proj_gap": 3, "gap_range": None, **CHOICES[choice]}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).to(torch.bfloat16)
    plain = Parameter(model[0].weight.detach().float().clone())
    g.quantize_linears(model, targets="all-linear")
    W = model[0].weight
    one, other = cls([W], **settings), cls([plain], **settings)
    for G in gradients((48, 64), 6, torch.float32):
        W.grad, plain.grad = G.to(W.dtype), G.clone()
        one.step()
        other.step()
    found = W.detach().float() if not hasattr(W, "dequantize") else W.dequantize(torch.float32)  # type: ignore[no-untyped-call]
    assert (found - plain.detach()).abs().mean() < 2e-3 < plain.detach().abs().mean()


def test_rows_take_their_turns() -> None:
    """The second parameter of an optimizer refreshes at its own step of the gap, as with every projector but svd."""
    params = [Parameter(torch.zeros(8, 4)) for _ in range(2)]
    optimizer = g.GaLoreSGD(params, lr=1.0, rank=2, update_proj_gap=10, projector="rows")
    seen = []
    for _ in range(10):
        for p in params:
            p.grad = torch.ones(8, 4)
        optimizer.step()
        seen.append(int(optimizer.state[params[1]]["basis"][0]))
    turn = int(10 * GOLDEN)
    assert seen == [0] * turn + [2] * (10 - turn)


def test_a_checkpoint_of_1_0_holds_a_dense_basis_and_rows_refuse_it() -> None:
    projector = GaLoreProjector(3)
    R = projector.project(torch.randn(12, 20), 0)
    saved = {"step": 1, "projector": projector, "exp_avg": torch.zeros_like(R), "exp_avg_sq": torch.zeros_like(R)}
    W = Parameter(torch.zeros(12, 20))
    for choice in ("rows", "power"):
        optimizer = g.GaLoreAdamW([W], rank=3, projector=choice)
        groups = [{"params": [0], "rank": 3}]
        if choice == "rows":
            with pytest.raises(ValueError, match="holds a dense basis"):
                optimizer.load_state_dict({"state": {0: dict(saved)}, "param_groups": groups})
        else:
            optimizer.load_state_dict({"state": {0: dict(saved)}, "param_groups": groups})
            torch.testing.assert_close(optimizer.state[W]["basis"], projector.ortho_matrix)


def test_a_codec_of_a_basis_that_is_indices_is_refused() -> None:
    W = Parameter(torch.randn(16, 16))
    g.GaLoreAdamW8bit([W], rank=4, projector="rows")
    with pytest.raises(ValueError, match=r"basis_codec='int4' has no effect with projector='rows'.*leave it out"):
        g.GaLoreAdamW([W], rank=4, projector="rows", basis_codec="int4")
