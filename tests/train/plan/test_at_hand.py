"""A run that the plan says cannot fit is refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.plan import at_hand
from galore_torch.train.plan.answer import planned_peak_bytes

EIGHT = {"model_config": "llama3-8b", "optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", "batch_size": 1}


def with_memory(monkeypatch: pytest.MonkeyPatch, **free: int | None) -> None:
    monkeypatch.setattr(at_hand, "memory_at_hand", lambda device: free[device])


def test_refusal_has_both_numbers_and_the_cure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """At the command line, before a folder, a tokenizer or a model is made; the case that the system's killer once ended."""
    with_memory(monkeypatch, cpu=16 * 10**9)
    monkeypatch.chdir(tmp_path)
    words = "--model_config llama3-8b --optimizer galore_adamw8bit_per_layer --dtype bfloat16 --batch_size 1 --device cpu"
    assert cli.main(["pretrain", *words.split()]) == 2
    error = capsys.readouterr().err
    needed = planned_peak_bytes(PretrainConfig(**EIGHT, device="cpu"), 128256, EIGHT["optimizer"])  # type: ignore[arg-type]
    assert needed is not None
    assert f"needs {needed / 1e9:.2f} GB" in error
    assert "16.00 GB free" in error
    assert "--force" in error
    assert "galore plan --model llama3-8b --device cpu --memory 16.00GB" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_the_bound_is_the_planned_peak(spare: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(model_config="60m", optimizer="galore_adamw", device="cpu")
    peak = planned_peak_bytes(config, 32000, "galore_adamw")
    assert peak is not None
    with_memory(monkeypatch, cpu=peak + spare)
    if fits:
        at_hand.check_memory(config, "cpu")
    else:
        with pytest.raises(UserError, match="free"):
            at_hand.check_memory(config, "cpu")


def test_targets_are_in_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few projected layers leave more state: what fits by default is refused, where the plan of the chosen layers does not fit."""
    settings = {"model_config": "60m", "optimizer": "galore_adamw", "device": "cpu"}
    default = planned_peak_bytes(PretrainConfig(**settings), 32000, "galore_adamw")  # type: ignore[arg-type]
    few = PretrainConfig(**settings, rank=128, targets=("q_proj",))  # type: ignore[arg-type]
    needed = planned_peak_bytes(few, 32000, "galore_adamw")
    assert default is not None
    assert needed is not None
    assert needed > default
    with_memory(monkeypatch, cpu=default)
    at_hand.check_memory(PretrainConfig(**settings), "cpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="free"):
        at_hand.check_memory(few, "cpu")
    with_memory(monkeypatch, cpu=needed)
    at_hand.check_memory(few, "cpu")


def test_every_contender_and_every_process_of_a_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(model_config="60m", compare=("galore_adamw8bit", "adamw"), device="cpu")
    peaks = [planned_peak_bytes(config, 32000, name) for name in config.compare]
    assert peaks[0] is not None
    with_memory(monkeypatch, cpu=peaks[0])
    with pytest.raises(UserError, match="adamw on 60m"):
        at_hand.check_memory(config, "cpu")
    alone = PretrainConfig(model_config="60m", optimizer="galore_adamw8bit", device="cpu")
    at_hand.check_memory(alone, "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="free"):
        at_hand.check_memory(alone, "cpu")


def test_a_gpus_weights_are_made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, cuda=80 * 10**9, cpu=10**10)
    with pytest.raises(UserError, match=r"needs 16.06 GB .* the host.* has 10.00 GB"):
        at_hand.check_memory(PretrainConfig(**EIGHT), "cuda")  # type: ignore[arg-type]
    with_memory(monkeypatch, cuda=80 * 10**9, cpu=10**11)
    at_hand.check_memory(PretrainConfig(**EIGHT), "cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"force": True}, {}])
def test_force_and_a_system_that_does_not_say_go_on(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, cpu=1 if settings else None)
    at_hand.check_memory(PretrainConfig(**EIGHT, **settings), "cpu")  # type: ignore[arg-type]


def test_of_another_family_weights_and_state_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its activations are an estimate, which must refuse nothing."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8, "time_step_rank": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", **sizes}))
    config = PretrainConfig(hf_model=str(tmp_path), optimizer="adamw", device="cpu", max_length=64, batch_size=2)
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path)))
    counters = 4 * len(list(model.parameters()))  # of steps
    lasting = 3 * sum(p.nbytes for p in model.parameters()) + counters
    with_memory(monkeypatch, cpu=lasting)
    at_hand.check_memory(config, "cpu")
    with_memory(monkeypatch, cpu=lasting - 1)
    with pytest.raises(UserError, match="free"):
        at_hand.check_memory(config, "cpu")
