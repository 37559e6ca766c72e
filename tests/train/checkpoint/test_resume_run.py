"""Where `--resume` goes on, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch.train.checkpoint import storage
from galore_torch.train.checkpoint.identity import check_identity, identity
from galore_torch.train.checkpoint.resume import find_starts
from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import load_data
from galore_torch.train.errors import UserError
from support.whole_runs import assert_same_run, command, rows

Make = Callable[..., PretrainConfig]


def test_auto_starts_afresh_where_nothing_was_saved(make_config: Make, tmp_path: Path) -> None:
    config = make_config(resume="auto")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 0, "ev')
    (run / "checkpoints" / ".tmp-step-000001").mkdir(parents=True)
    code, printed = command(config)
    assert (code, "resumed" in printed) == (0, False)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_auto_starts_afresh_beside_what_a_tracker_left(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert find_starts(make_config(resume="auto", tracker=("wandb",))).folder == run
    assert find_starts(make_config(resume="auto")).folder is None


def test_auto_names_and_skips_the_broken_ones(make_config: Make, tmp_path: Path) -> None:
    config = make_config(save_every=2, keep=9, resume="auto")
    assert command(config)[0] == 0
    first, second, third = checkpoints_in(tmp_path / "run" / "checkpoints")
    (third / "optimizer.safetensors").write_bytes((third / "optimizer.safetensors").read_bytes()[:-1])
    whole = rows(tmp_path / "run")
    code, printed = command(config)
    assert code == 0
    assert f"skipped: {third} is broken: optimizer.safetensors has" in printed
    assert "resumed    adamw after step 4" in printed
    assert rows(tmp_path / "run") == whole
    for path in (first, second, third):
        (path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"none of 3 checkpoints is whole; .*step-000006 is broken: model.safetensors is missing; give a new"
    ):
        command(config)


def test_finished_run_is_left_as_it_is(make_config: Make, tmp_path: Path) -> None:
    command(make_config())
    before, summary = rows(tmp_path / "run"), (tmp_path / "run" / "summary.json").read_text()
    code, printed = command(make_config(resume="auto"))
    assert (code, "resumed    adamw after step 6" in printed) == (0, True)
    assert rows(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(summary)


def test_comparison_goes_on_with_all_its_runs_and_more_and_never_with_fewer(make_config: Make, tmp_path: Path) -> None:
    """summary.json, results.md and loss.png are written with the runs of the call alone."""
    assert command(make_config(compare=("adamw", "sgd:0.1"), num_training_steps=1))[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for fewer in (("adamw",), ("sgd:0.1", "adagrad"), ("adamw", "sgd:0.1", "sgd:0.2")):
        lost = "sgd" if "adamw" in fewer else "adamw"
        with pytest.raises(UserError, match=rf"run also compares {lost}, whose records would be lost; name all in --compare, or give"):
            command(make_config(compare=fewer, num_training_steps=1, resume="auto"))
    assert {path: path.read_bytes() for path in before} == before
    assert command(make_config(compare=("sgd:0.1", "adagrad", "adamw"), num_training_steps=1, resume="auto"))[0] == 0
    records = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(record["optimizer"], record["steps"]) for record in records] == [("sgd", 1), ("adagrad", 1), ("adamw", 1)]


def test_a_folder_resumes_just_that_one(make_config: Make, tmp_path: Path) -> None:
    """Branched off into a new folder; in its own folder only where the run has not gone further."""
    command(make_config(save_every=2, keep=9))
    second, last = checkpoints_in(tmp_path / "run" / "checkpoints")[1:]
    with pytest.raises(
        UserError, match=r"the run has gone on to step-000006; go on from there with --save_dir .* --resume auto, or branch"
    ):
        command(make_config(resume=str(second), save_dir=None))
    code, printed = command(make_config(resume=str(second), save_dir=str(tmp_path / "branch")))
    assert (code, "after step 4" in printed) == (0, True)
    assert_same_run(tmp_path / "branch", tmp_path / "run")
    shutil.rmtree(last)
    assert command(make_config(resume=str(second), save_dir=None))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "branch")


def test_a_checkpoint_from_before_the_release_goes_on_bit_by_bit(make_config: Make, tmp_path: Path) -> None:
    """Its optimizer state says "turn" where it says "index" now. Oracle: the run that was not interrupted."""
    settings: dict[str, Any] = {"optimizer": "galore_adamw", "rank": 4, "num_training_steps": 6, "save_every": 3}
    assert command(make_config(**settings, save_dir=str(tmp_path / "whole")))[0] == 0
    older = tmp_path / "older" / "checkpoints" / "step-000003"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-000003", older)
    file = older / "optimizer.json"
    text = file.read_text()
    assert '"index"' in text
    file.write_text(text.replace('"index"', '"turn"'))
    (older / storage.MANIFEST).unlink()
    storage._seal(older, 3)
    assert command(make_config(**settings, save_dir=str(tmp_path / "on"), resume=str(older)))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "on")


def test_what_is_not_a_run_is_never_touched(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_text("weights of last week")
    with pytest.raises(UserError, match="already exists and is not empty"):
        command(make_config(resume="auto"))
    assert [path.name for path in run.iterdir()] == ["model.safetensors"]
    with pytest.raises(UserError, match=r"has no manifest.json: it is no whole checkpoint"):
        command(make_config(resume=str(run)))
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        command(make_config(resume="nowhere"))
    with pytest.raises(UserError, match=r"--resume auto looks for checkpoints in --save_dir"):
        command(make_config(resume="auto", save_dir=None))
    with pytest.raises(UserError, match=r"--compare has 2 runs; use --resume auto"):
        make_config(resume=str(run), compare=("adamw", "sgd"))


# --- another run's checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.5}, r"--lr is 0.5, but 0.003 in .*step-000006, which would change the run; give 0.003, or start a new run"),
        ({"seed": 1}, "--seed is 1, but 0"),
        ({"optimizer": "sgd"}, "--optimizer is sgd, but adamw"),
        ({"total_batch_size": 8}, "--total_batch_size is 8, but 4"),
        ({"num_training_steps": 7}, "--num_training_steps is 7, but 6"),
        ({"dtype": "bf16"}, "--dtype is bfloat16, but float32"),
        ({"max_length": 8}, "--max_length is 8, but 16"),
        ({"vocab_size": 310}, r"--model_config \(vocab_size\) is 310, but 300"),
        ({"text": "other"}, "--data gives .* was trained on .*; give the same text, --eval_data and --tokenizer"),
    ],
)
def test_contradicting_setting_is_refused(
    make_config: Make, text_file: Path, tmp_path: Path, changes: dict[str, Any], says: str, finished_run: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    if changes.pop("text", None):
        lines = text_file.read_text().splitlines()
        text_file.write_text("\n".join([lines[2], lines[1], lines[0], *lines[3:]]))  # the same name, and almost the same text
    with pytest.raises(UserError, match=says):
        command(make_config(resume="auto", **changes))
    assert rows(tmp_path / "run") == rows(finished_run)


@pytest.fixture
def finished_run(make_config: Make, shared: Path) -> Path:
    """One for all tests of this file: what is refused depends on the text, not on where it lies."""
    if not any(shared.iterdir()):
        command(make_config(save_dir=str(shared)))
    return shared


def test_settings_that_move_no_weight_may_change(make_config: Make, tmp_path: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    config = make_config(resume="auto", eval_every=2, save_every=3, keep=1, max_bad_steps=2, eval_tokens=64, activation_checkpointing=True)
    assert command(config)[0] == 0


def test_another_machine_is_noted(make_config: Make, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    _, printed = command(make_config(resume="auto"))
    assert "threads was 1 and is 99 now: the run goes on, but not to the last bit" in printed


# --- the same run in other words ------------------------------------------------------------------------------------------


def refuse_or_pass(config: PretrainConfig) -> None:
    """What `galore pretrain` does before it changes anything."""
    data = load_data(config)
    ((name, lr),) = config.contenders
    (checkpoint,) = find_starts(config).checkpoints.values()
    check_identity(checkpoint, config, identity(config, name, lr, data))


@pytest.mark.parametrize(
    ("settings", "same", "other"),
    [
        (
            {"optimizer": "adamw"},
            {"lr": 0.003, "rank": 4, "warmup_steps": 0, "beta1": 0.9, "total_batch_size": 4, "vocab_size": 300, "max_train_tokens": 400},
            {"beta1": 0.8},
        ),
        ({"optimizer": "adamw"}, {"rank": 2, "update_proj_gap": 7, "galore_scale": 9.0, "proj_type": "full"}, {"weight_decay": 0.1}),
        ({"scheduler": "wsd"}, {"decay_steps": 1}, {"decay_steps": 2}),
        ({"scheduler": "cosine_restarts", "cycle_length": 3, "warmup_steps": 1}, {"restart_warmup_steps": 1}, {"restart_warmup_steps": 2}),
        ({"optimizer": "sgd"}, {"beta1": 0.0}, {"beta1": 0.9}),
        ({"optimizer": "galore_adafactor"}, {"beta1": 0.0, "rank": 4, "state_codec": "fp32"}, {"rank": 3}),
        ({"optimizer": "galore_adamw"}, {"state_codec": "fp32", "basis_codec": "fp32", "beta1": 0.9}, {"state_codec": "bf16"}),
        ({"optimizer": "galore_adamw8bit"}, {"state_codec": "int8", "basis_codec": "bf16"}, {"basis_codec": "fp32"}),
        ({"optimizer": "galore_adamw", "state_codec": "fp32"}, {"state_codec": None}, {"state_codec": "int8"}),
    ],
)
def test_what_settings_amount_to_is_compared(
    make_config: Make, tmp_path: Path, settings: dict[str, Any], same: dict[str, Any], other: dict[str, Any]
) -> None:
    """A default given by name changes nothing, nor does what the optimizer does not use; another value is refused."""
    command(make_config(**settings))
    refuse_or_pass(make_config(**settings | same, resume="auto"))
    flag, value = next(iter(other.items()))
    with pytest.raises(UserError, match=f"--{flag} is {value}, but .* which would change the run"):
        refuse_or_pass(make_config(**settings | other, resume="auto"))


def test_setting_younger_than_the_checkpoint_had_its_default(make_config: Make, tmp_path: Path) -> None:
    command(make_config(optimizer="galore_adamw"))
    (checkpoint,) = checkpoints_in(tmp_path / "run" / "checkpoints")
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    for flag in ("state_codec", "basis_codec"):
        del trainer["identity"][flag]
    (checkpoint / "trainer.json").write_text(json.dumps(trainer))
    config = make_config(optimizer="galore_adamw")
    name, lr = config.contenders[0]
    for changes, says in (({}, None), ({"state_codec": "fp32"}, None), ({"state_codec": "bf16"}, "--state_codec is bf16, but fp32 in")):
        config = make_config(optimizer="galore_adamw", **changes)
        with pytest.raises(UserError, match=says) if says else nullcontext():
            check_identity(checkpoint, config, identity(config, name, lr, load_data(config)))


def test_moved_hf_model_is_the_same_and_another_one_is_not(make_config: Make, tmp_path: Path, finished_run: Path) -> None:
    model = Path(shutil.copytree(finished_run / "model", tmp_path / "model"))
    changes: dict[str, Any] = {"model_config": "demo", "optimizer": "galore_adamw", "rank": 4, "save_every": 3}
    assert command(make_config(hf_model=str(model), **changes))[0] == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    model = model.rename(tmp_path / "moved")
    code, printed = command(make_config(hf_model=str(model), resume="auto", **changes))
    assert (code, "resumed    galore_adamw after step 3" in printed) == (0, True)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    other = Path(shutil.copytree(model, tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"--hf_model .*other has rms_norm_eps 0.1, but 1e-06 in .*; give the model that the run began with"
    ):
        refuse_or_pass(make_config(hf_model=str(other), resume="auto", **changes))
    with pytest.raises(UserError, match=r"--hf_model is None, but .*moved in"):
        refuse_or_pass(make_config(**changes | {"model_config": str(model)}, resume="auto"))
