"""Which folder a path means, and the model that is read from it: a run's, a checkpoint's, a baseline's, another's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from galore_torch.train.checkpoint.saved_model import load_tokenizer, load_weights, weights_folder
from galore_torch.train.checkpoint.storage import BrokenCheckpoint, checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.model.llama import build_model, model_shape
from support.whole_runs import command

Make = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(make_config: Make, shared: Path, tmp_path: Path) -> Path:
    """A copy of one finished run with two checkpoints, in bf16."""
    if not any(shared.iterdir()):
        command(make_config(save_dir=str(shared), save_every=3, dtype="bf16"))
    return Path(shutil.copytree(shared, tmp_path / "run"))


def checkpoints(run: Path) -> list[Path]:
    return checkpoints_in(run / "checkpoints")


def test_run_means_its_newest_whole_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    third, sixth = checkpoints(run)
    assert weights_folder(str(run)) == sixth
    (sixth / "model.safetensors").write_bytes(b"")
    assert weights_folder(str(run)) == third
    assert f"{sixth} is broken: model.safetensors has 0 bytes" in capsys.readouterr().err
    shutil.rmtree(third)
    with pytest.raises(UserError, match=r"none of 1 checkpoints is whole; .*step-000006 is broken"):
        weights_folder(str(run))


def test_named_checkpoint_is_taken_as_it_is_and_checked(run: Path) -> None:
    third, _ = checkpoints(run)
    assert weights_folder(str(third)) == third
    damaged = bytearray((third / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (third / "model.safetensors").write_bytes(damaged)
    with pytest.raises(BrokenCheckpoint, match=r"step-000003 is broken: the checksum of model.safetensors"):
        weights_folder(str(third))
    (third / "manifest.json").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"step-000003 has no manifest.json"):
        weights_folder(str(third))


def test_run_without_checkpoints_means_its_model(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert weights_folder(str(run)) == run / "model"
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match=r"run has no checkpoint yet; wait for one, or stop the run"):
        weights_folder(str(run))


def test_what_holds_no_weights_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"nowhere does not exist; give a run's folder or a model's"):
        weights_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config.json is a file; give"):
        weights_folder(str(run / "config.json"))
    with pytest.raises(UserError, match=r"holds no weights: it is no run or checkpoint of galore pretrain, and no model's folder"):
        weights_folder(str(tmp_path / "empty"))
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        weights_folder(str(run / "model"))


def test_weights_tokenizer_and_dtype_are_those_that_were_saved(run: Path) -> None:
    for folder in (checkpoints(run)[1], run / "model"):
        model = load_weights(weights_folder(str(folder)))
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not model.training
        assert load_tokenizer(folder).eos_token == "<|endoftext|>"


def test_missing_or_damaged_weights_are_named(run: Path) -> None:
    """transformers would fill the gap with random numbers, and warn."""
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is no whole model: 1 weights are missing .* such as model.layers.0.mlp.up_proj.weight"):
        load_weights(run / "model")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_weights(run / "model")
    (run / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        load_tokenizer(run / "model")


def test_baselines_checkpoint_gives_the_model_that_its_run_left(make_config: Make, tmp_path: Path) -> None:
    """Oracle: RUN/model, which the run wrote from the layers it had in memory."""
    pytest.importorskip("peft", reason="lora and relora need the extra peft")
    names = ("low_rank", "lora", "relora")
    command(make_config(compare=names, rank=4, cycle_length=4, warmup_steps=1, lr=0.01, dtype="bf16"))
    for name in names:
        folder = weights_folder(str(tmp_path / "run" / name))
        assert folder.name == "step-000006"
        weights = load_weights(folder).state_dict()
        expected = load_file(tmp_path / "run" / name / "model" / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    with pytest.raises(UserError, match=r"run is a folder of runs \(lora, low_rank, relora\); name one of them, such as .*lora"):
        weights_folder(str(tmp_path / "run"))


def test_loaded_bf16_model_computes_what_the_trained_one_did(model_file: Path, tmp_path: Path) -> None:
    """Rotary frequencies too: rounded to bf16 while training, they would not be those that transformers loads."""
    shape, how = model_shape(str(model_file)), {"bos_token_id": None, "eos_token_id": 0, "activation_checkpointing": False}
    model = build_model(shape, seed=0, dtype="bfloat16", **how).eval()  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model")
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_weights(tmp_path / "model")(tokens).logits)
