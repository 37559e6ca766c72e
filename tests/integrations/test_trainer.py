"""Hugging Face Trainer: by name, with an optimizer of the user's, fused and layer-wise. Oracles: an uninterrupted run, and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

import galore_torch as g
from integrations.compare import STEPS, WINDOWS, compare, held_out_loss
from support.hf_runs import RANK, TARGETS, difference, llama, logged, run

FRAMEWORK, PACKAGE = "Hugging Face Trainer", "transformers"
OLD = version("transformers").startswith("4.")
SIZE: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS // 2, "count": WINDOWS}
NAMED: dict[str, Any] = {"optim_target_modules": TARGETS, "optim_args": "rank=8,update_proj_gap=4,scale=1.0"}
BF16 = {"dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    """options -> the model that AdamW trains with them."""

    @cache
    def train(options: tuple[tuple[str, Any], ...]) -> nn.Module:
        chosen = {**SIZE, **dict(options), "optim": "adamw_torch"}
        return run(tmp_path_factory.mktemp("adamw"), **chosen).model

    return lambda **options: train(tuple(sorted(options.items())))


def both(folder: Path, make: Any = None, trainer: Any = None, **options: Any) -> tuple[Any, nn.Module]:
    """(Trainer of the uninterrupted run, model of the one resumed from its middle)."""
    straight = run(folder, make, trainer, **SIZE, **options)
    return straight, run(folder, make, trainer, resume=True, **SIZE, **options).model


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "galore_adafactor"])
def test_name(name: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    straight, resumed = both(tmp_path, optim=name, **NAMED)
    compare(record, f"`{name}`", straight.model, resumed, adamw())


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 4},
    "clipping": {"max_grad_norm": 0.05},
    "linear schedule": {"lr_scheduler_type": "linear"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16 autocast": {"bf16": True},
}


@pytest.mark.parametrize("feature", OPTIONS)
def test_option(feature: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    options = OPTIONS[feature]
    straight, resumed = both(tmp_path / "with", optim="galore_adamw", **NAMED, **options)
    without = run(tmp_path / "without", optim="galore_adamw", **NAMED, **SIZE)
    assert (difference(straight.model, without.model) == 0.0) is (feature == "gradient checkpointing")
    compare(record, feature, straight.model, resumed, adamw(**options))


def make(model: nn.Module) -> Any:
    """What no name of Trainer can ask for: decay and betas reach the optimizer."""
    return g.GaLoreAdamW(g.galore_param_groups(model, **RANK, scale=1.0), lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)


def fused(mode: str) -> Any:
    def attached(model: nn.Module) -> Any:
        optimizer = make(model)
        g.fused_backward(model, optimizer, mode)
        return optimizer

    return attached


def layerwise(mode: str) -> type:
    return type("LayerwiseTrainer", (g.LayerwiseMixin, Trainer), {"fused_mode": mode})


WAYS: dict[str, tuple[Any, type | None, dict[str, Any]]] = {
    "`optimizers=(optimizer, None)`": (make, None, {}),
    "`fused_backward` project": (fused("project"), None, {}),
    "`fused_backward` direct": (fused("direct"), None, {}),
    "`fused_backward` project with accumulation and clipping": (
        fused("project"),
        None,
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ),
    "`fused_backward` direct with accumulation and clipping": (
        fused("direct"),
        None,
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ),
    "`LayerwiseMixin` update": (make, layerwise("update"), {"max_grad_norm": 0.0}),
    "`LayerwiseMixin` direct_update": (make, layerwise("direct_update"), {"max_grad_norm": 0.0}),
    "`LayerwiseMixin` project with accumulation": (make, layerwise("project"), {"gradient_accumulation_steps": 2}),
    "bf16 weights": (make, None, BF16),
    "`LayerwiseMixin` update on bf16 weights": (make, layerwise("update"), {"max_grad_norm": 0.0, **BF16}),
}


@pytest.mark.parametrize("feature", WAYS)
def test_own_optimizer(feature: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    maker, trainer, options = WAYS[feature]
    straight, resumed = both(tmp_path, maker, trainer, **options)
    rates = logged(straight, "learning_rate")
    assert len(set(rates)) > STEPS // 2, "the schedule is not the arguments'"
    compare(record, feature, straight.model, resumed, adamw(**options))


def test_layerwise_equals_trainers_own_step(tmp_path: Path, record: Any) -> None:
    plain = run(tmp_path / "plain", make, max_grad_norm=0.0, **SIZE)
    ours = run(tmp_path / "ours", make, layerwise("update"), max_grad_norm=0.0, **SIZE)
    assert difference(plain.model, ours.model) == 0.0
    record("`LayerwiseMixin` gives the bits of Trainer's own step")


def test_mode_update_without_the_mixin_is_refused(tmp_path: Path, record: Any) -> None:
    """By 5.x, which always measures the norm; 4.x does not where clipping is off."""
    refused = nullcontext() if OLD else pytest.raises(RuntimeError, match="consumed inside the backward pass")
    with refused:
        run(tmp_path, fused("update"), max_grad_norm=0.0, **SIZE)
    record("`fused_backward` update alone", "works" if OLD else "refused")


def test_layerwise_refuses_accumulation_and_clipping(tmp_path: Path, record: Any) -> None:
    for options in ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, {"max_grad_norm": 1.0}):
        with pytest.raises(ValueError, match="needs all gradients at once"):
            run(tmp_path, make, layerwise("update"), **SIZE, **options)
    record("`LayerwiseMixin` update with accumulation or clipping", "refused")


def test_settings_that_names_do_not_pass_on(tmp_path: Path, record: Any) -> None:
    """transformers' own doing. A failure here is good news: then the page is out of date."""
    base = run(tmp_path / "base", optim="galore_adamw", **NAMED, **SIZE)
    options = {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_epsilon": 1e-3}
    other = run(tmp_path / "other", optim="galore_adamw", **NAMED, **SIZE, **options)
    assert difference(base.model, other.model) == 0.0
    record("`weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon` with a name", "ignored")


def test_other_keys_of_optim_args(tmp_path: Path, record: Any) -> None:
    """5.x drops them, as above; 4.x puts them into the group as words, where a slip is refused."""

    def with_key(key: str) -> nn.Module:
        return run(tmp_path, optim="galore_adamw", **{**NAMED, **SIZE, "optim_args": NAMED["optim_args"] + key}).model

    plain, svd = with_key(""), with_key(",projector=svd")
    feature = "other keys of `optim_args`, such as `projector=svd`"
    if OLD:
        assert difference(plain, svd) > 0.0
        with pytest.raises(ValueError, match="did you mean 'scale'"):
            with_key(",scael=3")
        record(feature)
    else:
        assert difference(plain, svd) == difference(plain, with_key(",scael=3")) == 0.0
        record(feature, "ignored")


def test_layerwise_names_of_transformers_are_wrong(tmp_path: Path, record: Any) -> None:
    """transformers' own doing, as above: the rate in use is constant, the optimizer's state is not saved; 4.x fails."""
    options = {"optim": "galore_adamw_layerwise", **NAMED}
    feature = "`galore_adamw_layerwise` and the like"
    if OLD:
        with pytest.raises(ValueError, match=r"zip\(\)"):
            both(tmp_path / "cosine", **options)
        record(feature, "wrong", note="stops at the first step")
        return
    straight, resumed = both(tmp_path / "cosine", **options)
    linear = run(tmp_path / "linear", lr_scheduler_type="linear", **options, **SIZE)
    assert logged(straight, "learning_rate") != logged(linear, "learning_rate")
    assert difference(straight.model, linear.model) == 0.0
    apart = difference(straight.model, resumed)
    assert apart > 0.0
    record(feature, "wrong", note="no schedule, no clipping, state lost at a resume", resume=apart, loss=held_out_loss(straight.model))


def test_q_galore_trains_saves_and_loads(tmp_path: Path, adamw: Any, record: Any) -> None:
    """INT8 weights, INT4 basis. A checkpoint is an ordinary bf16 model, whose weights are quantised again at a resume."""
    from transformers import AutoModelForCausalLM

    def quantised(model: nn.Module) -> Any:
        return g.QGaLoreAdamW8bit(g.galore_param_groups(model, **RANK, scale=1.0), lr=0.01)

    def started() -> nn.Module:
        return g.quantize_linears(llama().to(torch.bfloat16))

    straight = run(tmp_path, quantised, model=started(), **SIZE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}", dtype=torch.bfloat16)
    exact = g.dequantize_linears(straight.model)
    assert difference(again, exact) == 0.0
    resumed = run(tmp_path, quantised, model=started(), resume=True, **SIZE)
    other = adamw(**BF16)
    start = held_out_loss(llama().to(torch.bfloat16))
    losses = [held_out_loss(model) for model in (exact, g.dequantize_linears(resumed.model), other)]
    assert all(start - loss >= 0.9 * (start - losses[2]) for loss in losses[:2])
    apart = difference(exact, resumed.model)
    record(
        "Q-GaLore trains, saves and loads",
        note="a resume quantises the bf16 weights of the checkpoint",
        resume=apart,
        loss=losses[0],
        adamw=losses[2],
    )
