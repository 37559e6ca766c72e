"""Slot 1, the row for tensors with outliers: single elements as they are, and a Tucker core of the rest (TensorGRaD, arXiv 2501.02379v2).

G = S + (G - S), where S holds G's elements at an index set of the k largest, which is found at a refresh and kept until the next. R is a
vector: the core of G - S in its own order, then the k elements. Axis 0 of ``ranks`` and of bases stands for the set: k, and its indices
in G flattened (k, ascending).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import TypeVar

import torch
from torch import Tensor

from galore_torch.ops import write
from galore_torch.ops.linalg import squared, unit
from galore_torch.slots import tucker

V = TypeVar("V")
SET = 0  # the axis of the index set; those of modes are negative


def count(shape: tuple[int, ...], fraction: float) -> int:
    """Elements in the set: k = ceil(fraction x all), at least one."""
    return max(1, ceil(fraction * prod(shape)))


def index_dtype(shape: tuple[int, ...]) -> torch.dtype:
    """Four bytes an index, where they hold it."""
    return torch.int32 if prod(shape) <= torch.iinfo(torch.int32).max else torch.int64


def modes(by_axis: Mapping[int, V]) -> dict[int, V]:
    """What belongs to the Tucker part."""
    return {axis: value for axis, value in by_axis.items() if axis != SET}


def find(G: Tensor, ranks: tucker.Ranks, previous: tucker.Factors | None, seed: int) -> tucker.Factors:
    """The k largest elements by magnitude, and the factors of what they leave (TensorGRaD: the support, then a sweep of HOOI)."""
    index = squared(unit(G.reshape(1, -1))).flatten().topk(ranks[SET], sorted=False).indices.sort().values
    factors = tucker.find(_rest(G, index), modes(ranks), None if previous is None else modes(previous), seed)
    return {**factors, SET: index}


def _rest(G: Tensor, index: Tensor) -> Tensor:
    """G - S: a new tensor."""
    return G.reshape(-1).index_fill(0, index, 0).view(G.shape)


def project(X: Tensor, bases: tucker.Factors) -> Tensor:
    """[(X - S) x_1 U_1^H ... x_d U_d^H, X at the set], in fp32 or fp64: (N_1 x ... x N_d) -> (R_1 ... R_d + k)."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    index = bases[SET].long()
    return torch.cat([tucker.project(_rest(X, index), modes(bases)).reshape(-1), X.reshape(-1)[index]])


def back(change: write.WeightUpdate, low: Tensor, bases: tucker.Factors) -> None:
    """W <- decay_factor W - scale (core x_1 U_1 ... x_d U_d + S), in place, where S has the last k elements of ``low``."""
    index, factors = bases[SET].long(), modes(bases)
    core, elements = low.split([len(low) - len(index), len(index)])
    sizes = [factors[axis].shape[1] if axis in factors else change.weight.shape[axis] for axis in range(-change.weight.dim(), 0)]
    tucker.back(change, core.view(sizes), factors)
    write.subtract_elements(change, index, elements)


def overlap(new: tucker.Factors, old: tucker.Factors) -> tucker.Factors:
    """C_k of the modes; of the set the place in the old one of each new index (k), -1 where it is new."""
    found, known = new[SET].long(), old[SET].long()
    place = torch.searchsorted(known, found).clamp_max(len(known) - 1)
    return {**tucker.overlap(modes(new), modes(old)), SET: torch.where(known[place] == found, place, -1)}
