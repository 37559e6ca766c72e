"""Accelerate in one process and in two. Oracles: an uninterrupted run, AdamW, and for two processes one on the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from integrations.accelerate_loop import train, train_by_trainer
from integrations.compare import compare
from support.hf_runs import difference, llama

FRAMEWORK, PACKAGE = "Accelerate", "accelerate"
LOOP = Path(__file__).with_name("accelerate_loop.py")


def two_processes(folder: Path, runs: list[dict[str, Any]]) -> list[list[nn.Module]]:
    """The model of each process after each run."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(LOOP),
        str(folder),
        json.dumps(runs),
    ]
    path = os.pathsep.join([str(LOOP.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for number in range(len(runs)):
        models = [llama(), llama()]
        for rank, model in enumerate(models):
            model.load_state_dict(torch.load(folder / f"{number}-{rank}.pt"))
        found.append(models)
    return found


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda **options: train(tmp_path_factory.mktemp("adamw"), "AdamW", **options))


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is GaLore's, and what AdamW's run has too
    "`GaLoreAdamW`": ({"optimizer": "GaLoreAdamW"}, {}),
    "`GaLoreAdamW8bit`": ({"optimizer": "GaLoreAdamW8bit"}, {}),
    "accumulation": ({"optimizer": "GaLoreAdamW"}, {"accumulate": 2}),
    "bf16 autocast": ({"optimizer": "GaLoreAdamW"}, {"mixed_precision": "bf16"}),
    "`fused_backward` project with accumulation": ({"optimizer": "GaLoreAdamW", "fused": "project"}, {"accumulate": 2}),
    "`fused_backward` direct": ({"optimizer": "GaLoreAdamW", "fused": "direct"}, {}),
}


@pytest.mark.parametrize("feature", WAYS)
def test_one_process(feature: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    own, shared = WAYS[feature]
    models = [train(tmp_path, resume=resume, **own, **shared) for resume in (False, True)]
    compare(record, feature, *models, adamw(**shared))


OURS = ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"]
FSDP2: dict[str, tuple[list[str], str]] = {"": (OURS, "AdamW"), "trainer": (["galore_adamw", *OURS], "adamw_torch")}


@pytest.mark.parametrize("by", FSDP2)
def test_fsdp2(by: str, tmp_path: Path, record: Any) -> None:
    """Two processes, fsdp_version 2: one process with the whole batch, each process with the same weights, and a resume to the bit."""
    names, adamw_name = FSDP2[by]
    ways = [{"optimizer": name, "fsdp": True} | ({by: True} if by else {}) for name in (*names, adamw_name)]
    runs = iter(two_processes(tmp_path, [{**way, "resume": resume} for way in ways for resume in (False, True)]))
    found = {way["optimizer"]: pair for way, *pair in zip(ways, runs, runs, strict=True)}
    (adamw, _), _ = found.pop(adamw_name)
    for name, (straight, again) in found.items():
        alone = (train_by_trainer if by else train)(tmp_path / "alone", name)
        assert difference(*straight) == difference(*again) == 0.0
        assert difference(straight[0], llama()) > 20 * difference(straight[0], alone)
        title = {"framework": ("Hugging Face Trainer", "transformers")} if by else {}
        compare(record, f"two processes, FSDP2, `{name}`", straight[0], again[0], adamw, **title)


def test_two_processes(tmp_path: Path, adamw: Any, record: Any) -> None:
    ways = [{"optimizer": "GaLoreAdamW"}, {"optimizer": "GaLoreAdamW8bit"}, {"optimizer": "GaLoreAdafactor"}]
    ways.append({"optimizer": "GaLoreAdamW", "fused": "project"})
    runs = iter(two_processes(tmp_path, [{**way, "resume": resume} for way in ways for resume in (False, True)]))
    for way, straight, again in zip(ways, runs, runs, strict=True):
        alone = train(tmp_path / "alone", **way)
        assert difference(*straight) == difference(*again) == 0.0
        assert difference(straight[0], llama()) > 20 * difference(straight[0], alone)
        fused = f", `fused_backward` {way['fused']}" if "fused" in way else ""
        compare(record, f"two processes, `{way['optimizer']}`{fused}", straight[0], again[0], adamw())
