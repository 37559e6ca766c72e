"""galore-torch 1.0 beside this package: the two share a name, so 1.0 is imported under another."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from peers import place


def published(module: str) -> Any:
    """A module of galore-torch 1.0 ('adamw', 'galore_projector'); its __init__, which wants bitsandbytes, is never run."""
    package = types.ModuleType("published_galore_torch")
    package.__path__ = [str(place("galore-torch") / "galore_torch")]
    sys.modules.setdefault("published_galore_torch", package)
    return importlib.import_module(f"published_galore_torch.{module}")
