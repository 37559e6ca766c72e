"""Timing side by side: one call of each contender in turn, medians, ratios to one of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST = 3  # timed turns that even the slowest contender gets


def timed(call: Callable[[], Any], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by the clock; on a CUDA device those between two events, once the device has caught up."""
    if device == "cuda":
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = clock()
    call()
    return clock() - begin


def medians(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    device: str = "cpu",
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each contender over ``rounds`` turns, in which all are called one after the other.

    ``clock``: `time.thread_time` counts a single thread's own processor time, on a machine whose processors others use too.
    A contender that has used up ``budget`` seconds sits out the later turns, so that a very slow one does not set everyone's time.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        for name, call in contenders.items():
            if len(times[name]) >= LEAST and sum(times[name]) > budget:
                continue
            seconds = timed(call, device, clock)
            if turn >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
