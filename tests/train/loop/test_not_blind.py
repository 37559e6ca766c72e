"""On a real task the default projector keeps seeing the gradient at ranks 4 and 8, as a full decomposition would."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch.engine import step as engine
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.train.commands.finetune import read
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.loop.build import model_for
from galore_torch.train.model.heads import LabelLoss
from galore_torch.train.optimizers.registry import build_optimizer

STEPS, GAP = 40, 8


@pytest.fixture
def minilm() -> str:
    """The folder of a pre-trained BERT, of all-MiniLM-L6-v2's size."""
    folder = Path(os.environ.get("GALORE_TEST_MODELS", "")) / "minilm-l6"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("no pre-trained encoder: set GALORE_TEST_MODELS to a folder that has minilm-l6/ in it")
    return str(folder)


def held(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """(parameter, state, group) of the projected matrices."""
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return [(p, optimizer.state[p], group) for p, group in pairs if engine.layout_of(p, group).bases]


def seen(p: Tensor, state: dict[str, Any], group: dict[str, Any], grad: Tensor) -> float:
    """Energy of `grad` (m, n) inside the basis in use, over that of its own leading singular vectors."""
    ((axis, stored),) = engine.layout_of(p, group).bases.items()
    basis = stored.decode(state)  # orthonormal columns: (m, r) or (n, r)
    low = basis.mT @ grad if axis == -2 else grad @ basis
    return float(low.square().sum() / torch.linalg.svdvals(grad)[: basis.shape[-1]].square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 8])
def test_default_projector_sees_the_gradient_of_a_real_task(rank: int, minilm: str, shared_data: Path) -> None:
    """MRPC: at every refresh after the first, of every matrix. A basis of the first step that stayed would see little: no easy task."""
    settings: dict[str, Any] = {"rank": rank, "galore_scale": 16 / rank, "update_proj_gap": GAP, "lr": 1e-4, "gradients": "full"}
    config, data = read(
        FinetuneConfig(
            hf_model=minilm, task_name="mrpc", data_dir=str(shared_data / "glue"), device="cpu", num_training_steps=STEPS, **settings
        )
    )
    model = model_for(config, data)
    loss = LabelLoss(model, regression=False)
    optimizer = build_optimizer("galore_adamw", model, lr=1e-4, settings=config.optimizer_settings)
    batches = data.batches(config)
    shares: list[float] = []
    stale: list[float] = []
    first: dict[Tensor, Tensor] = {}
    for step in range(STEPS):
        inputs, targets = next(batches)
        (loss(inputs, targets) / len(targets)).backward()
        due = [(one, one[0].grad.clone()) for one in held(optimizer) if step and refresh_is_due(*one[1:])]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            first = {p: next(iter(engine.layout_of(p, group).bases.values())).decode(state).clone() for p, state, group in held(optimizer)}
        for (p, state, group), grad in due:
            shares.append(seen(p, state, group, grad))
            ((axis, _),) = engine.layout_of(p, group).bases.items()
            low = first[p].mT @ grad if axis == -2 else grad @ first[p]
            stale.append(float(low.square().sum() / torch.linalg.svdvals(grad)[:rank].square().sum()))
    print(f"rank {rank}: {len(shares)} refreshes, median {median(shares):.3f}, least {min(shares):.3f}; stale {median(stale):.3f}")
    assert len(shares) >= 36 * (STEPS // GAP - 1)
    assert median(shares) > 0.9
    assert min(shares) > 0.5
    assert median(stale) < 0.6
