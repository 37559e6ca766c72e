"""The files of a benchmark as modules: they import each other by plain names, which are forgotten afterwards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@contextmanager
def benchmark_modules(folder: str, *names: str) -> Iterator[list[ModuleType]]:
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(BENCHMARKS / folder), str(BENCHMARKS)]
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
                del sys.modules[name]
