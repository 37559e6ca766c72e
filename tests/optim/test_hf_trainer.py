"""LayerwiseMixin in the real Trainer. Oracle: Trainer's own step with the same optimizer, bit for bit.

More of Trainer, and other frameworks, is in tests/integrations, which `make test-integrations` runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from support.hf_runs import RANK, TARGETS, difference, llama, logged, run

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the Trainer's own

CLASSES: dict[str, Any] = {
    "galore_adamw": g.GaLoreAdamW,
    "galore_adamw_8bit": lambda groups, **k: g.GaLoreAdamW8bit(groups, min_8bit_size=0, **k),
    "galore_adafactor": g.GaLoreAdafactor,
}
UPDATES: dict[str, Any] = {"max_grad_norm": 0.0}  # what a mode that updates in the backward pass asks for


def maker(name: str = "galore_adamw") -> Any:
    return lambda model: CLASSES[name](g.galore_param_groups(model, **RANK), lr=0.01, weight_decay=0.1)


def layerwise(mode: str = "update") -> Any:
    from transformers import Trainer

    return type("LayerwiseTrainer", (g.LayerwiseMixin, Trainer), {"fused_mode": mode})


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if "8bit" in name else ()) for name in CLASSES])
def test_layerwise_is_trainers_own_step_with_its_schedule_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", maker(name), **UPDATES)
    ours = run(tmp_path / "ours", maker(name), layerwise(), **UPDATES)
    assert difference(plain.model, ours.model) == 0.0
    rates = logged(ours, "learning_rate")
    assert rates == logged(plain, "learning_rate")
    assert len(set(rates)) > 6  # warm-up and decay, not one constant rate
    assert not logged(ours, "grad_norm")
    assert all(norm > 0 for norm in logged(plain, "grad_norm"))
    again = run(tmp_path / "ours", maker(name), layerwise(), resume=True, **UPDATES)
    assert difference(again.model, ours.model) == 0.0
    assert difference(llama(), ours.model) > 0.01


def test_gradients_are_gone_when_the_backward_pass_ends(tmp_path: Path) -> None:
    """Of two layers' full gradients at most a few are ever there together."""
    together = []

    def watched(model: nn.Module) -> Any:
        params = list(model.parameters())
        hook = lambda _: together.append(sum(q.grad is not None and type(q.grad) is torch.Tensor for q in params))  # noqa: E731
        for p in params:
            p.register_post_accumulate_grad_hook(hook)  # before the attachment's own, so that the gradient is still there
        return maker()(model)

    trainer = run(tmp_path, watched, layerwise(), **UPDATES)
    assert max(together) == 1
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("mode", ["project", "direct"])
def test_modes_that_keep_low_rank_gradients_accumulate_and_clip(mode: str, tmp_path: Path) -> None:
    """Oracle: the same optimizer, attached by the user."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}

    def attached(model: nn.Module) -> Any:
        optimizer = maker()(model)
        g.fused_backward(model, optimizer, mode)
        return optimizer

    own = run(tmp_path / "own", attached, **options)
    ours = run(tmp_path / "ours", maker(), layerwise(mode), **options)
    assert difference(own.model, ours.model) == 0.0
    assert logged(ours, "grad_norm") == logged(own, "grad_norm")
    unclipped = run(tmp_path / "unclipped", maker(), layerwise(mode), **{**options, "max_grad_norm": 0.0})
    assert difference(unclipped.model, ours.model) > 0.0


def test_it_takes_the_optimizer_that_trainer_makes_by_name(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "galore_adamw", "optim_target_modules": TARGETS, "optim_args": "rank=8,update_proj_gap=4"}
    plain = run(tmp_path / "plain", **options, **UPDATES)
    ours = run(tmp_path / "ours", trainer=layerwise("direct_update"), **options, **UPDATES)
    kept = run(tmp_path / "kept", trainer=layerwise("direct"), **options, **UPDATES)
    assert difference(kept.model, ours.model) == 0.0
    assert difference(plain.model, ours.model) < 0.05  # a basis from factors differs in rounding
    again = run(tmp_path / "ours", trainer=layerwise("direct_update"), resume=True, **options, **UPDATES)
    assert difference(again.model, ours.model) == 0.0


def test_training_again_attaches_once(tmp_path: Path) -> None:
    trainer = run(tmp_path, maker(), layerwise(), **UPDATES)
    optimizer = trainer.optimizer.optimizer
    trainer.train()
    assert len(optimizer.attachments) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, r"gradient_accumulation_steps=2 needs all .* set it to 1"),
        ({}, r"max_grad_norm=1.0 needs all gradients at once.* set it to 0, or set fused_mode = 'project'"),
        ({"optim": "galore_adamw_layerwise"}, r"optim='galore_adamw_layerwise' hooks .* use 'galore_adamw'"),
    ],
)
def test_what_needs_all_gradients_is_refused_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, maker(), layerwise(), **options)


def test_fp16_is_refused() -> None:
    """Its gradients are scaled until all of them are there. Trainer itself refuses it on a CPU, so a stand-in has the argument."""
    from types import SimpleNamespace

    class Trainer(g.LayerwiseMixin):
        args = SimpleNamespace(optim="adamw_torch", gradient_accumulation_steps=1, max_grad_norm=0.0, fp16=True)

    with pytest.raises(ValueError, match=r"fp16=True needs all .* use bf16"):
        Trainer().create_optimizer()


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer is a AdamW: fused_backward needs one of galore_torch"):
        run(tmp_path, None, layerwise(), optim="adamw_torch", **UPDATES)
