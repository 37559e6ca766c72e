"""Processes that train together are one process with the whole batch: losses, weights, text, evaluation, stopping, resuming."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import batches, load_data, windows_in_order
from galore_torch.train.errors import UserError
from galore_torch.train.loop.distributed import Ranks, launched
from support.forked import Forked
from support.whole_runs import assert_close_runs, assert_same_run, command, killed_rank, rows, words

Make = Callable[..., PretrainConfig]


CASES: dict[str, dict[str, Any]] = {
    "packed in memory, accumulated, clipped": {"total_batch_size": 16, "grad_clipping": 0.5},
    "updated layer by layer": {"optimizer": "galore_adamw_per_layer"},
    "projected": {"gradients": "project"},
    "whole gradients": {"gradients": "full", "grad_clipping": 0.5},
    "padded in memory": {"pad_documents": True, "max_length": 64},
    # Within the first pass of 57 documents: a pass that does not divide leaves one process a document ahead of the other.
    "padded and streamed": {"pad_documents": True, "max_length": 64, "stream": True, "num_training_steps": 7},
}


SLOW = {"padded in memory", "projected", "whole gradients"}


@pytest.mark.dist
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else []) for case in CASES])
def test_two_processes_are_one_with_the_whole_batch(case: str, make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """The same documents in every step: the same losses, norms, weights, validation loss and number of tokens."""
    settings = {"optimizer": "galore_adamw", "num_training_steps": 8, "eval_every": 4, "save_every": 0, "batch_size": 4} | CASES[case]
    two = make_config(**settings, save_dir=str(tmp_path / "two"))
    one = make_config(**(settings | {"batch_size": 8}), save_dir=str(tmp_path / "one"))
    forked.together(2, words(two))
    assert command(one)[0] == 0
    codes, (said, other_said) = forked.wait()
    assert codes == [0, 0], said + other_said
    assert "validation perplexity" in said
    assert not other_said, "the second process prints nothing"
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["resolved"]["processes"] == 2


@pytest.mark.dist
def test_sigterm_to_one_stops_all_and_the_run_goes_on_bit_equal(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """Streamed and packed: each process has a place of its own in the text, and gets it back."""
    settings = {"stream": True, "num_training_steps": 40, "batch_size": 2, "optimizer": "galore_adamw", "eval_every": 20}
    forked.together(2, words(make_config(**settings, save_dir=str(tmp_path / "whole"))))
    codes, said = forked.wait()
    assert codes == [0, 0], said
    config = make_config(**settings)
    first, _ = forked.together(2, [*words(config), "--resume", "auto"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 6) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(first, signal.SIGTERM)
    codes, said = forked.wait()
    assert codes == [143, 1], said
    (saved,) = checkpoints_in(tmp_path / "run" / "checkpoints")
    positions = json.loads((saved / "trainer.json").read_text())["positions"]
    assert len(positions) == 2
    assert positions[0] != positions[1]
    moved = make_config(**(settings | {"batch_size": 4, "save_dir": str(tmp_path / "moved")}), resume=str(saved))
    assert command(moved)[0] == 0, "one process goes on with the same text"
    assert_close_runs(tmp_path / "moved", tmp_path / "whole")
    with pytest.raises(UserError, match=r"--batch_size 2 in 1 processes is 2 sequences at once, and 4 in .*, which would change the run"):
        command(make_config(**(settings | {"total_batch_size": 4}), resume="auto"))
    forked.together(2, [*words(config), "--resume", "auto"])
    codes, said = forked.wait()
    assert codes == [0, 0], said
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for key, value in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert torch.equal(weights[key], value), key
    forked.together(2, [*words(config), "--resume", "auto"])
    assert forked.wait()[0] == [0, 0], "nothing is left to do, and nobody waits for another"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("killed", "optimizer"),
    [(0, "galore_adamw_per_layer"), (1, "galore_adamw_per_layer"), pytest.param(1, "qgalore_adamw8bit", marks=pytest.mark.slow)],
)
def test_a_killed_process_ends_the_run_and_a_restart_gives_the_uninterrupted_one(
    killed: int, optimizer: str, make_config: Make, tmp_path: Path, forked: Forked
) -> None:
    """kill -9: the others hear of it in their next exchange, say so in a line, and leave the last checkpoint as it was. Also of INT8
    weights, which are then the same bits."""
    settings = {"num_training_steps": 30, "batch_size": 2, "optimizer": optimizer, "save_every": 5}
    forked.together(2, words(make_config(**settings, save_dir=str(tmp_path / "whole"))))
    codes, said = forked.wait()
    assert codes == [0, 0], said
    config = make_config(**settings)
    other = killed_rank(forked, config, killed)
    if killed == 1:
        assert f"--save_dir {tmp_path / 'run'} --resume auto" in other
    assert checkpoints_in(tmp_path / "run" / "checkpoints")
    forked.together(2, [*words(config), "--resume", "auto"])
    codes, said = forked.wait()
    assert codes == [0, 0], said
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.dist
def test_nproc_starts_processes_that_are_one_with_the_whole_batch(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    """--nproc 2 --parallel ddp: one command, whose output is that of one process."""
    settings = {"optimizer": "galore_adamw", "num_training_steps": 6, "eval_every": 3, "batch_size": 4}
    two = make_config(**settings, nproc=2, processes=2, save_dir=str(tmp_path / "two"))
    code, said = forked.run(*words(two), "--parallel", "ddp")
    assert code == 0, said
    assert said.count("config, metrics, picture, checkpoints and model:") == 1
    assert command(make_config(**(settings | {"batch_size": 8}), save_dir=str(tmp_path / "one")))[0] == 0
    assert_close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.dist
def test_nproc_says_which_process_ended_the_run(make_config: Make, tmp_path: Path, forked: Forked) -> None:
    config = make_config(num_training_steps=4000, batch_size=2, nproc=2, processes=2, save_every=5, optimizer="galore_adamw")
    (launcher,) = forked.start(words(config))  # what it starts takes seconds to import torch
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 7) and time.monotonic() < deadline:
        time.sleep(0.005)
    _, second = children(launcher)
    os.kill(second, signal.SIGKILL)
    (code,), (said,) = forked.wait()
    assert code == 1, said
    assert "process 1 of 2 was ended by SIGKILL" in said
    assert f"--save_dir {tmp_path / 'run'} --resume auto" in said


def children(process: int) -> list[int]:
    """The ids of a process's children, the eldest first."""
    return sorted(int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split())


def test_nproc_beside_a_launcher_is_refused(make_config: Make) -> None:
    with pytest.raises(UserError, match="--nproc 4 starts processes, and a launcher has started 2 already"):
        make_config(nproc=4, processes=2)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_share_the_windows_of_a_pass_exactly_once(ranks: int) -> None:
    """40 windows: after as many draws together as one process makes in three passes, the same ones in the same steps."""
    tokens = torch.arange(40 * 8 + 1, dtype=torch.int32)
    one = [inputs[:, 0].tolist() for inputs, _ in islice(batches(tokens, 8, ranks, seed=1), 120 // ranks)]
    shares = [
        [inputs[:, 0].tolist() for inputs, _ in islice(batches(tokens, 8, 1, seed=1, rank=rank, ranks=ranks), 120 // ranks)]
        for rank in range(ranks)
    ]
    together = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == one
    first_pass = list(chain(*together))[:40]
    assert sorted(first_pass) == list(range(0, 320, 8))


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_ranks_evaluate_every_window_exactly_once(ranks: int) -> None:
    tokens = torch.arange(11 * 8 + 4, dtype=torch.int32)
    shares = [windows_in_order(tokens, 8, 3, rank, ranks) for rank in range(ranks)]
    assert torch.cat([inputs.flatten() for share in shares for inputs, _ in share]).tolist() == list(range(88))


def test_batch_is_that_of_all_processes(make_config: Make) -> None:
    assert make_config(processes=4, batch_size=2).sequences_per_update == 8
    config = make_config(processes=4, batch_size=2, total_batch_size=32)
    assert (config.accumulation, config.sequences_per_update) == (4, 32)
    assert make_config(processes=4, batch_size=2, gradient_accumulation=3).sequences_per_update == 24
    config = make_config(processes=4, batch_size=2, max_train_tokens=1280)
    assert config.num_training_steps == 1280 // (8 * 16)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"total_batch_size": 12}, r"--total_batch_size 12 is not a multiple of --batch_size 4 x 2 processes; try --total_batch_size 8"),
        (
            {"optimizer": "adamw_per_layer"},
            "2 processes keep theirs until they are averaged, so nothing would be saved; choose adamw, or one process",
        ),
        ({"eval_tokens": 20}, "--eval_tokens 20 is less than one sequence for each of 2 processes, 32"),
    ],
)
def test_what_processes_cannot_share_is_refused(make_config: Make, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_config(processes=2, **settings)


def test_text_too_short_for_the_processes_is_refused(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words more than one sequence has, and no more than that, as it is to be so")
    with pytest.raises(UserError, match=r"validation text has \d+ tokens; one sequence needs 30 processes x --max_length \+ 1 = 481"):
        load_data(make_config(processes=30, eval_data=(str(tmp_path / "short.txt"),)))


@pytest.mark.parametrize(
    ("environment", "says"),
    [({"WORLD_SIZE": "two"}, "is no whole number .*'two'.*start with torchrun"), ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 is not below")],
)
def test_launcher_that_says_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        launched()


def test_one_process_says_nothing_to_nobody() -> None:
    alone = Ranks()
    module = torch.nn.Linear(2, 2)
    assert alone.wrap(module) is module
    assert alone.total(1.5, 2) == [1.5, 2]
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert alone.mean((0.1, 7)) == (0.1, 7)
    assert alone.mean(None) is None
    assert alone.every({"row": 3}) == [{"row": 3}]
