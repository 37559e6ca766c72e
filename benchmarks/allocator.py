"""The most memory that a call has out at once beyond what was there before, from the allocator itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes; on the CPU by the helper that the tests use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    # By its path: the folder of the tests has no business on the import path of a benchmark.
    spec = importlib.util.spec_from_file_location("tests_memory", Path(__file__).resolve().parents[1] / "tests" / "support" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    peak: int = helper.peak_bytes(call)
    return peak
