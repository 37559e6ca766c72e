"""What tests of frameworks share: how a result becomes a row of the table in docs/frameworks.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Called last in a test: a row for run.py. The module's FRAMEWORK and PACKAGE, or ``framework``,
    name the framework and its distribution."""

    def add(
        feature: str,
        result: str = "works",
        note: str = "",
        resume: float | None = None,
        loss: float | None = None,
        adamw: float | None = None,
        framework: tuple[str, str] | None = None,
    ) -> None:
        title, package = framework or (request.module.FRAMEWORK, request.module.PACKAGE)
        row = {
            "framework": title,
            "version": version(package),
            "torch": torch.__version__.partition("+")[0],
            "feature": feature,
            "result": result,
            "note": note,
            "resume": resume,
            "loss": loss if loss is None else round(loss, 4),
            "adamw": adamw if adamw is None else round(adamw, 4),
        }
        print(row)
        if path := os.environ.get("GALORE_INTEGRATION"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return add
