"""`galore plan --parallel fsdp` against what processes hold."""

from __future__ import annotations

from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.plan.analytic import PlanRequest
from galore_torch.train.plan.answer import plan_request, planned
from support.sharded import held
from support.world import World

SIZES = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 501}


def planned_gradients(request: PlanRequest) -> int:
    """Bytes of all that waits for the step."""
    return request.sizes.layers * request.kept_of(request.layer) + request.kept_of(request.outer)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("optimizer", "gradients"),
    [
        *((name, None) for name in ("galore_adamw", "galore_adamw8bit", "galore_adafactor", "adamw")),
        *(("galore_adamw", mode) for mode in ("project", "direct")),
    ],
)
def test_what_lasts_is_what_the_first_process_holds(
    optimizer: str, gradients: str | None, size: int, worlds: dict[int, World], tmp_path: Any
) -> None:
    """Weights, gradients, bases and moments after two steps, to the byte but for counters of 4 bytes; 501 rows and 172 are uneven on 4."""
    import json

    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 128, **SIZES}))
    text = {"max_length": 16, "batch_size": 1}
    config = PretrainConfig(model_config=str(path), optimizer=optimizer, rank=8, dtype="float32", gradients=gradients, **text)
    plan = planned(plan_request(config, device="cpu", shards=size), traced=True)
    weights, kept, state = worlds[size].run(held, str(path), optimizer, config.optimizer_settings, gradients or "")[0]
    assert weights == plan.weights
    assert kept == planned_gradients(plan.request)
    assert state == pytest.approx(plan.basis + plan.moments, rel=0.001)


def test_the_command_says_what_is_shared(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "7b", "--world_size", "8", "--parallel", "fsdp"]
    assert cli.main(words) == 0
    assert "of the first of 8 processes, which share weights" in capsys.readouterr().out
    assert cli.main([*words, "--memory", "1GB"]) == 1
    assert "does not fit" in capsys.readouterr().out
    replicas = ["plan", "--model", "7b", "--world_size", "32", "--nproc", "8", "--parallel", "hsdp"]
    assert cli.main(replicas) == 0
    assert "of the first of 8 processes, which share weights" in capsys.readouterr().out
    for more, message in (
        (["--optimizer", "qgalore_adamw8bit"], "does not train under --parallel fsdp"),
        (["--compare"], "leave it out, or --parallel fsdp"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
