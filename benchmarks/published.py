"""galore-torch 1.0, installed in a place of its own and imported beside this package under another name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

PLACE = Path(__file__).resolve().parents[1] / "build" / "galore-torch-1.0"


def published(module: str) -> Any:
    """A module of galore-torch 1.0 ('adamw', 'galore_projector'); the wheel is fetched once. bitsandbytes is not needed."""
    if not PLACE.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PLACE), "galore-torch==1.0"]
        subprocess.run(command, check=True)
    package = types.ModuleType("published_galore_torch")
    package.__path__ = [str(PLACE / "galore_torch")]
    sys.modules.setdefault("published_galore_torch", package)
    return importlib.import_module(f"published_galore_torch.{module}")
