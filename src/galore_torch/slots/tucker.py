"""Slot 1, the row for tensors of any order: an orthonormal factor for each mode, and R is the core (Tensor-GaLore, arXiv 2501.02379).

G (N_1 x ... x N_d), real or complex, is seen as core x_1 U_1 ... x_d U_d with U_k (N_k x R_k); modes without a rank keep their length.
A mode is named by its axis, from the end: -d is the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import floor, prod
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops import linalg, write
from galore_torch.ops.codecs import StoredTensor

Factors = dict[int, Tensor]  # axis -> U_k
Ranks = Mapping[int, int]
SHORT = 4  # modes up to this length keep it, unless a list of ranks says otherwise: a factor would save nothing


def mode_ranks(shape: tuple[int, ...], rank: float | int | tuple[int | None, ...]) -> dict[int, int]:
    """axis -> rank of each mode that is shortened. A number is for each mode, a fraction one of all elements, a tuple has one a mode.

    No rank is above the product of all other lengths of the core: an unfolding has no more directions.
    Raises ValueError for a tuple that does not fit the shape.
    """
    if isinstance(rank, tuple) and len(rank) != len(shape):
        raise ValueError(
            f"rank={list(rank)} has {len(rank)} numbers, and a parameter of shape {shape} has {len(shape)} dimensions: give one for "
            "each (None keeps it whole), one number for all, or a fraction of the elements"
        )
    if not prod(shape):
        return {}
    wished: list[int | None]
    if isinstance(rank, tuple):
        wished = list(rank)
    else:
        each = shared_ranks(shape, rank) if isinstance(rank, float) else [rank] * len(shape)
        wished = [share if size > SHORT else None for size, share in zip(shape, each, strict=True)]
    core = [size if wish is None else min(wish, size) for wish, size in zip(wished, shape, strict=True)]
    for axis, wish in enumerate(wished):
        if wish is not None:
            core[axis] = min(core[axis], prod(core) // core[axis])
    return {axis - len(shape): rank for axis, (rank, size) in enumerate(zip(core, shape, strict=True)) if rank < size}


def shared_ranks(shape: tuple[int, ...], fraction: float) -> list[int]:
    """Ranks in proportion to the lengths, of which a core of at most ``fraction`` of all elements is made: whole numbers from 1.

    A mode that has more than its unfolding has directions, as the long side of a matrix, leaves them to the others.
    """
    free = [axis for axis, size in enumerate(shape) if size > SHORT]
    ideal = {axis: shape[axis] * fraction ** (1 / len(free)) for axis in free}
    core = [max(1, floor(ideal[axis])) if axis in ideal else size for axis, size in enumerate(shape)]
    for axis in free:
        core[axis] = min(core[axis], prod(core) // core[axis])
    while True:
        room = [axis for axis in free if core[axis] < shape[axis] and core[axis] ** 2 <= prod(core)]
        room = [axis for axis in room if prod(core) // core[axis] * (core[axis] + 1) <= fraction * prod(shape)]
        if not room:
            return core
        core[min(room, key=lambda axis: core[axis] / ideal[axis])] += 1  # the one that lacks most


def find(G: Tensor, ranks: Ranks, previous: Factors | None, seed: int) -> Factors:
    """The factors after one sweep of HOOI (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21, 2000, Alg. 4.2), from those in use.

    Mode by mode: G is contracted with all other factors, and one step of subspace iteration on that small unfolding replaces an SVD of
    it. Without ``previous`` the sweep starts from a sequentially truncated HOSVD by random sketches. So it does, too, where the factors
    in use end with less than half of the gradient: a part of it that is orthogonal to two of them is in no contraction. What is found
    so counts if it holds twice as much.
    """
    if previous is None:
        return _swept(G, ranks, _sketched(G, ranks, seed), seed)
    factors = _swept(G, ranks, previous, seed)
    held = linalg.norm(project(G, factors)).square()
    missed = 2 * held < linalg.norm(G).square()
    if linalg.readable(missed) and not bool(missed):
        return factors
    fresh = _swept(G, ranks, _sketched(G, ranks, seed), seed)
    better = missed & (linalg.norm(project(G, fresh)).square() > 2 * held)
    return {axis: torch.where(better, fresh[axis], factor) for axis, factor in factors.items()}


def _swept(G: Tensor, ranks: Ranks, start: Factors, seed: int) -> Factors:
    factors = dict(start)
    for place, axis in enumerate(ranks):
        others = {other: factor for other, factor in factors.items() if other != axis}
        factors[axis] = linalg.sharp_step(_unfolded(project(G, others), axis), factors[axis], seed + 2 * place)
    return factors


def _sketched(G: Tensor, ranks: Ranks, seed: int) -> Factors:
    """ST-HOSVD: each mode's factor from what the modes before have left of G (Vannieuwenhoven et al., SIAM J. Sci. Comput. 34, 2012)."""
    factors: Factors = {}
    for axis, rank in ranks.items():
        factors[axis] = linalg.sketched_basis(_unfolded(G, axis), rank, seed)
        G = linalg.mode_product(G, factors[axis].mH, axis)
    return factors


def _unfolded(tensor: Tensor, axis: int) -> Tensor:
    """The mode's unfolding: N_k x (all others)."""
    return tensor.movedim(axis, 0).flatten(1)


def project(X: Tensor, factors: Factors) -> Tensor:
    """The core X x_1 U_1^H ... x_d U_d^H, in fp32 or fp64: (N_1 x ... x N_d) -> (R_1 x ... x R_d)."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    for axis in sorted(factors, key=lambda axis: _share(factors[axis])):  # the mode that shortens most comes first
        X = linalg.mode_product(X, factors[axis].to(X.dtype).mH, axis)
    return X


def back(change: write.WeightUpdate, core: Tensor, factors: Factors) -> None:
    """W <- decay_factor W - scale (core x_1 U_1 ... x_d U_d), in place; the last product goes into the weight itself."""
    factors = {axis: factor.to(core.dtype) for axis, factor in factors.items()}
    last = _last_mode(change.weight.shape, factors)
    for axis in sorted(factors.keys() - {last}, key=lambda axis: -_share(factors[axis])):  # the one that lengthens most comes last
        core = linalg.mode_product(core, factors[axis], axis)
    U, (N, R), before = factors[last], factors[last].shape, prod(change.weight.shape[:last])
    after = change.weight.numel() // (before * N)
    view: tuple[int, ...] = (before, N, after)
    left, right = U.expand(before, N, R), core.reshape(before, R, after)  # (N, R) @ (R, after), for each index of the modes before
    if before == 1:
        view, left, right = view[1:], left[0], right[0]
    elif after == 1:
        view, left, right = view[:2], right[..., 0], U.mT  # (before, R) @ (R, N)
    with write.viewed(change.weight, view) as matrix:
        write.subtract_product(replace(change, weight=matrix), left, right)


def _share(factor: Tensor) -> float:
    return factor.shape[1] / factor.shape[0]


def _last_mode(shape: torch.Size, factors: Factors) -> int:
    """The mode whose product with the factor is one plain GEMM on the weight's memory, if there is one: the first or the last of all."""
    return next((axis for axis in factors if prod(shape[:axis]) == 1), max(factors))


def spec(shape: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Any]:
    """N_k x R_k for each mode k that has a rank, as basis_k with k from 0; int4 blocks run down each column."""
    first = len(shape)
    return {axis: StoredTensor(f"basis_{first + axis}", (shape[axis], rank), codec, 0, True, compute_dtype) for axis, rank in ranks.items()}


def overlap(new: Factors, old: Factors) -> Factors:
    """C_k = U_k new^H U_k old: (R_k, N_k) @ (N_k, R_k)."""
    return {axis: new[axis].mH @ old[axis] for axis in new}
