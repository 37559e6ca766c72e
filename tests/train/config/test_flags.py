"""A config file and flags over it: who wins, what is refused, and how a value in the file is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.commands.pretrain import pretrain
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.flags import config_from
from galore_torch.train.errors import UserError


def write(path: Path, **settings: Any) -> str:
    path.write_text(json.dumps(settings))
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path, parsed: Callable[[str], PretrainConfig]) -> None:
    path = write(tmp_path / "a.json", about="mine", lr=0.5, rank=8, data=["a.txt", "b.txt"], gap_range=[10, 400], compare="adamw,sgd")
    config = parsed(f"--config {path} --lr 0.25 --optimizer galore_sgd")
    assert (config.lr, config.rank, config.optimizer, config.batch_size) == (0.25, 8, "galore_sgd", 16)
    assert (config.data, config.gap_range, config.compare) == (("a.txt", "b.txt"), (10, 400), ())
    assert config.given == {"lr", "rank", "optimizer", "data", "gap_range"}


@pytest.mark.parametrize("compare", ["adamw,sgd:1", ["adamw", "sgd:1"]])
def test_comparison_in_a_file(compare: Any, tmp_path: Path) -> None:
    config = config_from({"config": write(tmp_path / "a.json", compare=compare, lr=0.5)})
    assert config.contenders == [("adamw", 0.5), ("sgd", 1.0)]


def test_file_and_flags_make_the_same_config(tmp_path: Path, parsed: Callable[[str], PretrainConfig]) -> None:
    flags = "--rank 8 --lr 1e-2 --activation_checkpointing --gap_range 10 400 --max_train_tokens 1.5M --data a.txt b.txt"
    numbers = {"rank": 8, "lr": 0.01, "max_train_tokens": "1.5M", "gap_range": [10, 400], "data": ["a.txt", "b.txt"]}
    path = write(tmp_path / "a.json", **numbers, activation_checkpointing=True)
    assert parsed(f"--config {path}") == parsed(flags)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rte": 1}, "setting 'learning_rte' is not known"),
        ({"update_proj_gab": 50}, "did you mean update_proj_gap?"),
        ({"given": []}, "setting 'given' is not known"),
        ({"rank": 2.5}, "rank: '2.5' is not a whole number"),
        ({"rank": True}, "rank: 'True' is not a whole number"),
        ({"rank": 0}, "--rank 0 is out of bounds"),
        ({"lr": "fast"}, "lr: 'fast' is not a number"),
        ({"activation_checkpointing": 1}, "activation_checkpointing: 1 is neither true nor false"),
        ({"optimizer": 8}, "optimizer: 8 is no text"),
        ({"gap_range": [1]}, "gap_range: [1] must be two numbers"),
        ({"gap_range": 10}, "gap_range: [10] must be two numbers"),
        ({"max_train_tokens": "10X"}, "'10X' is no number of tokens, such as 500K"),
        ({"optimizer": "adamw", "rank": 8}, "--rank has no effect on adamw"),
        ([1], "holds a list"),
    ],
)
def test_bad_file_is_one_line_that_names_the_cure(settings: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        config_from({"config": str(path)})
    assert says in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config nowhere.json cannot be read: No such file.*galore recipes"):
        config_from({"config": "nowhere.json"})
    (tmp_path / "a.json").write_text('{"lr": 0.1,}')
    with pytest.raises(UserError, match=r"a.json is not valid JSON: .*line 1"):
        config_from({"config": str(tmp_path / "a.json")})


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ({"num_training_steps": 7}, {"max_train_tokens": "1B"}),
        ({"max_train_tokens": 10**6}, {"num_training_steps": 10}),
        ({"gradient_accumulation": 3}, {"total_batch_size": 512}),
        ({"optimizer": "sgd"}, {"compare": "adamw,galore_adamw"}),
        ({"compare": ("sgd",)}, {"optimizer": "adamw"}),
    ],
)
def test_flag_puts_the_files_other_way_to_say_it_out_of_force(flag: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_from({"config": write(tmp_path / "a.json", **settings), **flag})
    assert config == PretrainConfig(**flag, given=frozenset(flag))


def test_another_optimizer_on_a_recipe_says_what_it_leaves_out() -> None:
    config = config_from({"config": "60m", "optimizer": "adamw", "lr": 0.001})
    assert (config.optimizer, config.lr, config.num_training_steps) == ("adamw", 0.001, 10_000)
    assert "adamw: 60m says rank, which has no effect there" in config.notes
    with pytest.raises(UserError, match="--rank has no effect on adamw"):  # typed, not read: a mistake
        config_from({"config": "60m", "optimizer": "adamw", "rank": 8})


def test_record_of_a_run_repeats_it(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """The config.json that a run leaves is a config file: the same losses, bit by bit."""
    assert pretrain(make_config(optimizer="galore_adamw", num_training_steps=3, max_length=16)) == 0
    again = config_from({"config": str(tmp_path / "run" / "config.json"), "save_dir": str(tmp_path / "again")})
    assert again.given == {"save_dir"}
    assert pretrain(again) == 0
    one, other = (
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("run", "again")
    )
    assert one == other


@pytest.mark.parametrize(
    ("text", "tokens"), [("500K", 500_000), ("100M", 10**8), ("1.5B", 1_500_000_000), ("1t", 10**12), ("7000000", 7_000_000)]
)
def test_token_budget_is_a_number_of_updates(text: str, tokens: int, parsed: Callable[[str], PretrainConfig]) -> None:
    """The published script took sequences for tokens, and could not read K or a fraction."""
    config = parsed(f"--model_config 60m --max_train_tokens {text} --batch_size 8 --total_batch_size 16")
    assert config.max_train_tokens == tokens
    assert config.num_training_steps == tokens // (16 * 256)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--max_train_tokens 100", "--max_train_tokens 100 is less than one step of 2048 tokens"),
        ("--max_train_tokens 1M --num_training_steps 5", "both say how long to train"),
        ("--max_train_tokens -1", "'-1' is no number of tokens"),
        ("--gradient_accumulation 3 --total_batch_size 20", "--gradient_accumulation 3 times --batch_size 16 is 48"),
        ("--gap_range 60 100", "--gap_range 60 100 must have --update_proj_gap 50 between them"),
        ("--gap_range 60", "expected 2 arguments"),
        (
            "--carry_codec int8",
            "--carry_codec has no effect on galore_adamw; leave it out, or choose an optimizer that uses it, such as ldadam",
        ),
        ("--optimizer adamw --gap_range 10 100", "--gap_range has no effect on adamw"),
        ("--scheduler cosine_restarts", "--scheduler cosine_restarts needs --cycle_length"),
        ("--scheduler cosine_restarts --cycle_length 400", "below --num_training_steps 400 (now 400)"),
        ("--cycle_length 100", "--cycle_length 100 has no effect here"),
        ("--restart_warmup_steps 100", "--restart_warmup_steps 100 has no effect here"),
        ("--scheduler cosine_restarts --cycle_length 100 --restart_warmup_steps 100", "must be less than --cycle_length 100"),
        ("--decay_steps 5", "--decay_steps 5 has no effect on --scheduler cosine"),
        ("--scheduler wsd --decay_steps 399", "--decay_steps 399 is more than the 360 steps after warm-up"),
        ("--optimizer galore_adam8bit", "did you mean galore_adamw8bit?"),
        ("--model_config 60b", "did you mean 60m?"),
        ("--scheduler cosin", "did you mean cosine?"),
        ("--config 60mm", "did you mean 60m?"),
        ("--continue_from old", "as the published script did, give --hf_model old"),
        ("--hf_model a --model_config 60m", "--model_config and --hf_model are both given"),
        ("--hf_model a --vocab_size 9", "--vocab_size 9 has no effect on --hf_model a, whose embedding has its rows; leave it out"),
    ],
)
def test_bad_line_is_one_line_and_exit_2(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", *line.split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_yaml_says_what_json_says(tmp_path: Path, parsed: Callable[[str], PretrainConfig]) -> None:
    (tmp_path / "a.yaml").write_text(
        "rank: 8\nlr: 1e-2  # PyYAML reads this as text\ngap_range: [10, 400]\ncompare: galore_adamw, galore_sgd\n"
    )
    as_json = write(tmp_path / "a.json", rank=8, lr=0.01, gap_range=[10, 400], compare="galore_adamw,galore_sgd")
    assert parsed(f"--config {tmp_path / 'a.yaml'}") == parsed(f"--config {as_json}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank: [", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("- 1", "holds a list"),
        ("", "is empty; give one"),
    ],
)
def test_bad_yaml_is_one_line_and_runs_nothing(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(UserError) as caught:
        config_from({"config": str(tmp_path / "a.yml")})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_without_the_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("rank: 8")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(UserError, match="needs PyYAML to be read: pip install pyyaml, or give the settings as JSON"):
        config_from({"config": str(tmp_path / "a.yaml")})


@pytest.mark.parametrize("shorter", [{"num_training_steps": 500}, {"max_train_tokens": 500 * 512 * 256}])
def test_shortened_recipe_scales_its_warm_up_and_says_so(shorter: dict[str, int]) -> None:
    """60m has 10,000 steps with 1,000 of warm-up: 500 steps have 50."""
    config = config_from({"config": "60m", **shorter})
    assert (config.num_training_steps, config.warmup) == (500, 50)
    assert "--warmup_steps 1000 of 60m becomes 50, as its 10000 steps become 500" in config.notes


def test_warm_up_that_is_given_and_a_recipe_that_is_not_shortened_stay() -> None:
    assert config_from({"config": "60m", "num_training_steps": 500, "warmup_steps": 7}).warmup == 7
    assert config_from({"config": "60m", "num_training_steps": 20_000}).warmup == 1000
    assert not any("becomes" in note for note in config_from({"config": "60m"}).notes)


def test_file_is_checked_as_the_model_that_it_names(tmp_path: Path) -> None:
    """2048 tokens are refused of demo, which has 1024 positions, and this file does not mean it."""
    path = write(tmp_path / "a.json", model_config="7b", max_length=2048, batch_size=1)
    assert config_from({"config": path}).max_length == 2048
    assert config_from({"config": path, "num_training_steps": 30}).max_length == 2048


NUMBERS = {
    "warmup_steps": {},
    "decay_steps": {"scheduler": "wsd"},
    "cycle_length": {"scheduler": "cosine_restarts", "warmup_steps": 1},
    "restart_warmup_steps": {"scheduler": "cosine_restarts", "warmup_steps": 1, "cycle_length": 300},
    "random_after": {"optimizer": "golore"},
}


@pytest.mark.parametrize("key", NUMBERS)
def test_steps_of_a_file_are_those_of_its_model_and_of_all_processes(key: str, tmp_path: Path) -> None:
    """4M tokens are 976 steps of 16 sequences of 256 tokens, the length of every model but demo; of two processes 488."""
    path = write(tmp_path / "a.json", model_config="9m", max_train_tokens="4M", **NUMBERS[key], **{key: 100})
    shorter = config_from({"config": path, "num_training_steps": 100})
    assert getattr(shorter, key) == 100 * 100 // 976 == 10
    assert f"--{key} 100 of {path} becomes 10, as its 976 steps become 100" in shorter.notes
    of_two = config_from({"config": path, "num_training_steps": 100}, processes=2)
    assert getattr(of_two, key) == 100 * 100 // 488 == 20
    longer = config_from({"config": path, "num_training_steps": 1500})
    assert getattr(longer, key) == 100
    assert not any("becomes" in note for note in longer.notes)


def test_flags_make_a_run_of_a_file_that_is_none_alone(tmp_path: Path) -> None:
    """1500 tokens are less than one step of 16 x 128 tokens, and eleven of 4 x 32."""
    path = write(tmp_path / "a.json", max_train_tokens=1500, warmup_steps=2)
    smaller = {"config": path, "batch_size": 4, "max_length": 32}
    assert config_from(smaller).num_training_steps == 11
    assert config_from({**smaller, "num_training_steps": 5}).warmup == 2  # what it is two steps of is not known


def test_targets_are_patterns_and_of_projecting_optimizers_alone(parsed: Callable[[str], PretrainConfig]) -> None:
    config = parsed("--targets q_proj v_proj$")
    assert config.optimizer_settings["targets"] == ("q_proj", "v_proj$")
    with pytest.raises(UserError, match="--targets has no effect on adamw"):
        config_from({"optimizer": "adamw", "targets": ("q_proj",)})


def test_trained_model_goes_on_at_a_tenth_of_the_rate(tmp_path: Path) -> None:
    """A demo model of validation perplexity 103 went to 117 in 40 steps at the whole default rate, to 96 at a tenth of it."""
    write(tmp_path / "config.json", model_type="llama", hidden_size=16, num_attention_heads=2, vocab_size=300)
    config = PretrainConfig(hf_model=str(tmp_path / "config.json"), compare=("galore_adamw", "adamw:0.5"))
    assert config.hf_model == str(tmp_path)  # the file means its folder
    assert config.contenders == [("galore_adamw", 0.001), ("adamw", 0.5)]
    assert any("a tenth of the rate" in note for note in config.notes)
    assert not any("a tenth" in note for note in PretrainConfig(hf_model=str(tmp_path), lr=0.1).notes)
