"""PretrainConfig refuses what cannot work, and its schedule is the one on paper."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.optimizers.registry import OPTIMIZERS


@pytest.mark.parametrize(
    ("settings", "value", "cure"),
    [
        ({"rank": 0}, "--rank 0", "at least 1"),
        ({"rank": 128}, "--rank 128 is not below the width 128", "try --rank 32"),
        ({"lr": 0.0}, "--lr 0.0", "greater than 0"),
        ({"lr": math.nan}, "--lr nan", "greater than 0"),
        ({"lr": math.inf}, "--lr inf", "greater than 0"),
        ({"optimizer": "golore", "random_after": 100, "num_training_steps": 100}, "--random_after 100", "no basis would be random"),
        ({"galore_scale": -1.0}, "--galore_scale -1.0", "greater than 0"),
        ({"update_proj_gap": 0}, "--update_proj_gap 0", "at least 1"),
        ({"batch_size": 0}, "--batch_size 0", "at least 1"),
        ({"num_training_steps": 0}, "--num_training_steps 0", "at least 1"),
        ({"max_length": 0}, "--max_length 0", "at least 1"),
        ({"max_length": 2048}, "--max_length 2048", "smaller --max_length"),
        ({"total_batch_size": 24}, "--total_batch_size 24", "try --total_batch_size 16"),
        ({"total_batch_size": 8}, "--total_batch_size 8", "try --total_batch_size 16"),
        ({"num_training_steps": 9, "warmup_steps": 9}, "--warmup_steps 9", "less than --num_training_steps 9"),
        ({"warmup_steps": -1}, "--warmup_steps -1", "at least 0"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1", "at least 0"),
        ({"grad_clipping": -1.0}, "--grad_clipping -1.0", "at least 0"),
        ({"eval_every": -1}, "--eval_every -1", "at least 0"),
        ({"save_every": -1}, "--save_every -1", "at least 0"),
        ({"keep": 0}, "--keep 0", "at least 1"),
        ({"max_bad_steps": 0}, "--max_bad_steps 0", "at least 1"),
        ({"max_loss_rise": -1.0}, "--max_loss_rise -1.0", "at least 0"),
        ({"eval_tokens": 100}, "--eval_tokens 100", "128"),
        ({"beta1": 1.0}, "--beta1 1.0", "at least 0 and below 1"),
        ({"min_lr_ratio": 1.5}, "--min_lr_ratio 1.5", "between 0 and 1"),
        ({"seed": -1}, "--seed -1", "between 0"),
        ({"scheduler": "step"}, "'step'", "cosine"),
        ({"proj_type": "up"}, "'up'", "reverse_std"),
        ({"state_codec": "fp16"}, "--state_codec 'fp16'", "choose one of: fp32, bf16, int8"),
        ({"basis_codec": "int8"}, "--basis_codec 'int8'", "choose one of: fp32, bf16"),
        ({"optimizer": "adamw", "state_codec": "bf16", "given": frozenset({"state_codec"})}, "--state_codec", "no effect on adamw"),
        ({"dtype": "float16"}, "'float16'", "bfloat16"),
        ({"device": "tpu"}, "'tpu'", "cuda"),
        ({"optimizer": "lion"}, "'lion'", "galore_adamw8bit"),
        ({"compare": ("adamw", "AdamW")}, "twice", "write name:lr"),
        ({"compare": ("adamw:fast",)}, "'fast'", "adamw:0.00"),
        ({"compare": ("adamw:-1",)}, "'-1'", "greater than 0"),
        ({"model_config": "2m"}, "'2m'", "demo, 9m"),
    ],
)
def test_bad_setting_names_value_and_cure(settings: dict[str, Any], value: str, cure: str) -> None:
    with pytest.raises(UserError) as caught:
        PretrainConfig(**settings)
    assert value in str(caught.value)
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flag_without_effect_is_refused() -> None:
    with pytest.raises(UserError, match="--rank has no effect on adamw"):
        PretrainConfig(optimizer="adamw", rank=8, given=frozenset({"optimizer", "rank"}))
    with pytest.raises(UserError, match="--beta1 has no effect on galore_adagrad"):
        PretrainConfig(optimizer="galore_adagrad", beta1=0.5, given=frozenset({"optimizer", "beta1"}))


def test_gradients_that_cannot_be_are_refused() -> None:
    """`_per_layer` keeps none in full."""
    with pytest.raises(UserError, match=r"galore_adamw_per_layer keeps none; choose galore_adamw, or --gradients project"):
        PretrainConfig(optimizer="galore_adamw_per_layer", gradients="full")
    with pytest.raises(UserError, match="--gradients has no effect on adamw"):
        PretrainConfig(optimizer="adamw", gradients="direct", given=frozenset({"optimizer", "gradients"}))
    config = PretrainConfig(compare=("adamw", "galore_adamw"), gradients="full", given=frozenset({"compare", "gradients"}))
    assert config.notes == ["adamw does not use --gradients"]


def test_clipping_of_projected_gradients_is_noted() -> None:
    for settings, said in (({}, True), ({"gradients": "full"}, False), ({"optimizer": "adamw"}, False), ({"processes": 2}, True)):
        notes = PretrainConfig(grad_clipping=1.0, **settings).notes  # type: ignore[arg-type]
        assert any("measures galore_adamw's projected gradients" in note for note in notes) == said


def test_lr_floor_of_a_constant_schedule_is_refused() -> None:
    with pytest.raises(UserError, match=r"--min_lr_ratio 0.5 has no effect on --scheduler constant"):
        PretrainConfig(scheduler="constant", min_lr_ratio=0.5, given=frozenset({"scheduler", "min_lr_ratio"}))


def test_flag_that_some_of_the_compared_use_is_noted() -> None:
    config = PretrainConfig(compare=("adamw", "galore_adamw"), rank=8, given=frozenset({"compare", "rank"}))
    assert config.notes == ["adamw does not use --rank"]


def test_per_layer_without_a_rank_says_when_it_saves_nothing() -> None:
    """Clipping waits for all gradients: GaLore keeps them projected, a full-rank optimizer has to keep them whole."""
    for optimizer, said in (("adam8bit_per_layer", True), ("galore_adamw_per_layer", False), ("adamw", False)):
        assert any("keeps whole gradients" in note for note in PretrainConfig(optimizer=optimizer, grad_clipping=1.0).notes) == said
    assert not PretrainConfig(optimizer="adam8bit_per_layer").notes


def test_optimizer_beside_compare_is_refused() -> None:
    with pytest.raises(UserError, match="both given"):
        PretrainConfig(compare=("adamw",), optimizer="sgd", given=frozenset({"compare", "optimizer"}))


def test_each_contender_has_its_own_lr() -> None:
    config = PretrainConfig(compare=("AdamW", "galore_adamw:0.02"))
    assert config.contenders == [("adamw", OPTIMIZERS["adamw"].default_lr), ("galore_adamw", 0.02)]
    assert PretrainConfig(compare=("adamw", "sgd:1"), lr=0.5).contenders == [("adamw", 0.5), ("sgd", 1.0)]


@pytest.mark.parametrize(("scheduler", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_schedule_at_its_corners(scheduler: str, middle: float) -> None:
    """4 steps of warm-up, then 9: the first is the peak, the last min_lr_ratio, the fifth halfway between."""
    config = PretrainConfig(num_training_steps=13, warmup_steps=4, min_lr_ratio=0.1, scheduler=scheduler)
    factors = [config.lr_factor(step) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(middle)
    assert factors[12] == pytest.approx(1.0 if scheduler == "constant" else 0.1)
    assert all(later <= earlier for earlier, later in pairwise(factors[4:]))


def test_schedule_of_one_update_is_the_peak() -> None:
    assert PretrainConfig(num_training_steps=1).lr_factor(0) == 1.0


def test_one_optimizer_with_two_lrs_is_a_sweep() -> None:
    config = PretrainConfig(compare=("adamw:0.001", "adamw:0.01", "sgd"))
    assert config.run_names == ["adamw-lr0.001", "adamw-lr0.01", "sgd"]


def test_rates_that_are_nearly_the_same_have_folders_of_their_own() -> None:
    """Six digits do not tell these apart; the names of ordinary rates stay as they were."""
    config = PretrainConfig(compare=("adamw:0.001", "adamw:0.0010000001", "adamw:3e-05", "adamw:1e30", "adamw:1"))
    rates = ["0.001", "0.0010000001", "3e-05", "1e+30", "1"]
    assert config.run_names == [f"adamw-lr{rate}" for rate in rates]


def test_accumulation_is_the_ratio_of_the_batches() -> None:
    assert PretrainConfig(batch_size=4, total_batch_size=12).accumulation == 3
    assert PretrainConfig(batch_size=4).accumulation == 1
