"""The two ways to count: a trace of the model's own passes, and formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.plan import traced as tracing
from galore_torch.train.plan.answer import _planned, plan_request, planned
from support.memory import peak_bytes

BF16 = {"dtype": "bfloat16"}
RUNS: list[dict[str, Any]] = [
    {"model_config": "9m", "optimizer": "adamw", "batch_size": 32, "max_length": 256},
    {"model_config": "60m", "optimizer": "galore_adamw", "batch_size": 4, "activation_checkpointing": True},
    {"model_config": "130m", "optimizer": "galore_adamw_per_layer", "batch_size": 2, "gradient_accumulation": 2},
    {"model_config": "1b", "optimizer": "adamw", "batch_size": 16, "max_length": 1024, **BF16},
    {"model_config": "1b", "optimizer": "lora", "batch_size": 4, **BF16},
    {"model_config": "7b", "optimizer": "galore_adamw8bit_per_layer", "batch_size": 1, **BF16},
    {"model_config": "7b", "optimizer": "galore_adamw8bit_per_layer", "batch_size": 16, "activation_checkpointing": True, **BF16},
    {"model_config": "llama3-8b", "optimizer": "galore_adamw8bit", "batch_size": 1, "max_length": 2048, **BF16},
]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), "cuda"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['model_config']}-{run['optimizer']}-{run['batch_size']}")
def test_a_trace_and_the_formulas_agree_within_3_percent(run: dict[str, Any], device: str) -> None:
    if run["optimizer"] == "lora" and device == "cuda":
        pytest.skip("a trace takes the CPU's dropout, whose masks are floating; on a GPU they are bytes, as in the formulas")
    request = plan_request(PretrainConfig(**run), device=device)
    trace, formulas = planned(request, traced=True), planned(request, traced=False)
    assert trace.traced
    assert not formulas.traced
    assert formulas.peak == pytest.approx(trace.peak, rel=0.03)


DIRECT: list[dict[str, Any]] = [
    {"model_config": "9m", "optimizer": "galore_adamw", "batch_size": 32},
    {"model_config": "20m", "optimizer": "galore_adamw8bit", "batch_size": 4, "proj_type": "right"},
    {"model_config": "35m", "optimizer": "galore_adamw", "batch_size": 8, "rank": 192, "loss_chunk": 64},
    {"model_config": "130m", "optimizer": "galore_adamw8bit_per_layer", "batch_size": 8, "loss_chunk": 64, **BF16},
    {"model_config": "350m", "optimizer": "galore_adamw", "batch_size": 8, "proj_type": "full", "activation_checkpointing": True},
    {"model_config": "1b", "optimizer": "galore_adamw8bit", "batch_size": 2, "gradient_accumulation": 2, **BF16},
    {"model_config": "llama3-8b", "optimizer": "qgalore_adamw8bit_per_layer", "batch_size": 1, "max_length": 2048, **BF16},
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, id=run["model_config"], marks=pytest.mark.slow if run["model_config"] in ("130m", "350m") else ())
        for run in DIRECT
    ],
)
def test_of_gradients_that_are_never_made_every_stage_agrees(run: dict[str, Any], first: bool) -> None:
    """The first step, which makes every basis, and those after it, whose inputs are kept projected."""
    request = replace(plan_request(PretrainConfig(**run), device="cuda"), refreshing=first)
    assert request.direct
    trace, formulas = _planned(request, True), _planned(request, False)
    assert trace.traced
    assert not formulas.traced
    lasting, expected = trace.weights + trace.basis + trace.moments, tracing.by_stage(formulas.phases)
    for stage, (phase,) in tracing.by_stage(trace.phases).items():
        assert lasting + max(each.total for each in expected[stage]) == pytest.approx(lasting + phase.total, rel=0.03), stage


def test_the_worse_of_the_first_step_and_those_after_it_is_planned() -> None:
    """Projected inputs of q, k, v, o, gate and up are less than the two whole ones that they share, up to a rank of a third."""
    common: dict[str, Any] = {"model_config": "60m", "optimizer": "galore_adamw", "batch_size": 8, "loss_chunk": 64}
    small, large = (planned(plan_request(PretrainConfig(**common, rank=rank), device="cpu"), traced=False) for rank in (128, 256))
    assert small.request.refreshing
    assert small.ordinary is not None
    assert small.ordinary < small.peak
    assert not large.request.refreshing
    assert large.ordinary is None
    full = planned(plan_request(PretrainConfig(**common, rank=128, gradients="full"), device="cpu"), traced=False)
    assert full.ordinary is None
    assert full.largest("gradients") > 1.4 * small.largest("gradients")


def test_phases_agree_too_not_only_their_largest() -> None:
    """Every stage of a backward pass, where the peak of one hides the others."""
    request = plan_request(PretrainConfig(model_config="60m", optimizer="galore_adamw", batch_size=4), device="cuda")
    lasting = request.total("weight") + request.total("basis") + request.total("moments")
    formulas = tracing.by_stage(planned(request, traced=False).phases)
    for stage, phase in tracing.by_stage(planned(request, traced=True).phases).items():
        assert lasting + max(each.total for each in formulas[stage]) == pytest.approx(lasting + phase[0].total, rel=0.03)


def test_without_torchs_tracker_the_formulas_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    request = plan_request(PretrainConfig(model_config="9m"), device="cuda")
    monkeypatch.setattr(tracing, "MemTracker", None)
    plan = planned(request, traced=True)
    assert not plan.traced
    assert plan.peak == planned(request, traced=False).peak


def test_planning_7b_makes_no_model() -> None:
    request = plan_request(PretrainConfig(model_config="7b", optimizer="galore_adamw8bit_per_layer", dtype="bfloat16"), device="cuda")
    assert peak_bytes(lambda: planned(request, traced=True)) < 10 * 2**20


@pytest.mark.parametrize(
    ("optimizer", "run", "published", "at_most"),
    [
        ("galore_adamw8bit_per_layer", {"max_length": 256}, 22.8, True),  # arXiv 2403.03507, section 5.5: 22.0 up to 500 tokens
        ("galore_adamw8bit_per_layer", {"batch_size": 16, "activation_checkpointing": True}, 22.8, True),  # its README: 4096 tokens
        ("qgalore_adamw8bit_per_layer", {"max_length": 256}, 16.0, True),  # arXiv 2407.08296
        ("adamw", {"max_length": 2048}, 50.0, False),  # arXiv 2403.03507, introduction: at least 58
    ],
)
def test_published_memory_of_7b(optimizer: str, run: dict[str, Any], published: float, at_most: bool) -> None:
    """In GB of 10**9 bytes, the stricter reading of the papers' "G" for an upper bound; tensors alone, as an allocator counts them."""
    config = PretrainConfig(model_config="7b", rank=1024, dtype="bfloat16", **{"batch_size": 1, **run})
    peak = planned(plan_request(config, device="cuda", optimizer=optimizer), traced=False).peak / 1e9
    assert (peak <= published) is at_most
    assert peak > 10
