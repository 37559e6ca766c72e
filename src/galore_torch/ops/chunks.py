"""Passes over large tensors a few rows at a time: no full-size temporary, and on a CPU none that leaves the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CACHED, LAUNCHED = 1 << 17, 1 << 24


def chunk_elements(device: torch.device) -> int:
    """Elements an elementwise pass works on at a time: on a CPU its temporaries stay in the cache, elsewhere launches cost."""
    return CACHED if device.type == "cpu" else LAUNCHED


def parts(length: int, most: int) -> Iterator[slice]:
    """Slices of up to ``most`` of ``length`` indices; all of one size where that takes less than twice as many."""
    size = part_size(length, most)
    return (slice(start, min(start + size, length)) for start in range(0, length, max(1, size)))


def part_size(length: int, most: int) -> int:
    """How many indices a slice of `parts` has."""
    fewest = -(-length // max(1, most))
    number = next((number for number in range(fewest, 2 * fewest) if length % number == 0), fewest)
    return -(-length // max(1, number))
