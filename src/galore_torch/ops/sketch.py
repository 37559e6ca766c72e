"""Ops: a random matrix that is a seed, and is made whenever it is multiplied: no state but that number, the same bits on every device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.codecs import hashed16

MULTIPLIER = 0x9E3779B1  # of a counter before it is hashed: no two of a matrix have the same
STREAM = 0x85EBCA6B  # of a seed


def sketch(seed: Tensor, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers of variance 1 / rank, so that P P^T is the identity on average: (... x rows x rank) in ``dtype``.

    seed: int64 (... x 1), not negative, on the device that is asked for. Each number is the quantile of 16 hashed bits of its place.
    """
    starts = (seed & 0x7FFFFFFF).reshape(-1, 1) * STREAM
    out = torch.empty((len(starts), rows * rank), dtype=dtype, device=seed.device)
    table = _quantiles(dtype, seed.device)
    for some in parts(rows * rank, chunk_elements(seed.device) // len(starts)):  # int64 inside: twice the size, and more than once
        places = torch.arange(some.start, some.stop, device=seed.device).mul_(MULTIPLIER)
        out[:, some] = table[hashed16(places + starts)]
    return out.mul_(rank**-0.5).view(*seed.shape[:-1], rows, rank)


@cache
def _quantiles(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(65536,): the standard normal distribution cut into as many parts of one probability, each at its middle; of variance 1."""
    middle = (torch.arange(65536, dtype=torch.float64, device="cpu") + 0.5) / 65536
    quantiles = torch.special.ndtri(middle)
    return (quantiles / quantiles.square().mean().sqrt()).to(dtype).to(device)


def seeds(batch: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """One seed (int64, ... x 1) for each matrix of a batch, which share it."""
    return torch.full((*batch, 1), seed, dtype=torch.int64, device=device)
