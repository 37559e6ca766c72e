"""The proven faults of galore-torch 1.0's step as a whole (B16 to B21 of docs/differences.md) are absent here.

Decay, cost of refreshes, transient memory, compilation, distributed checkpoints and edits of groups. Each test names its
oracle. Speed is not tested: it is the subject of the benchmarks.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from galore_torch.slots.projectors import PROJECTORS

PUBLISHED: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (GaLoreAdamW, {}),
    (GaLoreAdamW8bit, {}),
    (GaLoreAdafactor, {"lr": 0.01}),
]
each_class = pytest.mark.parametrize(("cls", "own"), PUBLISHED, ids=[cls.__name__ for cls, _ in PUBLISHED])


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer: Optimizer, params: list[Parameter], steps: int, first: int = 0) -> None:
    """Steps on gradients that depend on nothing but the step and the parameter's place."""
    for step in range(first, first + steps):
        for place, p in enumerate(params):
            p.grad = weight(*p.shape, dtype=p.dtype, seed=1000 * place + step + 1).detach()
        optimizer.step()


@each_class
@pytest.mark.parametrize("rank", [None, 2])
def test_b16_decay_comes_before_the_update(cls: type[Optimizer], own: dict[str, Any], rank: int | None) -> None:
    """Oracle: u from the same step without decay; then W (1 - lr wd) - u, or (W - u)(1 - lr wd) with decay="after"."""
    start, moved = weight(12, 8).detach(), {}
    for name, keys in {"none": {}, "before": {"weight_decay": 0.5}, "after": {"weight_decay": 0.5, "decay": "after"}}.items():
        p = weight(12, 8)
        train(cls([p], **{"rank": rank, **own, "lr": 0.1, **keys}), [p], 1)
        moved[name] = p.detach()
    update, shrink = start - moved["none"], 1 - 0.1 * 0.5
    assert_close(moved["before"], start * shrink - update)
    assert_close(moved["after"], (start - update) * shrink)
    assert not torch.allclose(moved["before"], moved["after"], atol=1e-4)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("rank", [None, 4])
def test_b16_decay_reaches_bf16_weights(rank: int | None, tensor_lr: bool) -> None:
    """1 - lr wd = 0.9995 is 1 in bf16, so a factor rounded to bf16 would never decay. Oracle: 0.9995^400 = 0.819."""
    p = Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([p], lr=torch.tensor(1e-3) if tensor_lr else 1e-3, weight_decay=0.5, rank=rank)
    for _ in range(400):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(0.9995**400, abs=0.01)


def test_b17_refreshes_take_turns_so_that_no_step_carries_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, 24 matrices and T = 48: after the first step no step refreshes more than one matrix, each has one refresh
    in every 48 steps, none takes an SVD, and all but the first start from the basis they had."""
    refreshes: list[list[tuple[int, bool]]] = []
    power = PROJECTORS["power"]

    def spy(G: Tensor, ranks: Any, previous: Any, seed: int) -> Any:
        refreshes[-1].append((G.shape[0] - 10, previous is not None))
        return power.find(G, ranks, previous, seed)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a full SVD")

    monkeypatch.setitem(PROJECTORS, "power", replace(power, find=spy))
    monkeypatch.setattr(torch.linalg, "svd", never)
    params = [weight(10 + i, 6) for i in range(24)]
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=48)
    for step in range(1 + 3 * 48):
        refreshes.append([])
        train(optimizer, params, 1, first=step)
    assert sorted(refreshes[0]) == [(i, False) for i in range(24)]
    assert max(map(len, refreshes[1:])) == 1
    for first in (49, 97):  # whole gaps after every turn has come once
        assert sorted(itertools.chain(*refreshes[first : first + 48])) == [(i, True) for i in range(24)]


def test_b17_the_published_schedule_is_still_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """projector="svd": one SVD a projected matrix at steps 0, T, 2T, none for a parameter at full rank; "gram" makes none."""
    calls: list[tuple[int, ...]] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **kwargs: (calls.append(tuple(A.shape)), svd(A, **kwargs))[1])
    for projector, count in (("svd", 3), ("gram", 0)):
        calls.clear()
        params = [weight(12, 8), weight(10, 9), weight(7)]
        optimizer = GaLoreAdamW([{"params": params[:1], "rank": 2, "update_proj_gap": 4, "projector": projector}, {"params": params[1:]}])
        train(optimizer, params, 9)
        assert calls == [(12, 8)] * count


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_b17_the_cheaper_projector_finds_the_same_subspace(proj_type: str, shape: tuple[int, ...]) -> None:
    """projector="gram" against "svd": the same P P^T."""
    spans = []
    for projector in ("svd", "gram"):
        p = weight(*shape)
        optimizer = GaLoreAdamW([p], rank=3, projector=projector, proj_type=proj_type)
        train(optimizer, [p], 1)
        spans.append({k: v @ v.T for k, v in optimizer.state[p].items() if k in ("basis", "basis_left", "basis_right")})
    assert spans[0]
    assert_close(spans[1], spans[0], rtol=0.0, atol=1e-4)


def transient(step: Any) -> int:
    """Most bytes allocated at any one time during a call, over those allocated before it (torch's own memory events)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    now = peak = 0
    for event in run.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_b18_the_ruler_of_transient_memory() -> None:
    """Oracle: torch's AdamW one parameter at a time, whose state is made at step 1 (2 parameters) under 2 temporaries."""
    p = weight(256, 256)
    optimizer = torch.optim.AdamW([p], foreach=False)
    p.grad = torch.ones_like(p)
    assert [round(transient(optimizer.step) / p.nbytes, 1) for _ in range(2)] == [4.0, 2.0]


@pytest.mark.parametrize(
    ("cls", "bound"),
    [(GaLoreAdamW, 1.0), (GaLoreAdafactor, 1.0), (GaLoreAdamW8bit, 2.0)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_b18_a_step_needs_little_memory_beside_the_weight(cls: type[Optimizer], bound: float) -> None:
    """1.0's normal step peaks at 2.75 times a weight of this aspect and rank, torch's AdamW at 2.0, 1.0's SVD step at 3.6.

    8-bit moments are decoded a few rows at a time: a fixed number of bytes, which is large beside this small weight only.
    """
    p = weight(512, 1368)
    optimizer = cls([p], lr=0.01, rank=128)
    peaks = []
    for _ in range(2):
        p.grad = torch.randn_like(p)
        peaks.append(transient(optimizer.step) / p.nbytes)
    assert peaks[1] < bound, peaks
    assert peaks[0] < 3.0, peaks


@each_class
@pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning")
def test_b19_a_compiled_step_is_the_step_and_stops_recompiling(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """torch.compile(optimizer.step) over several shapes and refreshes. Oracle: the same steps without it."""
    torch._dynamo.reset()
    counters.clear()
    shapes = ((12, 8), (8, 12), (6, 4, 3), (7,))
    runs, graphs = [], []
    for compiled in (True, False):
        params = [weight(*shape) for shape in shapes]
        optimizer = cls([{"params": params, "rank": 2, "update_proj_gap": 3}], **own)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(12):
            for place, p in enumerate(params):
                p.grad = weight(*p.shape, seed=1000 * place + i).detach()
            step()
            graphs.append(counters["stats"]["unique_graphs"])
        runs.append([p.detach() for p in params])
    assert_close(runs[0], runs[1])
    assert graphs[11] == graphs[6], f"graphs after each step: {graphs[:12]}"
    torch._dynamo.reset()


@each_class
@pytest.mark.parametrize("flatten", [False, True])
def test_b20_distributed_checkpoints_hold_tensors_and_numbers(cls: type[Optimizer], own: dict[str, Any], flatten: bool) -> None:
    """get and set_optimizer_state_dict, on a fresh optimizer, without a step that makes state. Oracle: the uninterrupted run."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def new() -> tuple[nn.Module, Optimizer, list[Parameter]]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8, bias=False))
        matrices = [model[0].weight, model[1].weight]
        groups = [{"params": matrices, "rank": 2, "update_proj_gap": 3}, {"params": [model[0].bias]}]
        return model, cls(groups, **own), [*matrices, model[0].bias]

    model, optimizer, params = new()
    born = copy.deepcopy(optimizer.state_dict()["state"])
    train(optimizer, params, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    values = list(saved.values()) if flatten else [v for s in saved["state"].values() for v in s.values()]
    assert {type(v) for v in values} <= {Tensor, int, float, bool, str, tuple, type(None)}
    other, resumed, copies = new()
    get_optimizer_state_dict(other, resumed, options=options)
    assert_close(resumed.state_dict()["state"], born, rtol=0.0, atol=0.0)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"], rtol=0.0, atol=0.0)
    train(optimizer, params, 3, first=4)
    train(resumed, copies, 3, first=4)
    assert_close(copies, params, rtol=0.0, atol=0.0)


def test_b21_an_edited_scale_acts_at_the_next_step() -> None:
    """Without decay and moments that differ, twice the scale is twice the move."""
    moves = []
    for scale in (0.25, 0.5):
        p = weight(12, 8)
        optimizer = GaLoreAdamW([p], rank=2, lr=0.1)
        train(optimizer, [p], 2)
        optimizer.param_groups[0]["scale"] = scale
        before = p.detach().clone()
        train(optimizer, [p], 1, first=2)
        moves.append(p.detach() - before)
    assert_close(moves[1], 2 * moves[0], rtol=1e-4, atol=1e-6)
    assert moves[0].abs().max() > 1e-3


def test_b21_an_edited_gap_acts_at_the_next_step() -> None:
    """The basis is new at exactly the steps that the gap of the moment divides."""
    p = weight(12, 8)
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=100)
    renewed = []
    for step in range(9):
        optimizer.param_groups[0]["update_proj_gap"] = 100 if step < 4 else 2
        before = optimizer.state[p]["basis"].clone()
        train(optimizer, [p], 1, first=step)
        if not torch.equal(optimizer.state[p]["basis"], before):
            renewed.append(step)
    assert renewed == [0, 4, 6, 8]


@each_class
@pytest.mark.parametrize("rank", [3, 1, 100, None, 0, 0.9])
def test_b21_an_edited_rank_is_refused_and_changes_nothing(cls: type[Optimizer], own: dict[str, Any], rank: Any) -> None:
    """The error says what to do; set back, the run goes on as if nothing had happened. Oracle: a run that was left alone."""
    runs = []
    for edited in (True, False):
        params = [weight(6, 4), weight(12, 8)]
        optimizer = cls([{"params": params[:1]}, {"params": params[1:], "rank": 2, "update_proj_gap": 2}], **own)
        train(optimizer, params, 2)
        if edited:
            optimizer.param_groups[1]["rank"] = rank
            before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict()["state"])
            with pytest.raises(ValueError, match=r"rank.*([Ss]et (it|them) back|whole number from 1)"):
                train(optimizer, params, 1, first=2)
            assert_close(([p.detach() for p in params], optimizer.state_dict()["state"]), before, rtol=0.0, atol=0.0)
            optimizer.param_groups[1]["rank"] = 2
        train(optimizer, params, 3, first=2)
        runs.append([p.detach() for p in params])
    assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)
