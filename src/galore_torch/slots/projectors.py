"""Slot 1: which subspace, and how is it applied? A table of `Projector` rows.

A gradient is seen as matrices (... x m x n), and a projector reduces one or both of their axes, -2 = rows and -1 = columns, to a rank.
``Bases`` maps each reduced axis to whatever describes its subspace: m x r orthonormal columns, or r indices. Nothing outside this file
looks inside. Everything is batched over leading dimensions. A row with ``modes`` sees a tensor with all of its axes (`slots.tucker`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from galore_torch.ops import linalg, native, twins, write
from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.codecs import Seed, StoredTensor, TensorSpec
from galore_torch.ops.sketch import seeds, sketch
from galore_torch.slots import sparse_tucker, tucker

Ranks = Mapping[int, int]  # axis (-2 = rows, -1 = columns) -> its rank
Bases = dict[int, Tensor]
Overlaps = dict[int, Tensor]  # axis -> C = new basis^T old basis (... x r' x r), or of single elements the place of each in the old set (k)


class Stored(Protocol):
    """How one basis is stored: `codecs.StoredTensor`, or what does the same for indices."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    def spec(self) -> dict[str, TensorSpec]: ...
    def decode(self, state: Mapping[str, Tensor]) -> Tensor: ...
    def read(self, state: Mapping[str, Tensor]) -> Tensor: ...  # `decode`, or what a product takes as well
    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None) -> None: ...


@dataclass(frozen=True)
class Projector:
    """``find(G, ranks, previous, seed)``: the bases of a gradient that is finite and not zero, in fp32 or fp64; ``previous`` are those in
    use, or None. The answer's tensors are its own. None: the subspace never changes, and there is no refresh.

    ``state_spec(view, ranks, codec, compute_dtype)``: how each basis of a parameter seen as ``view`` ((E x) m x n) is stored.
    ``project(X, bases)``: X with each reduced axis as short as its rank, in the dtype X is multiplied in.
    ``project_back(change, low, bases)``: W <- decay_factor W - scale (low in full size), in place.
    ``overlap(new, old)``: C = new^T old for each axis, which transports and the adaptive gap read; None where it says nothing.
    ``part(bases)``: the rows that R is, where R is nothing but a slice of them and the host knows which, else None; None: it never is.
    ``fit(length, rank)``: the rank in use on an axis of this length for a rank that is wished, or None where there is none.
    ``adam``: by kind of device, a pass that does the whole step of Adam on a matrix, see `ops.native`.
    ``averages``: whether R is made of means, whose elements may cancel: G itself is asked whether it is finite.
    ``axes``: the axes it reduces whatever proj_type says; None where proj_type chooses.
    ``modes(shape, rank)``: axis -> rank of a parameter that it sees as a tensor, real or complex; None: it sees real matrices.
    ``elements``: whether R is a vector, the core and then single elements, whose number is the rank of axis 0. R of an outer product is
    then not made of its factors alone, and project does not undo project_back.
    ``looks``: whether it looks at the gradient, so that the overlap says how far the gradient's subspace has turned.
    ``follows``: whether it looks at the first moment that the gradient makes, in full size, in place of the gradient (`Rule.blend`).
    ``in_turn``: whether parameters take turns; else all refresh at steps 0, T, 2T, ...
    ``whole``: whether ``find`` needs G as a matrix; else an `outer.OuterProduct`, which is only multiplied, is enough.
    ``basis``: what is stored, where a codec has no effect on it; None: dense columns.
    """

    find: Callable[[Any, Ranks, Bases | None, int], Bases] | None
    state_spec: Callable[[tuple[int, ...], Ranks, str, torch.dtype], dict[int, Stored]]
    project: Callable[[Tensor, Bases], Tensor]
    project_back: Callable[[write.WeightUpdate, Tensor, Bases], None]
    overlap: Callable[[Bases, Bases], Overlaps] | None
    part: Callable[[Bases], slice | None] | None = None
    axes: tuple[int, ...] | None = None
    modes: Callable[[tuple[int, ...], Any], dict[int, int]] | None = None
    elements: bool = False
    looks: bool = True
    follows: bool = False
    in_turn: bool = True
    whole: bool = False
    basis: str | None = None
    fit: Callable[[int, int], int | None] = lambda length, rank: rank
    adam: Mapping[str, native.OnePass] = field(default_factory=dict)
    averages: bool = False


def kept_share(C: Overlaps) -> Tensor:
    """||C||_F^2 / r, the share of the old subspace that the new one kept: 1 the same, about r / m unrelated; the mean over axes.

    One for each matrix of a batch (...), 0-d for one. Blind to signs and to rotations within the subspace. Of single elements it is the
    share of the set that stayed.
    """
    return torch.stack([_kept(each) for each in C.values()]).mean(0)


def _kept(C: Tensor) -> Tensor:
    return (C >= 0).float().mean() if C.dim() == 1 else linalg.squared(C).sum((-2, -1)) / C.shape[-1]


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


# --- an index set: some of the rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredIndex:
    """Indices, as they are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.name,)

    def spec(self) -> dict[str, TensorSpec]:
        return {self.name: TensorSpec(self.shape, self.dtype)}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[self.name]

    read = decode

    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None) -> None:
        state[self.name].copy_(value)


def elements_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """The factors, and k indices of 4 bytes, of 8 where the tensor has more than 2^31 elements."""
    at = sparse_tucker.SET
    index = StoredIndex("basis_index", (ranks[at],), sparse_tucker.index_dtype(view))
    return {**tucker.spec(view, sparse_tucker.modes(ranks), codec, compute_dtype), at: index}


def next_rows(G: Tensor, ranks: Ranks, previous: Bases | None, seed: int) -> Bases:
    """The first r rows, then the r that follow, around and around: every row has its turn. No look at the gradient.

    A block never goes on at the first row: the last one is the last r rows, some of which have been trained just before.
    """
    rank = ranks[-2]
    block, last = torch.arange(rank, device=G.device), G.shape[-2] - rank
    if previous is None:
        return {-2: block.expand(*G.shape[:-2], -1).clone()}
    first = previous[-2][..., :1]
    return {-2: block + torch.where(first >= last, 0, (first + rank).clamp_max(last))}


def rows_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """r indices of 8 bytes, whatever the codec."""
    return {-2: StoredIndex("basis", (*view[:-2], ranks[-2]))}


def rows_project(X: Tensor, bases: Bases) -> Tensor:
    """X at the rows of the set: (m, n) -> (r, n)."""
    index = bases[-2]
    if X.dim() == 2:
        return X.index_select(0, index)
    return X.gather(-2, index.unsqueeze(-1).expand(*index.shape, X.shape[-1]))


def rows_back(change: write.WeightUpdate, low: Tensor, bases: Bases) -> None:
    """W <- decay_factor W, and - scale N at the rows of the set."""
    write.subtract_rows(change, bases[-2], low)


def rows_part(bases: Bases) -> slice | None:
    """The block of rows, where the host may look at it: a view of G and of W is then enough, and nothing is gathered."""
    index = bases[-2]
    if index.dim() > 1 or not linalg.readable(index):
        return None
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else None  # a set of an older checkpoint may go on at the first row


def rows_overlap(new: Bases, old: Bases) -> Overlaps:
    """C is 1 where two rows are the same one, else 0."""
    return {-2: (new[-2].unsqueeze(-1) == old[-2].unsqueeze(-2)).float()}  # (r', 1) == (1, r)


# --- means of neighbours -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredBlocks:
    """Nothing: the rank says all. ``shape``: (rank, 0), for a basis without elements."""

    shape: tuple[int, ...]
    keys: tuple[str, ...] = ()

    def spec(self) -> dict[str, TensorSpec]:
        return {}

    def decode(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.empty(self.shape, device="cpu")

    read = decode

    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None) -> None:
        """There is nothing to keep."""


def whole_blocks(length: int, rank: int) -> int | None:
    """How many means of 2^l neighbours: 2^l the largest that divides ``length`` and leaves at least ``rank``; None for no l from 1."""
    size = 1
    while length % (2 * size) == 0 and length // (2 * size) >= rank:
        size *= 2
    return length // size if size > 1 else None


def blocks_spec(view: tuple[int, ...], ranks: Ranks, codec: str, compute_dtype: torch.dtype) -> dict[int, Stored]:
    """No state at all."""
    return {axis: StoredBlocks((rank, 0)) for axis, rank in ranks.items()}


def blocks_project(X: Tensor, bases: Bases) -> Tensor:
    """The mean of each block of neighbours (FOAM, arXiv 2512.07112): (m, n) -> (m, r) or (r, n), in fp32 or fp64."""
    for axis, basis in bases.items():
        X = _means(X, axis, basis.shape[0])
    return X


def _means(X: Tensor, axis: int, rank: int) -> Tensor:
    """A 16-bit X is converted a few rows at a time: no full-size copy."""
    wide = torch.promote_types(X.dtype, torch.float32)
    if X.dtype == wide:
        return X.unflatten(axis, (rank, -1)).mean(axis)
    shape = [*X.shape]
    shape[axis] = rank
    out = X.new_empty(shape, dtype=wide)
    rows, low = X.reshape(-1, X.shape[-1]), out.view(-1, shape[-1])
    tall = rows.shape[0] // low.shape[0]
    for some in parts(low.shape[0], chunk_elements(X.device) // (tall * rows.shape[1])):
        block = rows[some.start * tall : some.stop * tall].to(wide)
        low[some] = block.unflatten(axis, (low[some].shape[axis], -1)).mean(axis)
    return out


def blocks_back(change: write.WeightUpdate, low: Tensor, bases: Bases) -> None:
    """W <- decay_factor W - scale E N, where E gives each element of a block the block's own value."""
    write.subtract_spread(change, low)


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
        adam={"cuda": twins.in_triton("rows")},
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
