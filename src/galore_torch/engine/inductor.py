"""The compiler of torch.compile, Inductor, called without Dynamo in front of it. torch's private compiler API is used here alone.

What may change between steps is an argument of a compiled function, never a constant: it is compiled once for each shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# What compiling one region takes, and what a pass takes as it is: seconds, and seconds an element. Measured on one core of a 2.8 GHz
# Xeon, on an empty cache: 0.8 s for a region, 7 s for the first of a process (benchmarks/README.md, "Time to step n"). A pass of Adam
# takes 20 us and 3 ns an element, compiled 10 us and 1.1 ns. For a GPU these are estimates: launches cost most there.
COMPILING = 3.0
PASS = {"cpu": (20e-6, 3e-9), "cuda": (100e-6, 1e-10)}

Program = Callable[..., Any]
programs: dict[Any, Program | None] = {}  # None: what the compiler could not do, and runs as it is


@lru_cache(maxsize=8)
def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs to write code for this kind of device: a C++ compiler, or Triton."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about parts of it that the import touches
        try:
            torch.compile(lambda: None)  # complains of a Python that it does not know
            if device == "cpu":
                from torch._inductor.cpp_builder import get_cpp_compiler

                return bool(get_cpp_compiler())
            from torch.utils._triton import has_triton

            return device == "cuda" and has_triton()
        except Exception:  # whatever it is, there is nothing to compile with
            return False


def is_disabled() -> bool:
    """Whether torch's own switch is off: the variable TORCH_COMPILE_DISABLE=1, or what a program set in its place."""
    from torch._dynamo import config

    return bool(config.disable)


def pays(device: str, elements: int, passes: int) -> bool:
    """Whether so many passes, run as they are, have taken longer than compiling takes.

    Told by counting and not by a clock: compiled and eager passes may differ in last bits, and a resumed run, or another rank, must go
    over from one to the other at the same step.
    """
    of_pass, of_element = PASS.get(device, PASS["cpu"])
    return passes * (of_pass + of_element * elements) >= COMPILING


def call(function: Callable[..., Any], region: Any, *arguments: Any) -> Any:
    """``function(region, *arguments)``, compiled once for each region and each size, stride and dtype of the arguments.

    Inductor is called without Dynamo in front of it: the key says all that a guard would ask, in a fifth of the time. A failing
    compiler is no error: it fails before it has run anything, and the function runs as it is from then on.
    """
    tensors: list[Any] = []
    _flatten(arguments, tensors)
    key = (function, region, *[(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors])
    try:
        program = programs[key]
    except KeyError:
        program = programs[key] = _compiled(function, region, arguments, tensors)
    return function(region, *arguments) if program is None else program(*tensors)


def _compiled(function: Callable[..., Any], region: Any, arguments: Any, tensors: list[Any]) -> Program | None:
    from torch._inductor import compile as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*values: Tensor) -> Any:
        return function(region, *_filled(arguments, iter(values)))

    try:
        graph = make_fx(flat, tracing_mode="fake")(*tensors)  # fake tensors: nothing is computed
        program: Program = inductor(graph, tensors)
    except Exception:  # whatever a compiler may complain of
        return None
    return program


def _flatten(value: Any, tensors: list[Any]) -> None:
    """The tensors in nested tuples, lists and dicts, in order."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, tuple | list | dict):
            _flatten(item, tensors)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nest with other tensors in their places."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        return [_filled(item, tensors) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return value
