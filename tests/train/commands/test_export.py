"""galore export: what it writes loads without this package and computes the same; what it refuses leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from galore_torch import cli
from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.commands.export import export
from galore_torch.train.config.config import PretrainConfig
from support.whole_runs import command

Make = Callable[..., PretrainConfig]


@pytest.fixture
def run(make_config: Make, shared: Path) -> Path:
    """One finished run for all tests of this file, which only read it."""
    if not any(shared.iterdir()):
        command(make_config(save_dir=str(shared), save_every=3, dtype="bf16", optimizer="galore_adamw", rank=4))
    return shared


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_exported_run_is_the_model_that_was_trained(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(run)
    assert cli.main(["export", str(run), str(tmp_path / "new" / "model")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/new/model: LlamaForCausalLM, " in printed
    assert f"parameters in bfloat16, from {run}/checkpoints/step-000006" in printed
    assert torch.equal(logits(tmp_path / "new" / "model"), logits(run / "model"))
    files = everything(tmp_path / "new")
    assert {"model/config.json", "model/generation_config.json", "model/model.safetensors", "model/tokenizer.json"} <= files.keys()
    assert json.loads(files["model/config.json"])["use_cache"]
    assert files["model/tokenizer_config.json"] == (run / "model" / "tokenizer_config.json").read_bytes()
    assert not any(str(run.parent).encode() in content for content in files.values()), "no path of this machine"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert everything(run) == before


def test_exported_checkpoint_is_the_one_that_was_named(run: Path, tmp_path: Path) -> None:
    third, sixth = checkpoints_in(run / "checkpoints")
    (tmp_path / "empty").mkdir()
    export(str(third), str(tmp_path / "empty"))
    assert torch.equal(logits(tmp_path / "empty"), logits(third))
    assert not torch.equal(logits(third), logits(sixth))


def test_exported_baseline_has_ordinary_layers(make_config: Make, tmp_path: Path) -> None:
    command(make_config(optimizer="low_rank", rank=4, lr=0.01))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "run" / "model"))


def test_dtype_and_size_of_files_are_those_asked_for(run: Path, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "out"), dtype="float32", max_shard_size="10KB")
    parts = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(parts) > 2
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    expected = load_file(run / "model" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, expected[name].float()) for name, tensor in tensors.items())
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 10_000
    assert torch.allclose(logits(tmp_path / "out"), logits(run / "model").float(), atol=0.02)


def test_weights_that_a_dtype_cannot_hold_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(source / "checkpoints")
    tensors = load_file(source / "model" / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000
    save_file(tensors, source / "model" / "model.safetensors", metadata={"format": "pt"})
    said = failure(capsys, "export", str(source), str(tmp_path / "out"), "--dtype", "float16")
    assert "--dtype float16 cannot hold model.norm.weight" in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, out = tmp_path / "full", str(tmp_path / "out")
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    broken = Path(shutil.copytree(run, tmp_path / "broken")) / "checkpoints" / "step-000006"
    (broken / "optimizer.json").unlink()
    shutil.copytree(run / "model", tmp_path / "model")
    source = str(run)
    assert "full already exists and is not an empty folder; name a new one" in failure(capsys, "export", source, str(full))
    assert "notes.txt already exists" in failure(capsys, "export", source, str(full / "notes.txt"))
    assert "full holds no weights: it is no run or checkpoint" in failure(capsys, "export", str(full), out)
    assert "step-000006 is broken: optimizer.json is missing" in failure(capsys, "export", str(broken), out)
    assert "model is no run or checkpoint of galore pretrain, but a model's folder already" in failure(
        capsys, "export", str(tmp_path / "model"), out
    )
    assert "export lies inside" in failure(capsys, "export", source, str(run / "export"))
    assert "--dtype 'int8' is not known; choose one of: bfloat16, float32, float16" in failure(
        capsys, "export", source, out, "--dtype", "int8"
    )
    for size in ("5", "0GB", "many"):
        assert f"--max_shard_size {size!r} is no size" in failure(capsys, "export", source, out, "--max_shard_size", size)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["broken", "full", "model"]
    assert (full / "notes.txt").read_text() == "mine"


def test_full_disk_leaves_nothing_and_a_kill_is_made_up_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".tmp-out"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:

        def full(self: object, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        said = failure(capsys, "export", str(run), str(tmp_path / "out"))
    assert "the export cannot be written to" in said
    assert said.endswith("No space left on device; make room or fix the folder, then export again")
    assert not any(tmp_path.glob("*out*"))
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    export(str(run), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"]
    assert torch.equal(logits(tmp_path / "out"), logits(run / "model"))
