"""Tensor-GaLore on one tensor, naive, in our words: the oracle. fp64 or complex128, full SVDs of every unfolding, no cleverness."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unfold(X: Tensor, mode: int) -> Tensor:
    """Mode first, all others behind it in their order."""
    return torch.stack([X.select(mode, i).reshape(-1) for i in range(X.shape[mode])])


def times(X: Tensor, A: Tensor, mode: int) -> Tensor:
    """X x_mode A by its definition: every fibre of the mode is multiplied by A."""
    return torch.stack([sum(A[j, i] * X.select(mode, i) for i in range(A.shape[1])) for j in range(A.shape[0])], dim=mode)  # type: ignore[misc]


def aligned(span: Tensor, old: Tensor) -> Tensor:
    """The old basis, projected on a new span and made orthonormal vector by vector (Gram and Schmidt)."""
    columns: list[Tensor] = []
    for j in range(old.shape[1]):
        column = span @ (span.mH @ old[:, j])
        for other in columns:
            column = column - other * (other.conj() @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


class TensorGaLoreReference:
    """AdamW on the core of each gradient (arXiv 2501.02379), with real second moments, and moments that cross a refresh mode by mode.

    Its subspaces are those of the leading singular vectors of each unfolding: the answer of HOOI where the gradient has just these ranks.
    """

    def __init__(self, W: Tensor, ranks: list[int | None], gap: int, scale: float, lr: float, weight_decay: float = 0.0):
        self.W = W.to(torch.complex128 if W.is_complex() else torch.float64).clone()
        self.ranks, self.gap, self.scale, self.lr, self.decay = ranks, gap, scale, lr, 1 - lr * weight_decay
        self.factors: dict[int, Tensor] = {}
        self.t = 0
        self.m = self.v = torch.zeros(())

    def refresh(self, G: Tensor) -> None:
        for mode, rank in enumerate(self.ranks):
            if rank is None:
                continue
            span = torch.linalg.svd(unfold(G, mode), full_matrices=False).U[:, :rank]
            if not self.t:
                self.factors[mode] = span
                continue
            new = aligned(span, self.factors[mode])
            C = new.mH @ self.factors[mode]
            self.m = times(self.m, C, mode)
            squares = C.abs() ** 2
            lost = (1 - squares.sum(1, keepdim=True)).clamp_min(0)
            self.v = times(self.v, squares + lost / C.shape[1], mode)
            self.factors[mode] = new

    def step(self, G: Tensor) -> Tensor:
        G = G.to(self.W.dtype)
        if self.t % self.gap == 0:
            self.refresh(G)
        self.t += 1
        R = G
        for mode, U in self.factors.items():
            R = times(R, U.mH, mode)
        self.m = 0.9 * self.m + 0.1 * R
        self.v = 0.999 * self.v + 0.001 * R.abs() ** 2
        N = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t) * self.m / (self.v.sqrt() + 1e-6)
        for mode, U in self.factors.items():
            N = times(N, U, mode)
        self.W = self.decay * self.W - self.scale * N
        return self.W


class TensorGRaDReference(TensorGaLoreReference):
    """The same on what the k largest elements leave, with AdamW on each of those by itself (TensorGRaD, arXiv 2501.02379v2).

    The set is found at a refresh. Elements that stay in it keep their moments; new ones begin with m = 0 and the mean of the old ones' v.
    """

    def __init__(self, W: Tensor, ranks: list[int | None], k: int, gap: int, scale: float, sparse_scale: float, lr: float, decay: float):
        super().__init__(W, ranks, gap, scale, lr, decay)
        self.k, self.sparse_scale = k, sparse_scale
        self.moments: dict[int, tuple[complex, float]] = {}

    def step(self, G: Tensor) -> Tensor:
        G = G.to(self.W.dtype)
        values = G.flatten().tolist()
        if self.t % self.gap == 0:
            largest = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: self.k]
            mean = sum(v for _, v in self.moments.values()) / max(1, len(self.moments))
            self.moments = {i: self.moments.get(i, (0.0, mean)) for i in largest}
        rest = G.clone()
        for i in self.moments:
            rest.view(-1)[i] = 0
        super().step(rest)
        for i, (m, v) in self.moments.items():
            m, v = 0.9 * m + 0.1 * values[i], 0.999 * v + 0.001 * abs(values[i]) ** 2
            self.moments[i] = m, v
            size = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
            self.W.view(-1)[i] -= self.sparse_scale * size * m / (math.sqrt(v) + 1e-6)
        return self.W
