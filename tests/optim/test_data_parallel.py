"""fused_backward under DistributedDataParallel: processes that average R are one process with the joined batch."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from support.data_parallel import (
    TORCHS_OWN,
    WORDS,
    Bare,
    Net,
    Run,
    attached_again,
    ids_of,
    in_processes,
    loss_of,
    mean_in_two_orders,
    optimizer_of,
    train,
)
from support.forked import Forked
from support.world import World

pytestmark = pytest.mark.dist


def assert_one_run(several: dict[str, Any], one: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Weights of about 0.1 after every step."""
    assert several["steps"] == one["steps"]
    assert several["norms"] == pytest.approx(one["norms"], rel=1e-4)
    difference = (several["weights"] - one["weights"]).abs().amax(1)
    assert difference.max() < tolerance, difference


SLOW_MODES = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("project", "direct_update")]


@pytest.mark.parametrize("mode", ["direct", "update", *SLOW_MODES])
def test_two_processes_are_one_with_the_joined_batch(mode: str, tmp_path: Path, forked: Forked) -> None:
    """50 steps, each matrix with at least seven refreshes; the processes' weights are the same bits after each step."""
    run = Run(mode)
    assert_one_run(in_processes(forked, 2, run, tmp_path), train(run, 0, 1))


CASES = {
    "attached before it is wrapped": Run("direct", first=True, steps=12),
    "attached before it is wrapped, update": Run("direct_update", first=True, steps=12),
    "accumulated under no_sync, clipped": Run("direct", micro_batches=3, clip=0.5, steps=20),
    "projected, accumulated under no_sync, zeroed in place": Run("project", micro_batches=2, set_to_none=False, steps=20),
    "direct, zeroed in place": Run("direct", set_to_none=False, steps=20),
    "a layer that one process uses, and one that none does": Run("direct", model="Branches", steps=20),
    "the same, projected, with a search for such layers": Run("project", model="Branches", steps=20, wrap={"find_unused_parameters": True}),
    "the same, updated": Run("direct_update", model="Branches", steps=20),
    "the same, accumulated": Run("direct", model="Branches", steps=20, micro_batches=2, odd=True),
    "a static graph": Run("direct", steps=12, wrap={"static_graph": True}),
    "a static graph, attached first": Run("direct", steps=12, wrap={"static_graph": True}, first=True),
    "buckets that are the gradients": Run("direct", steps=12, wrap={"gradient_as_bucket_view": True}),
    "tiny buckets": Run("direct_update", steps=12, wrap={"bucket_cap_mb": 0.002}),
    "nothing for the wrapper to average": Run("direct", model="Bare", steps=20),
    "nothing for the wrapper to average, static": Run("project", model="Bare", steps=20, wrap={"static_graph": True}),
    "batches of different size": Run("direct", odd=True, steps=20),
    "a checkpoint": Run("direct", checkpoint="plain", steps=12),
    "a reentrant checkpoint": Run("direct", checkpoint="reentrant", steps=12),
    "a reentrant checkpoint, projected": Run("project", checkpoint="reentrant", steps=12),
    "the published projector": Run("direct", projector="svd", steps=20),
    "gram": Run("project", projector="gram", steps=20),
    "rsvd": Run("direct", projector="rsvd", steps=20),
    "random": Run("direct", projector="random", steps=20),
    "rows": Run("direct", projector="rows", steps=20),
    "block means": Run("direct", projector="block_mean", group={"update_proj_gap": 200}, steps=20),
    "both sides": Run("direct", proj_type="full", steps=20),
    "the input's side": Run("direct", proj_type="right", steps=20),
    "a rank too small for power steps alone": Run("direct", group={"rank": 3}, steps=20),
    "8-bit": Run("direct", cls="GaLoreAdamW8bit", group={"min_8bit_size": 64}, steps=20),
    "INT4 bases": Run("direct", cls="QGaLoreAdamW8bit", group={"min_8bit_size": 64}, steps=20),
    "Adafactor": Run("direct", cls="GaLoreAdafactor", steps=20),
    "the residual of fira": Run("update", group={"recovery": "fira"}, steps=20),
    "error feedback": Run("update", group={"carry": "error_feedback"}, steps=20),
    "tensors, complex ones too": Run("project", cls="TensorGaLoreAdamW", model="Tensors", steps=20),
    "the hook, tensors, complex ones too": Run(None, hook=True, cls="TensorGaLoreAdamW", model="Tensors", steps=20),
    "the hook": Run(None, hook=True),
    "the hook, accumulated under no_sync": Run(None, hook=True, micro_batches=2, steps=20),
    "the hook, with a recovery that reads the gradient": Run(None, hook=True, group={"recovery": "fira"}, steps=20),
    "the hook, rows": Run(None, hook=True, projector="rows", steps=20),
    "the hook, block means": Run(None, hook=True, projector="block_mean", group={"update_proj_gap": 200}, steps=20),
    "the hook, INT8 weights": Run(None, hook=True, int8=True, wrap={"init_sync": False}, steps=20),
    "the hook, both sides": Run(None, hook=True, proj_type="full", steps=20),
    "the hook, a static graph, the published projector": Run(None, hook=True, projector="svd", wrap={"static_graph": True}, steps=20),
    **{
        f"{what}, {mode}": Run(mode, steps=20, **settings)
        for mode in ("project", "direct", "update", "direct_update")
        for what, settings in {
            "experts": {"model": "Experts"},
            "GPT-2's layers": {"model": "Gpt2"},
            "INT8 weights": {"int8": True, "wrap": {"init_sync": False}},
            "compiled, then wrapped": {"compiled": "inside"},
            "wrapped, then compiled": {"compiled": "around"},
        }.items()
    },
    **{f"fewer batches, {mode}": Run(mode, steps=25, lacks=8) for mode in ("project", "direct", "update", "direct_update")},
    "fewer batches, the first process": Run("direct", steps=25, lacks=8, short=0, clip=0.5),
    "no batch at all": Run("project", steps=20, lacks=15),
    "fewer batches, 8-bit": Run("direct_update", steps=25, lacks=8, cls="QGaLoreAdamW8bit", group={"min_8bit_size": 64}),
    "fewer batches, INT8 weights": Run("direct", steps=25, lacks=8, int8=True, wrap={"init_sync": False}),
    "fewer batches, layers that are not used": Run("direct", steps=25, lacks=8, model="Branches", wrap={"find_unused_parameters": True}),
    "fewer batches, layers that are not used, gram": Run(
        "direct", steps=25, lacks=8, model="Branches", wrap={"find_unused_parameters": True}, projector="gram"
    ),
    "fewer batches, a row that reads the gradient": Run("update", steps=25, lacks=8, group={"recovery": "fira"}),
    "fewer batches, gaps that adapt": Run("direct", steps=25, lacks=8, group={"gap_range": (2, 20)}),
    "gaps that adapt": Run("direct", group={"gap_range": (2, 20)}, steps=30),
}


QUICK = {
    "attached before it is wrapped, update",
    "accumulated under no_sync, clipped",
    "projected, accumulated under no_sync, zeroed in place",
    "a layer that one process uses, and one that none does",
    "a static graph",
    "nothing for the wrapper to average",
    "a reentrant checkpoint",
    "the published projector",
    "the residual of fira",
    "the hook",
    "fewer batches, the first process",
    "fewer batches, layers that are not used",
    "experts, direct",
    "INT8 weights, direct_update",
}


@pytest.mark.filterwarnings(f"ignore:{TORCHS_OWN}:DeprecationWarning")
@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES])
def test_it_holds_for(case: str, tmp_path: Path, forked: Forked) -> None:
    run = CASES[case]
    rounded = case == "8-bit"  # a code that is rounded to the other side is a step of 1/128 of the block's largest
    assert_one_run(in_processes(forked, 2, run, tmp_path), train(run, 0, 1), 1e-4 if rounded else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["project", "direct_update"])
def test_four_processes_are_one_with_the_joined_batch(mode: str, tmp_path: Path, forked: Forked) -> None:
    run = Run(mode)
    assert_one_run(in_processes(forked, 4, run, tmp_path), train(run, 0, 1))


SHAPES = {"up.weight": (32, 24), "mid.weight": (32, 32), "down.weight": (24, 32), "head.weight": (WORDS, 24)}
RANK = 8  # from here on a power step takes two products; below, the strongest directions are sorted out by a third


@pytest.mark.parametrize(("mode", "dtype"), [("direct", None), ("project", "bfloat16")])
def test_what_crosses_the_wire_is_r_and_thin_products_on_a_refresh(mode: str, dtype: str | None, tmp_path: Path, forked: Forked) -> None:
    """Between refreshes r / min(m, n) of the full gradient's bytes, half of that in bf16, and a flag for each matrix."""
    found = in_processes(forked, 2, Run(mode, steps=16, reduce_dtype=dtype, group={"rank": RANK}), tmp_path)
    itemsize = 2 if dtype else 4
    low = sum(RANK * max(shape) for shape in SHAPES.values())
    assert low * itemsize <= max(RANK / min(shape) for shape in SHAPES.values()) * 4 * sum(m * n for m, n in SHAPES.values())
    quiet = [sent for sent, due in zip(found["bytes"], found["due"], strict=True) if not due]
    assert len(quiet) >= 6
    assert set(quiet) == {(low + len(SHAPES)) * itemsize}
    for sent, due in zip(found["bytes"][1:], found["due"][1:], strict=True):  # the power step's two, the product that tells
        thin = sum(RANK * (m + n) + m + 1 for m, n in (SHAPES[name] for name in due))
        assert sent == quiet[0] + 4 * thin, due


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_hook_sends_r_between_refreshes_and_the_gradient_of_what_is_due(dtype: str | None, tmp_path: Path, forked: Forked) -> None:
    """Beside whole gradients of what is not projected: 40 words of 24, three vectors of 24, and one of 32."""
    found = in_processes(forked, 2, Run(None, hook=True, steps=16, reduce_dtype=dtype), tmp_path)
    whole = WORDS * 24 + 3 * 24 + 32
    for sent, due in zip(found["bytes"], found["due"], strict=True):
        low = sum(6 * max(shape) for name, shape in SHAPES.items() if name not in due)
        refreshed = sum(m * n for name, (m, n) in SHAPES.items() if name in due)
        assert sent == (2 if dtype else 4) * (whole + low + refreshed), due
    assert sum(not due for due in found["due"]) >= 6


def test_a_mean_is_that_of_the_elements_in_whatever_order_a_process_holds_them(worlds: dict[int, World]) -> None:
    """A product with a factor by columns is one by columns: the processes' memory orders may differ."""
    for mean, wanted in worlds[2].run(mean_in_two_orders):
        assert torch.equal(mean, wanted)


def test_an_attachment_may_come_after_another(worlds: dict[int, World]) -> None:
    """Their processes meet in one group: torch gives a group that is made after one has ended its name, and both wait for ever."""
    first, second = worlds[2].run(attached_again)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def test_the_hook_refuses_what_it_cannot_do() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"optimizer is a SGD: low_rank_hook needs one of galore_torch"):
        g.LowRankHookState(torch.optim.SGD([weight]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduce_dtype=torch.float16 is not torch.float32, torch.bfloat16 or None"):
        g.LowRankHookState(g.GaLoreAdamW([weight]), reduce_dtype=torch.float16)


def test_bf16_on_the_wire_trains_alike_and_keeps_processes_equal(tmp_path: Path, forked: Forked) -> None:
    run = Run("direct", reduce_dtype="bfloat16", steps=12)
    difference = (in_processes(forked, 2, run, tmp_path)["weights"] - train(run, 0, 1)["weights"]).abs().amax()
    assert 1e-6 < difference < 2e-3


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process: what is refused is refused there too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped_model(mode: str, kind: type[Net] = Net) -> tuple[Any, Any, Any]:
    model = kind(Run())
    optimizer = optimizer_of(model, Run())
    wrapped = nn.parallel.DistributedDataParallel(model)
    return wrapped, optimizer, g.fused_backward(wrapped, optimizer, mode)


@pytest.mark.parametrize("mode", ["update", "direct_update"])
def test_updates_inside_the_backward_pass_refuse_no_sync(mode: str, group: None) -> None:
    wrapped, _optimizer, _ = wrapped_model(mode)
    with wrapped.no_sync(), pytest.raises(RuntimeError, match=r"under no_sync\(\) leaves gradients to be added up"):
        loss_of(wrapped, ids_of(0, 0, 0, False)).backward()


def test_what_does_not_work_inside_of_join_is_refused(group: None) -> None:
    ids = ids_of(0, 0, 0, False)
    wrapped, _optimizer, _ = wrapped_model("direct")
    with wrapped.join(), wrapped.no_sync(), pytest.raises(ValueError, match=r"under no_sync\(\) inside of join\(\)"):
        wrapped(ids)
    with wrapped.join(divide_by_initial_world_size=False), pytest.raises(ValueError, match=r"leave it True"):
        wrapped(ids)
    bare, _its, _ = wrapped_model("direct", Bare)
    with bare.join(), pytest.raises(ValueError, match=r"train a parameter that is not projected too"):
        bare(ids)
    model = Net(Run())
    optimizer = optimizer_of(model, Run())
    g.fused_backward(model, optimizer, "direct")
    late = nn.parallel.DistributedDataParallel(model)
    with late.join(), pytest.raises(ValueError, match=r"fused before it was wrapped does not work inside of join\(\)"):
        late(ids)


@pytest.mark.filterwarnings(f"ignore:{TORCHS_OWN}:DeprecationWarning")
def test_the_hook_refuses_join(group: None) -> None:
    """What it sends depends on which bases are due, which a process without batches does not know."""
    model = Net(Run())
    optimizer = optimizer_of(model, Run())
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(g.LowRankHookState(optimizer), g.low_rank_hook)
    with wrapped.join(), pytest.raises(ValueError, match=r"low_rank_hook does not work inside of join\(\)"):
        loss_of(wrapped, ids_of(0, 0, 0, False)).backward()


class Own(nn.parallel.DistributedDataParallel):
    """A wrapper of a framework's own."""


@pytest.mark.filterwarnings(f"ignore:{TORCHS_OWN}:DeprecationWarning")
def test_the_hook_works_in_a_subclass_of_the_wrapper_and_refuses_its_join(group: None) -> None:
    model = Net(Run())
    wrapped = Own(model)
    wrapped.register_comm_hook(g.LowRankHookState(optimizer := optimizer_of(model, Run())), g.low_rank_hook)
    loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    optimizer.step()
    with wrapped.join(), pytest.raises(ValueError, match=r"low_rank_hook does not work inside of join\(\)"):
        loss_of(wrapped, ids_of(0, 0, 0, False)).backward()


def test_a_subclass_of_the_wrapper_that_was_not_seen_is_refused(tmp_path: Path) -> None:
    """Fused before there were processes: its gradients would be used before they are averaged."""
    model = Net(Run())
    optimizer = optimizer_of(model, Run())
    attachment = g.fused_backward(model, optimizer, "update")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = Own(model)
        with pytest.raises(ValueError, match=r"a DistributedDataParallel that fused_backward has not seen"):
            loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    finally:
        attachment.remove()
        torch.distributed.destroy_process_group()


def test_a_removed_attachment_leaves_the_wrapper_as_it_was(group: None) -> None:
    """The reducer has all parameters again, and makes ordinary gradients of them."""
    wrapped, optimizer, attachment = wrapped_model("direct")
    loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert wrapped.module.mid.weight not in reduced(wrapped)
    attachment.remove()
    loss_of(wrapped, ids_of(1, 0, 0, False)).backward()
    assert reduced(wrapped) == set(wrapped.module.parameters())
    twin = copy.deepcopy(wrapped.module)
    twin.zero_grad()
    loss_of(twin, ids_of(1, 0, 0, False)).backward()
    for p, other in zip(wrapped.module.parameters(), twin.parameters(), strict=True):
        assert type(p.grad) is torch.Tensor
        assert torch.equal(p.grad, other.grad)


def test_a_second_optimizer_takes_the_place_of_one_that_is_gone(group: None) -> None:
    """The weights go back to the wrapper with the first one, and leave it again: nothing trains on gradients of one process."""
    wrapped, optimizer, _ = wrapped_model("direct")
    loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    wrapped.zero_grad()
    del optimizer, _
    gc.collect()
    second = optimizer_of(wrapped.module, Run())
    attachment = g.fused_backward(wrapped, second, "project")
    assert wrapped.module.mid.weight not in reduced(wrapped)
    loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    assert wrapped.module.mid.weight.grad.low.any()
    del second, attachment
    gc.collect()
    wrapped.zero_grad()
    loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    assert reduced(wrapped) == set(wrapped.module.parameters())


@pytest.mark.parametrize("mode", ["project", "update", "direct", "direct_update"])
def test_a_weight_of_a_later_group_leaves_the_wrapper_after_its_first_step(mode: str, group: None) -> None:
    """Oracle: the same without a wrapper, one process being as good as none."""
    results = []
    for wraps in (False, True):
        torch.manual_seed(0)
        model = Net(Run())
        model.words.requires_grad_(False)
        first = [p for p in model.parameters() if p.requires_grad and p is not model.mid.weight]
        optimizer = g.GaLoreAdamW([{"params": first, "rank": 6}], lr=2e-3, update_proj_gap=3)
        called = nn.parallel.DistributedDataParallel(model) if wraps else model
        attachment = g.fused_backward(called, optimizer, mode)
        for step in range(7):
            if step == 2:
                optimizer.add_param_group({"params": [model.mid.weight], "rank": 6})
            loss_of(called, ids_of(step, 0, 0, False)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if wraps:
            assert model.up.weight not in reduced(called)
            assert model.mid.weight not in reduced(called)
            attachment.remove()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])


def reduced(wrapped: Any) -> set[torch.Tensor]:
    """The parameters that a wrapper's reducer was built from."""
    return set(wrapped._build_params_for_reducer()[0])


def test_a_failed_backward_pass_leaves_the_next_one_whole(group: None) -> None:
    """Of a wrapper that has nothing to average itself: others do not go on after that."""
    wrapped, _optimizer, _ = wrapped_model("project", Bare)
    fails = wrapped.module.up.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    fails.remove()
    wrapped.zero_grad()
    loss_of(wrapped, ids_of(0, 0, 0, False)).backward()
    twin = Bare(Run())
    twin.load_state_dict(wrapped.module.state_dict())
    optimizer = optimizer_of(twin, Run())
    g.fused_backward(twin, optimizer)
    loss_of(twin, ids_of(0, 0, 0, False)).backward()
    torch.testing.assert_close(wrapped.module.up.weight.grad.low, twin.up.weight.grad.low)
