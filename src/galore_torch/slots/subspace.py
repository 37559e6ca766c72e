"""What a subspace is to the engine: the types of slot 1, whose table is `slots.projectors`.

A gradient is seen as matrices (... x m x n), and a projector reduces one or both of their axes, -2 = rows and -1 = columns, to a rank.
``Bases`` maps each reduced axis to whatever describes its subspace: m x r orthonormal columns, or r indices, which nothing but the
projector looks into. Everything is batched over leading dimensions. A row with ``modes`` sees a tensor with all of its axes
(`slots.tucker`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from galore_torch.ops import linalg, native, write
from galore_torch.ops.codecs import Seed, TensorSpec

Ranks = Mapping[int, int]  # axis (-2 = rows, -1 = columns) -> its rank
Bases = dict[int, Tensor]
# axis -> C = new basis^T old basis (... x r' x r), or of a set of rows or elements the place of each in the old one (... x r'), -1: new
Overlaps = dict[int, Tensor]


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

    One for each matrix of a batch (...), 0-d for one. Blind to signs and to rotations within the subspace. Of a set it is the share that
    stayed.
    """
    return torch.stack([_kept(each) for each in C.values()]).mean(0)


def _kept(C: Tensor) -> Tensor:
    return (C >= 0).float().mean(-1) if is_set(C) else linalg.squared(C).sum((-2, -1)) / C.shape[-1]


def is_set(C: Tensor) -> bool:
    """Whether it is places in a set, and no matrix."""
    return C.dtype == torch.int64
