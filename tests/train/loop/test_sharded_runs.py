"""`galore pretrain --parallel fsdp` and `hsdp`: parts of every weight in several processes are one process with the whole batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from galore_torch import cli
from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.parallel import mesh_shape
from galore_torch.train.errors import UserError
from galore_torch.train.plan.answer import plan_request, planned
from support.forked import Forked
from support.whole_runs import assert_close_runs, assert_same_run, command, killed_rank, rows, words

Make = Callable[..., PretrainConfig]


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """301 rows and 25 are uneven on two processes; the head is the embedding."""
    path = tmp_path / "tiny.json"
    shape = {"hidden_size": 16, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 301, "max_position_embeddings": 64, **shape}))
    return path


def together(forked: Forked, processes: int, config: PretrainConfig) -> list[str]:
    """What the processes of a run said, which has to end well."""
    forked.together(processes, words(config))
    codes, said = forked.wait()
    assert codes == [0] * processes, "\n".join(said)
    return said


CASES: dict[str, dict[str, Any]] = {
    "accumulated, clipped, the loss in chunks": {"total_batch_size": 16, "grad_clipping": 0.5, "loss_chunk": 24},
    "updated layer by layer": {"optimizer": "galore_adamw_per_layer", "loss_chunk": 0},
    "projected, accumulated, clipped": {"gradients": "project", "total_batch_size": 16, "grad_clipping": 0.5},
    "direct, accumulated, clipped": {"gradients": "direct", "total_batch_size": 16, "grad_clipping": 0.5},
    "direct, layer by layer": {"gradients": "direct", "optimizer": "galore_adamw_per_layer", "activation_checkpointing": True},
    "layer by layer, accumulated": {"optimizer": "galore_adamw_per_layer", "total_batch_size": 16},
    "layer by layer at full rank, clipped": {"optimizer": "adamw_per_layer", "grad_clipping": 0.5},
    # 11 windows of validation text: one process has a batch more than the other.
    "recomputed, evaluated on uneven parts": {"activation_checkpointing": True, "eval_tokens": 177, "legacy_eval": True},
    "streamed and padded, full rank": {
        "optimizer": "adamw",
        "pad_documents": True,
        "max_length": 64,
        "stream": True,
        "num_training_steps": 7,
    },
    "compiled": {"compile": True},
    **{name: {"optimizer": name} for name in ("galore_adafactor", "galore_sgd", "galore_adagrad", "adagrad", "sgd", "adamw_per_layer")},
}
QUICK = [*CASES][:4]


@pytest.mark.dist
@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES])
def test_two_processes_are_one_with_the_whole_batch(case: str, make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """The same losses, norms, weights, validation losses and numbers of tokens; the model is an ordinary one."""
    settings = {"optimizer": "galore_adamw", "num_training_steps": 8, "eval_every": 4, "save_every": 0, "batch_size": 4, "parallel": "fsdp"}
    settings |= CASES[case]
    said, other_said = together(forked, 2, make_config(**settings, save_dir=str(tmp_path / "two")))
    assert command(make_config(**(settings | {"batch_size": 8, "compile": False}), save_dir=str(tmp_path / "one")))[0] == 0
    assert "validation perplexity" in said
    assert not other_said, "the second process prints nothing"
    assert_close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.dist
def test_replicas_of_shards_are_one_process_with_the_whole_batch(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """Four processes on one machine: two replicas of two parts each."""
    settings = {"optimizer": "galore_adamw", "num_training_steps": 8, "eval_every": 4, "save_every": 4, "parallel": "hsdp"}
    together(forked, 4, make_config(**settings, batch_size=2, save_dir=str(tmp_path / "four")))
    assert command(make_config(**settings, batch_size=8, save_dir=str(tmp_path / "one")))[0] == 0
    assert_close_runs(tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
@pytest.mark.dist
def test_bf16_weights_train_as_in_one_process(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """Gradients are averaged in bf16, which rounds each to 8 bits: losses over 8 steps stay within 1 %."""
    settings = {"optimizer": "galore_adamw", "dtype": "bf16", "num_training_steps": 8, "parallel": "fsdp"}
    together(forked, 2, make_config(**settings, batch_size=4, save_dir=str(tmp_path / "two")))
    assert command(make_config(**settings, batch_size=8, save_dir=str(tmp_path / "one")))[0] == 0
    for mine, other in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in mine.keys() & {"loss", "eval_loss"}:
            assert mine[key] == pytest.approx(other[key], rel=0.01)


@pytest.mark.slow
@pytest.mark.dist
def test_compared_optimizers_are_their_single_runs(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """--nproc 2 --parallel fsdp --compare: one command."""
    settings = {"num_training_steps": 6, "batch_size": 4, "parallel": "fsdp"}
    config = make_config(**settings, optimizer="galore_adamw", nproc=2, processes=2, save_dir=str(tmp_path / "both"))
    left = words(config)
    del left[left.index("--optimizer") : left.index("--optimizer") + 2]
    code, said = forked.run(*left, "--compare", "galore_adamw,adamw")
    assert code == 0, said
    for name in ("galore_adamw", "adamw"):
        together(forked, 2, make_config(**settings, optimizer=name, save_dir=str(tmp_path / name)))
        assert_same_run(tmp_path / "both" / name, tmp_path / name)


@pytest.mark.dist
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_and_a_restart_gives_the_uninterrupted_one(
    killed: int, make_config: Make, tmp_path: Path, forked: Forked
) -> None:
    """kill -9, wherever the step is: the other says so in a line within seconds. The restart is bit-equal, on streamed text."""
    settings = {"num_training_steps": 30, "batch_size": 2, "optimizer": "galore_adamw", "save_every": 5, "parallel": "fsdp", "stream": True}
    together(forked, 2, make_config(**settings, save_dir=str(tmp_path / "whole")))
    killed_rank(forked, make_config(**settings), killed)
    assert checkpoints_in(tmp_path / "run" / "checkpoints")
    together(forked, 2, make_config(**settings, resume="auto"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


MOVES: dict[str, dict[str, Any]] = {
    "streamed": {"optimizer": "galore_adamw", "stream": True},
    "in memory, full rank, accumulated": {"optimizer": "adamw", "total_batch_size": 16},
    # The embedding has enough elements for 8 bits, and blocks as long as its parts allow.
    "8 bits": {"optimizer": "galore_adamw8bit"},
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "one", "other"),
    [
        ("streamed", 2, 1),
        ("streamed", 1, 2),
        *(pytest.param("streamed", *sizes, marks=pytest.mark.slow) for sizes in ((2, 4), (4, 2), (4, 1))),
        *(pytest.param(case, *sizes, marks=pytest.mark.slow) for case in [*MOVES][1:] for sizes in ((2, 1), (1, 2), (2, 4))),
    ],
)
def test_another_number_of_processes_goes_on_from_the_same_place(
    case: str, one: int, other: int, make_config: Make, tmp_path: Path, forked: Forked
) -> None:
    """From the middle of a run, whose every step has 8 or 16 sequences: the same text and losses, weights as sums in another order."""
    settings = {"num_training_steps": 8, "save_every": 4, "keep": 9, "eval_every": 4, "parallel": "fsdp"} | MOVES[case]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    together(forked, one, make_config(**settings, batch_size=8 // one, save_dir=str(whole)))
    middle = whole / "checkpoints" / "step-000004"
    assert (middle / "distributed").is_dir() == (one > 1)
    together(forked, other, make_config(**settings, batch_size=8 // other, save_dir=str(moved), resume=str(middle)))
    rel = 1e-6 if case != "8 bits" else 1e-3  # blocks of another length round otherwise
    for mine, theirs in zip(rows(moved), rows(whole), strict=True):
        assert mine["tokens_seen"] == theirs["tokens_seen"]
        for key in mine.keys() & {"loss", "eval_loss"}:
            assert mine[key] == pytest.approx(theirs[key], rel=rel), (mine["step"], key)
    weights = load_file(whole / "model" / "model.safetensors")
    for key, value in load_file(moved / "model" / "model.safetensors").items() if case != "8 bits" else ():
        torch.testing.assert_close(value, weights[key], rtol=0.0, atol=1e-6)


@pytest.mark.dist
def test_what_the_processes_hold_is_what_the_plan_says(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """Bytes of weights, gradients, state and activations in the first of two processes, measured in its first step, within 5 %.

    And a checkpoint of it is evaluated and exported as any other.
    """
    config = make_config(optimizer="galore_adamw", parallel="fsdp", num_training_steps=2, eval_every=1, processes=2, max_length=32)
    together(forked, 2, config)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (first,) = [row["memory_mb"] for row in lines if "memory_mb" in row]
    plan = planned(plan_request(config, device="cpu"), traced=False)
    assert first["weights"] * 1e6 == pytest.approx(plan.weights, rel=0.05)
    assert first["gradients"] * 1e6 == pytest.approx(plan.request.total("gradient"), rel=0.05)
    assert first["optimizer"] * 1e6 == pytest.approx(plan.basis + plan.moments, rel=0.05)
    assert cli.main(["export", str(tmp_path / "run" / "checkpoints" / "step-000002"), str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for key, value in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert torch.equal(exported[key], value), key


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "INT8 weights": ({"optimizer": "qgalore_adamw8bit"}, "weights held as INT8 are not cut; choose galore_adamw8bit"),
    "exchanged layers": ({"optimizer": "low_rank"}, "it exchanges layers of the model.*choose adamw, or --parallel ddp"),
    "transformers' Adafactor": ({"optimizer": "adafactor"}, "takes whole weights alone; choose galore_adafactor"),
    "three replicas": ({"parallel": "hsdp", "processes": 3}, "3 processes, 3 on this machine, are no equal replicas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused(case: str, make_config: Make) -> None:
    settings, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        make_config(**({"processes": 2, "parallel": "fsdp"} | settings))


def test_mesh_of_replicas_is_machines_by_processes() -> None:
    assert mesh_shape("ddp", 4, 4) == ()
    assert mesh_shape("fsdp", 16, 8) == (16,)
    assert mesh_shape("hsdp", 32, 8) == (4, 8)
    assert mesh_shape("hsdp", 8, 8) == (2, 4)
    for processes, machine in ((2, 2), (5, 5), (4, 1), (12, 8)):
        with pytest.raises(UserError, match="no equal replicas"):
            mesh_shape("hsdp", processes, machine)


def test_a_run_does_not_move_between_sides_of_the_basis(make_config: Make, tmp_path: Path) -> None:
    settings = {"optimizer": "galore_adamw", "save_every": 3}
    assert command(make_config(**settings))[0] == 0
    with pytest.raises(UserError, match=r"keeps bases on the columns, .* was trained with --proj_type std; go on with --parallel ddp"):
        command(make_config(**settings, resume="auto", parallel="fsdp"))
