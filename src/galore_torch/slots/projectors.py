"""Slot 1: which subspace? ``projector(G, rank, previous, seed) -> {mode: basis}``, batched over leading dimensions.

G (m x n) is finite, not zero, in fp32 or fp64. ``previous`` maps each wanted mode (0 = rows, 1 = columns) to the basis it has now,
or to None. The answer is orthonormal columns, m x r for mode 0 and n x r for mode 1, in tensors of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from galore_torch.ops import linalg

Bases = dict[int, Tensor]
Projector = Callable[[Tensor, int, Mapping[int, Tensor | None], int], Bases]


def svd(G: Tensor, rank: int, previous: Mapping[int, Tensor | None], seed: int) -> Bases:
    """Leading singular vectors by a full SVD: exact, and what galore-torch 1.0 does."""
    found = linalg.svd_bases(G, rank)
    return {mode: found[mode] for mode in previous}


def gram(G: Tensor, rank: int, previous: Mapping[int, Tensor | None], seed: int) -> Bases:
    """The same subspaces by the eigenvectors of the smaller Gram matrix."""
    found = linalg.gram_bases(G, rank)
    return {mode: found[mode] for mode in previous}


def rsvd(G: Tensor, rank: int, previous: Mapping[int, Tensor | None], seed: int) -> Bases:
    """Leading singular vectors from a random sketch, every time anew (Halko et al.; GaLore 2, arXiv 2504.20437)."""
    return {mode: linalg.sketched_basis(G if mode == 0 else G.mT, rank, seed) for mode in previous}


def power(G: Tensor, rank: int, previous: Mapping[int, Tensor | None], seed: int) -> Bases:
    """One step of block power iteration from the basis in use; `rsvd` where there is none."""
    found = {}
    for mode, basis in previous.items():
        A = G if mode == 0 else G.mT
        found[mode] = linalg.sketched_basis(A, rank, seed) if basis is None else linalg.power_step(A, basis, seed)
    return found


def random(G: Tensor, rank: int, previous: Mapping[int, Tensor | None], seed: int) -> Bases:
    """Orthonormal directions from a seed, whatever the gradient (Flora, arXiv 2402.03293; GoLore, arXiv 2410.11289)."""
    shapes = {0: (G.shape[-2], rank), 1: (G.shape[-1], rank)}
    return {mode: linalg.orthonormalize(linalg.gaussian((*G.shape[:-2], *shapes[mode]), seed + mode, G)) for mode in previous}


PROJECTORS: dict[str, Projector] = {"power": power, "rsvd": rsvd, "gram": gram, "svd": svd, "random": random}
