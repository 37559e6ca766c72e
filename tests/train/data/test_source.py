"""Data sets of the hub: the real library on local files. Only the step from a name to a data set is exchanged."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data import sources as source
from galore_torch.train.data.check import check_data
from galore_torch.train.data.loader import load_data
from galore_torch.train.data.sampler import Documents, Place
from galore_torch.train.data.sources import hub_source
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from support.whole_runs import Silent, assert_same_run, command

Make = Callable[..., PretrainConfig]
ASKED: list[tuple[str, str | None]] = []  # names that were opened


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that answers to every name: 5 files for training, as C4's, one for validation."""
    from datasets import load_dataset

    texts = [f"document {i} says " + " ".join(str(i * k % 97) for k in range(30)) for i in range(260)]
    for number in range(5):
        lines = [json.dumps({"url": "", "text": text}) for text in texts[number * 50 : number * 50 + 50]]
        (tmp_path / f"train-{number}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "validation.jsonl").write_text("\n".join(json.dumps({"url": "", "text": text}) for text in texts[250:]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    ASKED.clear()

    def load(path: str, config: str | None, split: str) -> Any:
        ASKED.append((path, config))
        files = {"train": sorted(map(str, tmp_path.glob("train-*"))), "validation": str(tmp_path / "validation.jsonl")}
        return load_dataset("json", data_files=files, split=split, streaming=True, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(source, "_load", load)
    return tmp_path


def numbers(texts: list[str]) -> list[int]:
    return [int(text.split()[1]) for text in texts]


def test_c4_is_every_document_once_a_pass_in_another_order(hub: Path) -> None:
    documents = Documents(hub_source("c4", "--data", "train", "text"), seed=3)
    passes: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for place, text in islice(documents.after(Place()), 501):
        passes[place.epoch].append(text)
    assert Counter(numbers(passes[0])) == Counter(numbers(passes[1])) == Counter(range(250))
    assert passes[0] != passes[1]
    files = [number // 50 for number in numbers(passes[0])]
    assert files[::50] != sorted(files[::50]), "files in another order"
    assert [files[at] for at in range(0, 250, 50)] == [files[at] for at in range(49, 250, 50)], "one after the other"
    assert set(ASKED) == {("allenai/c4", "en")}


@pytest.mark.parametrize("at", [0, 49, 50, 120, 249, 250, 300])
def test_place_in_the_data_set_is_gone_on_from(hub: Path, at: int) -> None:
    documents = Documents(hub_source("hf:some/set:part", "--data", "train", "text"), seed=3, rank=1, ranks=2)
    whole = list(islice(documents.after(Place()), 310))
    again = Documents(hub_source("hf:some/set:part", "--data", "train", "text"), seed=3, rank=1, ranks=2)
    assert list(islice(again.after(whole[at][0]), 5)) == whole[at : at + 5]
    assert set(ASKED) == {("some/set", "part")}


def test_run_on_c4_is_evaluated_on_its_validation_split_and_resumed_bit_equal(hub: Path, make_config: Make, tmp_path: Path) -> None:
    config = make_config(data=("c4",), num_training_steps=12, eval_tokens=10_000, pad_documents=True, max_length=64)
    data = load_data(config)
    held_out = [data.tokenizer.fast.decode(row[row >= 0]) for row in data.held_out]
    assert numbers(held_out) == list(range(250, 260))
    assert command(make_config(data=("c4",), num_training_steps=12, save_dir=str(tmp_path / "whole")))[0] == 0
    code, said = command(make_config(data=("c4",), num_training_steps=12, save_every=5))
    assert (code, "allenai/c4 en train: streamed" in said) == (0, True)
    checkpoints_in(tmp_path / "run" / "checkpoints")[-1].rename(tmp_path / "gone")
    assert command(make_config(data=("c4",), num_training_steps=12, save_every=5, resume="auto"))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_local_text_can_be_evaluated_on_c4_and_the_other_way_round(hub: Path, make_config: Make, text_file: Path) -> None:
    data = load_data(make_config(eval_data=("c4",)))
    assert data.source is None
    assert "document 250 says" in data.tokenizer.fast.decode(data.held_out)
    data = load_data(make_config(data=("c4",), eval_data=(str(text_file),)))
    assert data.source is not None
    assert " end 59." in data.tokenizer.fast.decode(data.held_out)


def test_data_set_without_a_validation_split_asks_for_held_out_text(monkeypatch: pytest.MonkeyPatch, hub: Path, make_config: Make) -> None:
    from datasets import load_dataset

    def load(path: str, config: str | None, split: str) -> Any:
        return load_dataset("json", data_files={"train": str(hub / "train-0.json.gz")}, split=split, streaming=True, cache_dir=str(hub))

    monkeypatch.setattr(source, "_load", load)
    with pytest.raises(
        UserError, match=r"--data hf:a/b: a/b validation cannot be opened \(Bad split.*give the validation text with --eval_data"
    ):
        load_data(make_config(data=("hf:a/b",)))


@pytest.mark.parametrize(
    ("field", "says"),
    [("body", "has no column 'body', it has 'url', 'text'; name the right one with --text_field"), ("n", "column 'n' holds int, not text")],
)
def test_column_that_is_no_text_is_named(hub: Path, make_config: Make, field: str, says: str) -> None:
    if field == "n":
        for path in hub.glob("train-*"):
            path.write_bytes(gzip.compress(b'{"n": 1}\n{"n": 2}'))
    with pytest.raises(UserError, match=says):
        load_data(make_config(data=("c4",), text_field=field))


def test_read_that_fails_later_is_one_line_and_what_was_trained_is_saved(
    hub: Path, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from there as if nothing had been."""
    config = make_config(data=("c4",), num_training_steps=30, save_every=0)
    data = load_data(config)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole, _ = train(config, "adamw", 0.01, data, tmp_path / "whole", Silent())
    damaged = sorted(hub.glob("train-*"))[3]
    good = damaged.read_bytes()
    damaged.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"--data c4: allenai/c4 en train cannot be read beyond document \d+ of shard 3 \(.*--resume auto"):
        train(config, "adamw", 0.01, data, tmp_path / "parts", Silent())
    damaged.write_bytes(good)
    (saved,) = checkpoints_in(tmp_path / "parts" / "checkpoints")
    assert saved.name < "step-000030"
    result, _ = train(config, "adamw", 0.01, data, tmp_path / "parts", Silent(), saved)
    assert result.losses == whole.losses


def test_without_a_network_local_files_are_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Through the command, and the real library in the mode in which it opens no connection."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cli.main(["pretrain", "--data", "c4", "--save_dir", str(tmp_path / "run"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("galore: --data c4: allenai/c4 en train cannot be opened (")
    assert "allenai/c4" in line
    assert line.endswith("without a network give local files, such as --data 'c4/*.json.gz'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:/a", "hf:a:"])
def test_name_that_no_data_set_has_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--data {name} names no data set of the hub; give c4 or hf:NAME"):
        check_data(PretrainConfig(data=(name,)))


def test_folder_of_the_same_name_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    note = "c4 is the data set of the hub; the files here are ./c4"
    assert note not in PretrainConfig(data=("c4",)).notes
    (tmp_path / "c4").mkdir()
    assert note in PretrainConfig(data=("c4",)).notes
    assert note not in PretrainConfig(data=("./c4",)).notes


def test_data_set_of_the_hub_stands_alone() -> None:
    with pytest.raises(UserError, match=r"--data c4 a\.txt: a data set of the hub stands alone; leave the others out"):
        check_data(PretrainConfig(data=("c4", "a.txt")))


def test_documents_that_are_null_or_blank_are_left_out_and_still_counted(hub: Path) -> None:
    for path in hub.glob("train-*"):
        path.unlink()
    (hub / "train-0.json.gz").write_bytes(
        gzip.compress(b'{"text": "document 0 says"}\n{"text": null}\n{"text": " "}\n{"text": "document 3 says"}')
    )
    documents = Documents(hub_source("c4", "--data", "train", "text"))
    found = list(islice(documents.after(Place()), 4))
    assert Counter(numbers([text for _, text in found])) == {0: 2, 3: 2}
    assert all(place.epoch == index // 2 for index, (place, _) in enumerate(found))
