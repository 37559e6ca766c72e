"""The shipped recipes are the published runs, number by number; list, show and copy; and the wheel holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from galore_torch import cli
from galore_torch.optim.methods import METHODS
from galore_torch.train.config.flags import config_from
from galore_torch.train.config.recipes import recipe_names
from galore_torch.train.optimizers.registry import OPTIMIZERS

# The published scripts: optimizer, lr, rank, gap, sequences at once, steps, warm-up, clipping, activation checkpointing.
RUNS = {
    "60m": ("galore_adamw", 0.01, 128, 200, 256, 10_000, 1_000, 0.0, False),
    "130m": ("galore_adamw", 0.01, 256, 200, 256, 20_000, 2_000, 0.0, False),
    "350m": ("galore_adamw", 0.01, 256, 200, 128, 60_000, 6_000, 0.0, False),
    "1b": ("galore_adamw", 0.01, 1024, 200, 16, 100_000, 10_000, 0.0, False),
    "7b": ("galore_adamw", 0.005, 1024, 500, 8, 150_000, 15_000, 1.0, False),
    "7b-single-gpu": ("galore_adamw8bit_per_layer", 0.005, 1024, 500, 1, 150_000, 15_000, 1.0, False),
    "7b-single-gpu-checkpointing": ("galore_adamw8bit_per_layer", 0.005, 1024, 500, 16, 150_000, 15_000, 1.0, True),
}


@pytest.mark.parametrize("name", RUNS)
def test_recipe_is_the_published_run(name: str) -> None:
    c = config_from({"config": name})
    found = (c.optimizer, c.lr, c.rank, c.update_proj_gap, c.batch_size, c.num_training_steps, c.warmup, c.grad_clipping)
    assert (*found, c.activation_checkpointing) == RUNS[name]
    assert c.gradients_of(c.optimizer) == "direct"
    assert (c.model_config, c.data, c.streams) == (name.split("-")[0], ("c4",), True)
    assert (c.sequences_per_update, c.max_length, c.dtype, c.galore_scale) == (512, 256, "bfloat16", 0.25)
    assert (c.scheduler, c.min_lr_ratio, c.weight_decay, c.seed, c.eval_every, c.eval_tokens) == ("cosine", 0.1, 0.0, 0, 1000, 10**7)


def test_every_recipe_is_checked() -> None:
    assert recipe_names() == list(RUNS), "the smallest first"


def test_list_names_each_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["recipes"], ["recipes", "list"]):
        assert cli.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(RUNS)
        assert "34.88" in lines[0]


def test_methods_are_the_names_of_optimizers_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert set(METHODS) <= set(OPTIMIZERS)
    assert all(method.source in line for line, method in zip(lines, METHODS.values(), strict=True))


def test_show_prints_the_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "show", "60m"]) == 0
    assert json.loads(capsys.readouterr().out)["update_proj_gap"] == 200


def test_copy_writes_a_file_that_pretrain_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", "60m"]) == 0
    assert "galore pretrain --config 60m.json" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    assert cli.main(["recipes", "copy", "60m", "folder"]) == 0
    assert cli.main(["recipes", "copy", "60m", "mine.json"]) == 0
    for path in ("60m.json", "folder/60m.json", "mine.json"):
        assert config_from({"config": path}) == config_from({"config": "60m"})


def test_copy_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text("edited all day")
    assert cli.main(["recipes", "copy", "60m", str(path)]) == 2
    assert "mine.json already exists; give another name" in capsys.readouterr().err
    assert path.read_text() == "edited all day"


@pytest.mark.parametrize("action", ["show", "copy"])
def test_unknown_recipe_lists_them(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", action, "61m"]) == 2
    assert "recipe '61m' is not known; did you mean 60m? choose one of: 60m, 130m" in capsys.readouterr().err
