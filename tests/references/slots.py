"""Naive one-matrix transcriptions of single rows of the slots, in our words: the oracles. fp64, full-size matrices, no cleverness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from references.galore import best_subspace


class _Adam:
    """Adam's direction psi(R) and its step size."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float):
        self.lr, self.betas, self.eps, self.t = lr, betas, eps, 0
        self.m = self.v = torch.zeros(())

    def direction(self, R: Tensor) -> Tensor:
        (b1, b2), self.t = self.betas, self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * R, b2 * self.v + (1 - b2) * R * R
        return math.sqrt(1 - b2**self.t) / (1 - b1**self.t) * self.m / (self.v.sqrt() + self.eps)


class FiraReference:
    """Fira (arXiv 2410.01623, Alg. 1) on one matrix, with Adam and a basis that stays: the residual column by column, then the limiter."""

    def __init__(self, W: Tensor, G: Tensor, rank: int, scale: float, lr: float, weight_decay: float = 0.0):
        self.W, self.scale, self.lr, self.decay = W.double().clone(), scale, lr, 1 - lr * weight_decay
        self.left = W.shape[0] < W.shape[1]
        self.P = best_subspace(G.double(), rank, "left" if self.left else "right")
        self.adam, self.last = _Adam(lr, (0.9, 0.999), 1e-6), 0.0

    def step(self, G: Tensor) -> Tensor:
        W, G, P = (self.W, G.double(), self.P) if self.left else (self.W.T, G.double().T, self.P)
        R = P.T @ G
        psi = self.adam.direction(R)
        S = G - P @ R
        for j in range(S.shape[1]):
            S[:, j] *= float(psi[:, j].norm()) / float(R[:, j].norm())
        norm = float(S.norm())
        if self.last and norm > 1.01 * self.last:
            S *= 1.01 * self.last / norm
        self.last = float(S.norm())
        W = self.decay * W - self.lr * (self.scale * P @ psi + S)
        self.W = W if self.left else W.T
        return self.W


class BlockMeansReference:
    """Adam on the means of ``block`` neighbours along ``axis``; with ``residual`` what the means leave of G is put into both moments
    (FOAM, arXiv 2512.07112). Block by block."""

    def __init__(self, W: Tensor, axis: int, block: int, scale: float, lr: float, residual: bool, weight_decay: float = 0.0):
        self.W, self.axis, self.block, self.scale, self.residual = W.double().clone(), axis, block, scale, residual
        self.lr, self.decay, self.t = lr, 1 - lr * weight_decay, 0
        blocks = W.shape[axis] // block
        self.m, self.v = ([torch.zeros(W.shape[-3 - axis]).double() for _ in range(blocks)] for _ in range(2))

    def step(self, G: Tensor) -> Tensor:
        G, self.t = G.double(), self.t + 1
        size = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        W, G = (self.W.T, G.T) if self.axis == -1 else (self.W, G)  # blocks of rows
        new = self.decay * W
        for b in range(len(self.m)):
            rows = range(b * self.block, (b + 1) * self.block)
            mean = sum(G[i] for i in rows) / self.block
            self.m[b] = 0.9 * self.m[b] + 0.1 * mean
            self.v[b] = 0.999 * self.v[b] + 0.001 * mean * mean
            for i in rows:
                rest = G[i] - mean if self.residual else torch.zeros_like(mean)
                new[i] -= self.scale * size * (self.m[b] + rest) / ((self.v[b] + rest * rest).sqrt() + 1e-6)
        self.W = new.T if self.axis == -1 else new
        return self.W


class RowsReference:
    """Adam on ``rank`` rows, then on the next ones after every gap, around and around, the last ``rank`` before the first; rows that had a
    moment keep it, new ones start with none and with the mean second moment."""

    def __init__(self, W: Tensor, rank: int, gap: int, scale: float, lr: float):
        self.W, self.rank, self.gap, self.scale, self.t = W.double().clone(), rank, gap, scale, 0
        self.lr, self.rows = lr, [len(W) - rank + i for i in range(rank)]
        self.m, self.v = torch.zeros(rank, W.shape[1]).double(), torch.zeros(rank, W.shape[1]).double()

    def step(self, G: Tensor) -> Tensor:
        if self.t % self.gap == 0:
            begin = self.rows[-1] + 1
            begin = 0 if begin == len(self.W) else min(begin, len(self.W) - self.rank)
            new = list(range(begin, begin + self.rank))
            m, v, mean = torch.zeros_like(self.m), torch.zeros_like(self.v), self.v.mean(0)
            for i, row in enumerate(new):
                v[i] = mean
                if row in self.rows:
                    m[i], v[i] = self.m[self.rows.index(row)], self.v[self.rows.index(row)]
            self.rows, self.m, self.v = new, m, v
        self.t += 1
        for i, row in enumerate(self.rows):
            g = G[row].double()
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            size = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
            self.W[row] -= self.scale * size * self.m[i] / (self.v[i].sqrt() + 1e-6)
        return self.W


class ErrorFeedbackReference:
    """SGD in a subspace of A = G + e, refreshed by a full SVD of A; e is what the projection drops of A (arXiv 2410.16103)."""

    def __init__(self, W: Tensor, rank: int, gap: int, scale: float, lr: float):
        self.W, self.rank, self.gap, self.size, self.t = W.double().clone(), rank, gap, scale * lr, 0
        self.e = torch.zeros_like(self.W)

    def step(self, G: Tensor) -> Tensor:
        A = G.double() + self.e
        if self.t % self.gap == 0:
            self.P = best_subspace(A, self.rank, "left" if A.shape[0] < A.shape[1] else "right")
        self.t += 1
        inside = self.P @ self.P.T @ A if A.shape[0] < A.shape[1] else A @ self.P @ self.P.T
        self.W = self.W - self.size * inside
        self.e = A - inside
        return self.W
