"""Slot 1: which subspace, and how is it applied? The table of `subspace.Projector` rows, and those with a basis that is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops import linalg, native, twins, write
from galore_torch.ops.codecs import Seed, StoredTensor, TensorSpec
from galore_torch.ops.sketch import seeds, sketch
from galore_torch.slots import sparse_tucker, tucker
from galore_torch.slots.structured import (
    StoredIndex,
    blocks_back,
    blocks_project,
    blocks_spec,
    next_rows,
    rows_back,
    rows_overlap,
    rows_part,
    rows_project,
    rows_spec,
    whole_blocks,
)
from galore_torch.slots.subspace import Bases, Overlaps, Projector, Ranks, Stored

# --- dense bases: orthonormal columns ----------------------------------------------------------------------------------


def svd(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """Leading singular vectors by a full SVD: exact, and what galore-torch 1.0 does."""
    left, right = linalg.svd_bases(G, max(ranks.values()))
    return {axis: left if axis == -2 else right for axis in ranks}


def gram(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """The same subspaces by the eigenvectors of the smaller Gram matrix."""
    left, right = linalg.gram_bases(G, max(ranks.values()))
    return {axis: left if axis == -2 else right for axis in ranks}


def rsvd(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """Leading singular vectors from a random sketch, every time anew (Halko et al.; GaLore 2, arXiv 2504.20437)."""
    return {axis: linalg.sketched_basis(G if axis == -2 else G.mT, rank, seed) for axis, rank in ranks.items()}


def power(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """One step of block power iteration from the basis in use; `rsvd` where there is none."""
    if previous is None:
        return rsvd(G, ranks, previous, seed)
    return {axis: linalg.power_step(G if axis == -2 else G.mT, previous[axis], seed) for axis in ranks}


def random(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """Orthonormal directions from a seed, whatever the gradient (Flora, arXiv 2402.03293; GoLore, arXiv 2410.11289).

    The matrices of a batch share them.
    """
    return {
        axis: linalg.orthonormalize(linalg.gaussian((*G.shape[:-2], G.shape[axis], rank), seed + axis + 2, G))
        for axis, rank in ranks.items()
    }


def momentum(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """One step of block power iteration on A = b G + a P M, the new momentum in full size: P' = orth(A A^T P).

    As LDAdam (arXiv 2410.16103, Alg. 1) and Dion (arXiv 2504.05295, Alg. 1) track a subspace, each step or every few. The rotated momentum
    P'^T P M is then what P' holds of it. `rsvd` of the gradient where there is no basis.
    """
    if previous is None:
        return rsvd(G, ranks, previous, seed)
    return {axis: linalg.followed(G if axis == -2 else G.mT, previous[axis]) for axis in ranks}


SWITCHED = 5 / 16  # of the directions, the strongest, stay: l = 40 of r = 128 in arXiv 2502.07752, table 11 (160 of 512 at 1.3B)


def switch(G: Any, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """The strongest directions of one power step, and random ones of the complement, other ones at each refresh (Alice, arXiv 2502.07752,
    Alg. 2); `rsvd` where there is no basis yet."""
    if previous is None:
        return rsvd(G, ranks, previous, seed)
    return {
        axis: linalg.switched_basis(G if axis == -2 else G.mT, previous[axis], max(1, round(SWITCHED * rank)), seed)
        for axis, rank in ranks.items()
    }


def dense_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """m x r for rows, n x r for columns; int4 blocks run down each column."""
    names = {-2: "basis_left", -1: "basis_right"} if len(ranks) == 2 else dict.fromkeys(ranks, "basis")
    batch = view[:-2]
    return {
        axis: StoredTensor(names[axis], (*batch, view[axis], rank), codec, axis=len(batch), compute_dtype=compute_dtype)
        for axis, rank in ranks.items()
    }


def dense_project(X: Tensor, bases: Bases) -> Tensor:
    """basis^T X, X basis or left^T X right (GaLore, arXiv 2403.03507, Alg. 2): (m, n) -> (r, n), (m, r) or (r, r)."""
    for axis, basis in bases.items():
        X = linalg.project(X, basis, axis)
    return X


def dense_back(change: write.WeightUpdate, low: Tensor, bases: Bases) -> None:
    """W <- decay_factor W - scale (basis N | N basis^T | left N right^T): one GEMM into the weight (arXiv 2403.03507, Alg. 2)."""
    if -2 not in bases:
        write.subtract_product(change, low, bases[-1].mT)  # (m, r) @ (r, n)
        return
    right = linalg.mode_product(low, bases[-1].to(low.dtype), -1) if -1 in bases else low
    write.subtract_product(change, bases[-2], right)  # (m, r) @ (r, n)


def dense_overlap(new: Bases, old: Bases) -> Overlaps:
    return {axis: new[axis].mT @ old[axis] for axis in new}  # (r', m) @ (m, r)


def _dense(find: Callable[[Any, Ranks, Bases | None, int], Bases], **flags: Any) -> Projector:
    return Projector(find, dense_spec, dense_project, dense_back, dense_overlap, **flags)


# --- a random matrix that is a seed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredSeed:
    """The seed of a `sketch` (... x m x r)."""

    name: str
    shape: tuple[int, ...]
    compute_dtype: torch.dtype

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"{self.name}_seed",)

    def spec(self) -> dict[str, TensorSpec]:
        return {f"{self.name}_seed": TensorSpec((*self.shape[:-2], 1), torch.int64)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        """The matrix; `encode` takes its seed."""
        rows, rank = self.shape[-2:]
        return sketch(state[f"{self.name}_seed"], rows, rank, self.compute_dtype)

    read = decode

    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None) -> None:
        state[f"{self.name}_seed"].copy_(value)


def draw(G: Any, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """The seeds of normal numbers of variance 1 / r, whatever the gradient (APOLLO, arXiv 2412.05270, Alg. 1; Flora, arXiv 2402.03293).

    The matrices of a batch share them.
    """
    return {axis: seeds(tuple(G.shape[:-2]), 2 * seed + axis + 2, G.device) for axis in ranks}


def seed_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """8 bytes, whatever the codec."""
    names = {-2: "basis_left", -1: "basis_right"} if len(ranks) == 2 else dict.fromkeys(ranks, "basis")
    return {axis: StoredSeed(names[axis], (*view[:-2], view[axis], rank), compute_dtype) for axis, rank in ranks.items()}


# --- the factors of a tensor, and single elements beside them ---------------------------------------------------------


def elements_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """The factors, and k indices of 4 bytes, of 8 where the tensor has more than 2^31 elements."""
    at = sparse_tucker.SET
    index = StoredIndex("basis_index", (ranks[at],), sparse_tucker.index_dtype(view))
    return {**tucker.spec(view, sparse_tucker.modes(ranks), codec, compute_dtype), at: index}


# --- the matrix itself -------------------------------------------------------------------------------------------------


def identity_project(X: Tensor, bases: Bases) -> Tensor:
    """X itself, in fp32 or fp64."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def identity_back(change: write.WeightUpdate, low: Tensor, bases: Bases) -> None:
    """W <- decay_factor W - scale low."""
    write.subtract_parts(change, low, lambda low, rows: low[rows].clone())


PROJECTORS: dict[str, Projector] = {
    "power": _dense(power),
    "rsvd": _dense(rsvd),
    "gram": _dense(gram, whole=True),
    "svd": _dense(svd, in_turn=False, whole=True),
    "momentum": _dense(momentum, follows=True),
    "switch": _dense(switch),
    "random": _dense(random, looks=False),
    "gaussian": Projector(draw, seed_spec, dense_project, dense_back, None, looks=False, basis="a seed"),
    "rows": Projector(
        next_rows,
        rows_spec,
        rows_project,
        rows_back,
        rows_overlap,
        rows_part,
        axes=(-2,),
        looks=False,
        adam={"cpu": native.rows, "cuda": twins.in_triton("rows")},
        basis="indices",
    ),
    "block_mean": Projector(
        None,
        blocks_spec,
        blocks_project,
        blocks_back,
        None,
        looks=False,
        in_turn=False,
        fit=whole_blocks,
        adam={"cpu": native.block_means, "cuda": twins.in_triton("block_means")},
        averages=True,
        basis="nothing that is stored",
    ),
    "identity": Projector(
        None,
        blocks_spec,
        identity_project,
        identity_back,
        None,
        looks=False,
        in_turn=False,
        basis="nothing that is stored",
        fit=lambda length, rank: length,
    ),
    "tucker": Projector(tucker.find, tucker.spec, tucker.project, tucker.back, tucker.overlap, modes=tucker.mode_ranks, whole=True),
    "tucker_sparse": Projector(
        sparse_tucker.find,
        elements_spec,
        sparse_tucker.project,
        sparse_tucker.back,
        sparse_tucker.overlap,
        modes=tucker.mode_ranks,
        elements=True,
        whole=True,
    ),
}
