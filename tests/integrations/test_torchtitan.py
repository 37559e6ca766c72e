"""torchtitan's OptimizersContainer, whose optimizers stand in a fixed table: a subclass adds a row. Its flat state_dict resumes exactly.

Oracles: the same optimizer without the container, an uninterrupted run, and AdamW by the container. No GPU: its trainer is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

import galore_torch as g
from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import RANK, difference, llama, windows

FRAMEWORK, PACKAGE = "torchtitan", "torchtitan"


class GaLoreOptimizers(OptimizersContainer):
    """What docs/frameworks.md shows."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        own = {"GaLoreAdamW": g.GaLoreAdamW, "GaLoreAdamW8bit": g.GaLoreAdamW8bit, "GaLoreAdafactor": g.GaLoreAdafactor}
        return own[name] if name in own else OptimizersContainer._resolve_optimizer_factory(name)


def container(model: nn.Module, name: str) -> OptimizersContainer:
    plain: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0}
    galore = {**plain, **RANK, "scale": 1.0} if name != "AdamW" else plain
    groups = [
        ParamGroupConfig(pattern=r"(attn|mlp)\..*weight$", optimizer_name=name, optimizer_kwargs=galore),
        ParamGroupConfig(pattern=r".*", optimizer_name=name, optimizer_kwargs=plain),
    ]
    return GaLoreOptimizers(GaLoreOptimizers.Config(param_groups=groups, implementation="for-loop"), model_parts=[model])


def steps(model: nn.Module, optimizer: Any, which: range) -> None:
    data = windows(WINDOWS)
    for step in which:
        ids = torch.tensor([each["input_ids"] for each in data[4 * step : 4 * step + 4]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"])
def test_container(name: str, tmp_path: Path, record: Any) -> None:
    """Saved by distributed checkpoint, as torchtitan does, and loaded into a fresh container."""
    straight, other = llama(), llama()
    optimizer = container(straight, name)
    steps(straight, optimizer, range(STEPS // 2))
    dcp.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    steps(straight, optimizer, range(STEPS // 2, STEPS))

    resumed = llama(seed=1)
    again = container(resumed, name)
    saved = {"model": resumed.state_dict(), "optimizer": again.state_dict()}
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    steps(resumed, again, range(STEPS // 2, STEPS))

    named = list(other.named_parameters())
    inside = [pair for pair in named if ("attn." in pair[0] or "mlp." in pair[0]) and pair[0].endswith("weight")]
    outside = [pair for pair in named if pair[0] not in dict(inside)]
    made = getattr(g, name)([{"params": inside, **RANK, "scale": 1.0}, {"params": outside}], lr=0.01, weight_decay=0.0)
    steps(other, made, range(STEPS))
    assert difference(straight, other) == 0.0

    adamw = llama()
    steps(adamw, container(adamw, "AdamW"), range(STEPS))
    compare(record, f"`{name}` in its container, saved by DCP", straight, resumed, adamw)


def test_without_the_subclass_it_is_refused(record: Any) -> None:
    groups = [ParamGroupConfig(pattern=r".*", optimizer_name="GaLoreAdamW", optimizer_kwargs={"lr": 0.01})]
    with pytest.raises(NotImplementedError, match="GaLoreAdamW not added"):
        OptimizersContainer(OptimizersContainer.Config(param_groups=groups, implementation="for-loop"), model_parts=[llama()])
    record("its own container by name", "refused")
