"""A model of 3,000 parameters, a text of 60 short documents, a cache of their own: every test here is quick."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_torch import cli
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData, load_data
from support.texts import document


@pytest.fixture(autouse=True)
def _own_cache(session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text's tokenizer is trained once a session: the command writes its cache so that no other process reads half a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_folder / "cache"))


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy disk takes a second for what nothing here depends on; what is synced, and when, has a test of its own."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that all tests of one file share, for a run that they only read."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document(i)}) for i in range(60)))
    return path


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **shape}))
    return path


@pytest.fixture
def make_config(text_file: Path, model_file: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    def make(**changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "model_config": str(model_file),
            "data": (str(text_file),),
            "device": "cpu",
            "optimizer": "adamw",
            "max_length": 16,
            "batch_size": 4,
            "num_training_steps": 6,
            "eval_every": 0,
            "update_proj_gap": 3,
            "save_dir": str(tmp_path / "run"),
        }
        return PretrainConfig(**(settings | changes))

    return make


@pytest.fixture
def token_data(make_config: Callable[..., PretrainConfig]) -> TokenData:
    return load_data(make_config())


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], PretrainConfig]:
    """The config that a line of flags leads to, through the command line itself."""
    seen: list[PretrainConfig] = []
    monkeypatch.setattr("galore_torch.cli.check_ready", lambda config: None)
    monkeypatch.setattr("galore_torch.train.commands.pretrain.pretrain", lambda config: seen.append(config) or 0)

    def parse(line: str) -> PretrainConfig:
        assert cli.main(["pretrain", *line.split()]) == 0
        return seen[-1]

    return parse
