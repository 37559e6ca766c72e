"""`galore plan` as a user meets it: tables, verdicts, recipes that `galore pretrain` takes, pictures, and one line for nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch import cli
from galore_torch.choices import STATE_CODECS
from galore_torch.train.commands.plan import COMPARED
from galore_torch.train.config.flags import config_from
from galore_torch.train.errors import UserError
from galore_torch.train.optimizers.registry import build_optimizer
from galore_torch.train.plan.answer import plan_request, planned
from galore_torch.train.plan.search import best_that_fits
from galore_torch.train.plan.show import parts
from galore_torch.train.plan.units import gb, parse_memory

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--model llama_9b", "neither a preset nor a config file"),
        ("--model qwen3-8", "did you mean Qwen3-8B"),
        ("--model 60n", "did you mean 60m"),
        ("--model nobody/Qwen3-8B", "neither a preset nor a config file"),
        ("--model 7b --batch 0", "--batch_size 0 is out of bounds"),
        ("--model 7b --seq 0", "--max_length 0 is out of bounds"),
        ("--model 7b --seq 4096", "2048 positions"),
        ("--model 7b --memory -24GB", "must be above 0"),
        ("--model 7b --memory 0GB", "must be above 0"),
        ("--model 7b --memory lots", "is no amount of memory"),
        ("--model 7b --memory 24", "is no amount of memory"),
        ("--model 7b --rank 5000", "not below the width 4096"),
        ("--model 7b --rank 0", "--rank 0 is out of bounds"),
        ("--model 7b --world_size 0", "--world_size 0 is out of bounds"),
        ("--model 7b --card GTX-9000", "is not known; give --memory"),
        ("--model 7b --card T4 --memory 24GB", "leave one of them out"),
        ("--model 7b --card T4 --device cpu", "leave one of them out"),
        ("--model 7b --optimizer adamv", "is not known; did you mean adam? choose one of"),
        ("--model 7b --dtype int3", "is not known; choose one of"),
        ("--model 7b --state_codec int3", "is not known; did you mean int8? choose one of"),
        ("--model 7b --optimizer fira --state_codec mulaw4", "fira: state_codec='mulaw4' is too coarse for the moments of the rule 'adam'"),
        ("--model 7b --compare --state_codec mulaw4", "galore_adamw: state_codec='mulaw4' is too coarse"),
        ("--model 7b -o recipe.json", "give --memory or --card"),
        ("--model 7b --picture a.png", "has no effect alone"),
        ("--model 7b --sweep rank --optimizer adamw", "has no rank"),
        ("--model 7b --compare --optimizer muon", "--optimizer muon has no effect with --compare"),
        ("--model 7b --compare --sweep rank", "--sweep rank has no effect with --compare"),
        ("--model 7b --batch many", "invalid int value"),
        ("--memory 24GB", "--model"),
    ],
)
def test_nonsense_is_refused_in_one_line(words: str, says: str, capsys: Out) -> None:
    assert cli.main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_rows_of_a_plan_add_up(capsys: Out) -> None:
    assert cli.main(["plan", "--model", "60m", "--batch", "4", "--rank", "128"]) == 0
    shown = capsys.readouterr().out
    for name in ("weights", "gradients", "basis", "moments", "activations", "logits", "transient", "reserve", "needed"):
        assert name in shown
    config = config_from({"model_config": "60m", "batch_size": 4, "optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16"})
    plan = planned(plan_request(config, device="cuda"), traced=True)
    assert sum(parts(plan).values()) == plan.peak
    assert gb(plan.needed) in shown


def test_targets_are_planned_and_in_the_recipe(capsys: Out) -> None:
    """Named in the plan's title; a pattern that matches nothing is one line."""
    words = "plan --model 9m --optimizer galore_adamw --dtype float32 --targets q_proj v_proj"
    assert cli.main(words.split()) == 0
    assert "targets q_proj v_proj" in capsys.readouterr().out
    assert cli.main([*words.split(), "--memory", "2GB", "-o", "recipe.json"]) == 0
    assert config_from({"config": "recipe.json"}).targets == ("q_proj", "v_proj")
    capsys.readouterr()
    assert cli.main(["plan", "--model", "9m", "--targets", "nothing_of_the_kind"]) == 2
    error = capsys.readouterr().err
    assert "matches no linear layer" in error
    assert error.count("\n") == 1


def test_best_recipe_for_a_card_is_a_config_that_pretrain_takes(tmp_path: Path, capsys: Out) -> None:
    assert cli.main(["plan", "--model", "llama_7b", "--memory", "24GB", "-o", "recipe.json"]) == 0
    assert "fits in 24.00 GB" in capsys.readouterr().out
    config = config_from({"config": "recipe.json"})
    assert (config.model_name, config.torch_dtype, config.rank) == ("llama_7b", "bfloat16", 1024)
    assert planned(plan_request(config, device="cuda"), traced=False).needed <= 24e9
    assert cli.main(["plan", "--model", "llama_7b", "--memory", "24GB", "-o", "recipe.json"]) == 2  # never over a file
    assert "already exists" in capsys.readouterr().err


def test_recipe_of_several_processes_says_what_each_accumulates(tmp_path: Path) -> None:
    """Not --total_batch_size, which is of all processes: the recipe is taken by any number of them."""
    words = "plan --model 9m --memory 2GB --batch 4 --world_size 4 --gradient_accumulation 2 -o recipe.json"
    assert cli.main(words.split()) == 0
    for processes in (1, 2, 4):
        config = config_from({"config": "recipe.json"}, processes)
        assert (config.batch_size, config.accumulation, config.sequences_per_update) == (4, 2, 8 * processes)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "galore_sgd", "galore_muon", "muon", "ldadam", "apollo", "adam8bit"])
@pytest.mark.parametrize("codec", STATE_CODECS)
def test_codecs_are_refused_in_the_words_of_the_run(name: str, codec: str) -> None:
    """Oracle: the optimizer itself, built for a layer without values."""
    try:
        config = config_from({"optimizer": name, "state_codec": codec, "model_config": "9m"})
    except UserError:
        return  # by the settings' own check, which both commands share
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(512, 512), "head": nn.Linear(512, 512)})

    def said(ask: Callable[[], Any]) -> str | None:
        try:
            ask()
        except UserError as error:
            return str(error)
        return None

    built = said(lambda: build_optimizer(name, model, lr=0.1, settings=config.optimizer_settings | {"targets": ("layer",)}))
    assert said(lambda: plan_request(config, device="cuda")) == built


def test_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    """Nothing is planned; a folder that is missing is made, as by galore report, and what is there stays as it is."""
    work: list[None] = []
    monkeypatch.setattr("galore_torch.train.commands.plan._for_a_card", lambda *_: work.append(None) or 0)
    monkeypatch.setattr("galore_torch.train.commands.plan.show_rows", lambda *_: work.append(None))
    Path("file.txt").write_text("mine")
    for words, says in (
        ("--memory 24GB -o .", "-o . already exists; give a new name"),
        ("--memory 24GB -o file.txt", "-o file.txt already exists; give a new name"),
        ("--memory 24GB -o file.txt/r.json", "-o file.txt/r.json cannot be written: "),
        ("--compare --picture file.txt/r.png", "--picture file.txt/r.png cannot be written: "),
        ("--sweep rank --picture r.json", "--picture r.json is no picture; give a name that ends in .png"),
        ("--sweep rank --picture r", "--picture r is no picture; give a name that ends in .png"),
    ):
        assert cli.main(["plan", "--model", "7b", *words.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert (work, Path("file.txt").read_text()) == ([], "mine")
    assert cli.main(["plan", "--model", "7b", "--memory", "24GB", "-o", "new/r.json"]) == 0
    assert cli.main(["plan", "--model", "60m", "--sweep", "rank", "--picture", "other/r.png"]) == 0
    assert len(work) == 2
    assert (list(Path("new").iterdir()), [path.name for path in Path("other").iterdir()]) == ([], ["r.png"])


def test_a_card_has_one_answer_by_name_and_by_memory(capsys: Out) -> None:
    """The same recipe, the same verdict; by name there is the time beside it."""
    shown = []
    for words in ("--card 4090", "--memory 24GB"):
        assert cli.main(["plan", "--model", "1b", *words.split(), "-o", f"{len(shown)}.json"]) == 0
        shown.append(capsys.readouterr().out.splitlines())
    assert Path("0.json").read_text() == Path("1.json").read_text()
    by_name, by_memory = ([line for line in lines if line.startswith("fits in 24.00 GB")] for lines in shown)
    assert by_name == by_memory
    assert any(line.startswith("time ") and "estimate" in line and "40%" in line for line in shown[0])
    assert not any(line.startswith("time ") for line in shown[1])


def test_beside_the_recipe_stand_the_batch_without_recomputing_and_int8_weights(capsys: Out) -> None:
    assert cli.main(["plan", "--model", "7b", "--memory", "24GB"]) == 0
    shown = capsys.readouterr().out
    assert "sequences of 256 tokens, the default" in shown
    rows = {line.split("  ")[0].strip(): line.split() for line in shown.splitlines() if "galore_adamw8bit" in line and "  " in line}
    (plain,) = (words for name, words in rows.items() if name == "largest batch without recomputing")
    (int8,) = (words for name, words in rows.items() if "INT8" in name)
    given = {"model_config": "7b", "dtype": "bfloat16", "optimizer": plain[-5], "rank": int(plain[-4]), "activation_checkpointing": False}

    def needed(**changes: Any) -> float:
        return planned(plan_request(config_from({**given, **changes}), device="cuda"), traced=False).needed

    assert plain[-2] == "no"
    assert needed(batch_size=int(plain[-3])) <= 24e9 < needed(batch_size=2 * int(plain[-3]))
    assert int(int8[-4]) == 2048  # half the width: the largest that is tried
    assert cli.main(["plan", "--model", "7b", "--memory", "24GB", "--optimizer", "galore_adamw8bit_per_layer", "--seq", "512"]) == 0
    shown = capsys.readouterr().out
    assert "INT8" not in shown  # what is given stays
    assert "the default" not in shown


def test_best_recipe_leaves_nothing_on_the_table() -> None:
    """No candidate that comes before the chosen one fits: rank first, then batch, then recomputing."""
    given = {"model_config": "1b", "dtype": "bfloat16", "optimizer": "galore_adamw8bit_per_layer"}
    best = best_that_fits(given, 10 * 10**9, "cuda", traced=False)
    assert best is not None
    chosen, plan = best
    assert plan.needed <= 10e9

    def needed(**changes: Any) -> int:
        settings = {"rank": chosen.rank, "batch_size": chosen.batch_size, "activation_checkpointing": chosen.activation_checkpointing}
        return planned(plan_request(config_from({**given, **settings, **changes}), device="cuda"), traced=False).needed

    assert chosen.rank == 1024  # half the width, the largest that is tried
    assert needed(batch_size=2 * chosen.batch_size, activation_checkpointing=True) > 10e9
    assert not chosen.activation_checkpointing or needed(activation_checkpointing=False) > 10e9


def test_what_is_given_stays(capsys: Out) -> None:
    given = {"model_config": "1b", "dtype": "bfloat16", "optimizer": "galore_adamw", "rank": 64, "batch_size": 2}
    best = best_that_fits(given, 24 * 10**9, "cuda", traced=False)
    assert best is not None
    assert {name: getattr(best[0], name) for name in given} == given


def test_codecs_change_the_plan_and_go_into_the_recipe(tmp_path: Path, capsys: Out) -> None:
    words = "--model 60m --optimizer galore_adamw --rank 128 --state_codec bf16 --basis_codec bf16"
    assert cli.main(["plan", *words.split(), "--memory", "2GB", "-o", "recipe.json"]) == 0
    chosen = config_from({"config": "recipe.json"})
    assert (chosen.state_codec, chosen.basis_codec) == ("bf16", "bf16")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert cli.main(["plan", "--model", "60m", "--optimizer", "galore_adamw", "--rank", "128", "--basis_codec", "fp32"]) == 0
    plain = [line.split() for line in capsys.readouterr().out.splitlines()]

    def basis(lines: list[list[str]]) -> float:
        return float(next(words for words in lines if words[:1] == ["basis,"])[-2])

    assert basis(rows) == pytest.approx(basis(plain) / 2, rel=1e-2)


def test_what_cannot_fit_says_so_and_leaves_with_1(capsys: Out) -> None:
    assert cli.main(["plan", "--model", "7b", "--optimizer", "adamw", "--card", "T4"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_compare_and_sweep_print_and_draw(tmp_path: Path, capsys: Out) -> None:
    assert cli.main(["plan", "--model", "7b", "--rank", "1024", "--compare", "--card", "4090"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMPARED)
    assert (tmp_path / "plan-compare.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", "--model", "1b", "--sweep", "rank", "--picture", "curve.png"]) == 0
    assert {"64", "128", "256", "512", "1024"} <= set(capsys.readouterr().out.split())
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_memory_grows_with_the_rank_and_falls_with_every_saving() -> None:
    def needed(**settings: Any) -> int:
        config = config_from({"model_config": "1b", "dtype": "bfloat16", "batch_size": 1, **settings})
        return planned(plan_request(config, device="cuda"), traced=False).needed

    ranks = [needed(optimizer="galore_adamw", rank=rank) for rank in (64, 128, 256, 512, 1024)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 5
    names = ["adamw", "adam8bit", "galore_adamw8bit", "galore_adamw8bit_per_layer"]
    savings = [needed(optimizer=name) for name in names]
    assert savings == sorted(savings, reverse=True)


def test_processes_of_data_parallel_training_each_hold_everything(capsys: Out) -> None:
    assert cli.main(["plan", "--model", "60m", "--world_size", "8"]) == 0
    assert "of each of 8 processes: weights, gradients and state are replicated" in capsys.readouterr().out


def test_gradients_that_are_never_made_are_planned(capsys: Out) -> None:
    """In several processes too; what is asked for by name is in the recipe."""
    words = ["plan", "--model", "60m", "--optimizer", "galore_adamw"]
    said = []
    for more in ([], ["--world_size", "2"], ["--gradients", "full"], ["--gradients", "direct", "--memory", "24GB", "-o", "recipe.json"]):
        assert cli.main([*words, *more]) == 0
        said.append("no gradient of a projected linear layer is made in full" in capsys.readouterr().out)
    assert said == [True, True, False, True]
    assert json.loads(Path("recipe.json").read_text())["gradients"] == "direct"
    assert cli.main(["plan", "--model", "60m", "--gradients", "full"]) == 2
    assert "choose galore_adamw8bit, or --gradients project" in capsys.readouterr().err


def test_a_json_file_and_a_folder_are_models_too(model_file: Path, tmp_path: Path, capsys: Out) -> None:
    assert cli.main(["plan", "--model", str(model_file), "--seq", "32"]) == 0
    mistral = {"model_type": "mistral", "vocab_size": 300, "num_key_value_heads": 1, "max_position_embeddings": 64}
    mistral |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(mistral))
    assert cli.main(["plan", "--model", "hf", "--seq", "32", "--memory", "1GB", "-o", "hf.json"]) == 0
    assert config_from({"config": "hf.json"}).hf_model == "hf"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "qwen3-8b", "mistral 7b", "Llama-3.1-8B-Instruct"])
def test_known_names_need_no_network(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", None)
    assert cli.main(["plan", "--model", name, "--card", "4090", "-o", "recipe.json", "--batch", "1", "--rank", "64"]) in (0, 1)
    assert "weights" in capsys.readouterr().out


def test_a_config_file_is_what_its_folder_is(tmp_path: Path, capsys: Out) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64}
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config))
    shown = []
    for name in ("gpt", "gpt/config.json"):
        assert cli.main(["plan", "--model", name, "--seq", "32"]) == 0
        shown.append(capsys.readouterr().out.split("GB (10^9", 1)[1])
    assert shown[0] == shown[1]


def test_units_are_told_apart() -> None:
    assert parse_memory("24GB") == 24 * 10**9
    assert parse_memory("24 GiB") == 24 * 2**30
    assert parse_memory("22.8G") == 22_800_000_000
    assert parse_memory("512mib") == 2**29
