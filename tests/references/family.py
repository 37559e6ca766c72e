"""Naive one-matrix transcriptions of the family's papers, in our words: the oracles. fp64, full-size matrices, column by column."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from references.galore import best_subspace
from references.slots import RowsReference, _Adam


class _Sided:
    """The matrix seen with its short side, which is projected, as rows."""

    def __init__(self, W: Tensor, scale: float, lr: float):
        self.left = W.shape[0] < W.shape[1]
        self.W, self.scale, self.lr = self.turned(W.double().clone()), scale, lr

    def turned(self, X: Tensor) -> Tensor:
        return X if self.left else X.T


class ApolloReference(_Sided):
    """APOLLO (arXiv 2412.05270, Alg. 1): Adam on P^T G measures how much each column, or with ``mini`` the matrix, is to be scaled."""

    def __init__(self, W: Tensor, scale: float, lr: float, mini: bool, weight_decay: float = 0.0):
        super().__init__(W, scale, lr)
        self.mini, self.decay, self.adam, self.last = mini, 1 - lr * weight_decay, _Adam(lr, (0.9, 0.999), 1e-6), 0.0

    def step(self, G: Tensor, P: Tensor) -> Tensor:
        """P: m x r, which may be another one at any step; the moments stay."""
        G = self.turned(G.double())
        R = P.T @ G
        psi = self.adam.direction(R)
        S = G.clone()
        for j in range(G.shape[1]):
            S[:, j] *= float(psi.norm() / R.norm()) if self.mini else float(psi[:, j].norm() / R[:, j].norm())
        norm = float(S.norm())
        if self.last and norm > 1.01 * self.last:
            S *= 1.01 * self.last / norm
        self.last = float(S.norm())
        self.W = self.decay * self.W - self.lr * self.scale * S
        return self.turned(self.W)


class AliceReference(_Sided):
    """Alice-0 (arXiv 2502.07752, Alg. 3 and 4 without tracking) in a basis that stays: Adam without corrections, and the compensation."""

    def __init__(self, W: Tensor, G: Tensor, rank: int, scale: float, lr: float, betas: tuple[float, float]):
        super().__init__(W, scale, lr)
        self.U = best_subspace(self.turned(G.double()), rank, "left")
        self.betas, self.p, self.phi = betas, torch.zeros(self.W.shape[1]).double(), 0.0
        self.m = self.v = torch.zeros(rank, self.W.shape[1]).double()

    def step(self, G: Tensor) -> Tensor:
        G, (b1, b2), (m, r) = self.turned(G.double()), self.betas, self.U.shape
        sigma = self.U.T @ G
        self.m, self.v = b1 * self.m + (1 - b1) * sigma, b2 * self.v + (1 - b2) * sigma**2
        omega = self.m / (self.v.sqrt() + 1e-8)
        self.p = b1 * self.p + (1 - b1) * ((G**2).sum(0) - (sigma**2).sum(0))
        C = math.sqrt(m - r) * (G - self.U @ sigma) @ torch.diag(self.p**-0.5)
        eta = 1.01 / max(float(C.norm()) / self.phi, 1.01) if self.phi else 1.0
        self.phi = eta * float(C.norm())
        self.W = self.W - self.lr * self.scale * (self.U @ omega + 0.4 * eta * C)
        return self.turned(self.W)


class FrugalReference(RowsReference):
    """FRUGAL (arXiv 2411.07837): Adam on the rows in turn, and the sign of the gradient, or that of a root mean square of 1, elsewhere."""

    def __init__(self, W: Tensor, rank: int, gap: int, scale: float, lr: float, signs: bool):
        super().__init__(W, rank, gap, scale, lr)
        self.signs = signs

    def step(self, G: Tensor) -> Tensor:
        W = super().step(G)
        rest = G.double().clone()
        rest[self.rows] = 0
        W -= self.lr * (rest.sign() if self.signs else rest / rest.square().mean().sqrt())
        return W


class FoldReference:
    """Adam on means of ``block`` neighbours along ``axis`` and what they leave of G, over the root of the block's mean square."""

    def __init__(self, W: Tensor, axis: int, block: int, scale: float, lr: float, weight_decay: float = 0.0):
        self.W, self.axis, self.block, self.scale, self.lr = W.double().clone(), axis, block, scale, lr
        self.decay, self.t, blocks = 1 - lr * weight_decay, 0, W.shape[axis] // block
        self.m, self.v = ([torch.zeros(W.shape[-3 - axis]).double() for _ in range(blocks)] for _ in range(2))

    def step(self, G: Tensor) -> Tensor:
        G, self.t = G.double(), self.t + 1
        size = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        W, G = (self.W.T, G.T) if self.axis == -1 else (self.W, G)
        new = self.decay * W
        for b in range(len(self.m)):
            rows = range(b * self.block, (b + 1) * self.block)
            mean, square = sum(G[i] for i in rows) / self.block, sum(G[i] ** 2 for i in rows) / self.block
            self.m[b] = 0.9 * self.m[b] + 0.1 * mean
            self.v[b] = 0.999 * self.v[b] + 0.001 * square
            for i in rows:
                new[i] -= self.scale * size * (self.m[b] + G[i] - mean) / (self.v[b].sqrt() + 1e-6)
        self.W = new.T if self.axis == -1 else new
        return self.W


class LDAdamReference(_Sided):
    """LDAdam (arXiv 2410.16103, Alg. 1), with an exact basis of the new momentum at each step in place of a power step."""

    def __init__(self, W: Tensor, rank: int, lr: float, betas: tuple[float, float]):
        super().__init__(W, 1.0, lr)
        self.rank, self.betas, self.t, self.e = rank, betas, 0, torch.zeros_like(self.W)
        self.P = torch.zeros(self.W.shape[0], rank).double()
        self.m = self.v = torch.zeros(rank, self.W.shape[1]).double()

    def step(self, G: Tensor) -> Tensor:
        (b1, b2), t = self.betas, self.t
        A = self.turned(G.double()) + self.e
        seen = b1 * self.P @ self.m + (1 - b1) * A if t else A
        P, old, m = best_subspace(seen, self.rank, "left"), self.P, self.m
        if t:
            C = P.T @ old
            m_hat, v_hat = self.m / (1 - b1**t), self.v / (1 - b2**t)
            self.v = (1 - b2**t) * ((C * C) @ (v_hat - m_hat**2) + (C @ m_hat) ** 2).abs()
            self.m = C @ self.m
        R = P.T @ A
        self.e = A - P @ R + b1 / (1 - b1) * (old @ m - P @ self.m)
        self.P, self.t = P, t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * R, b2 * self.v + (1 - b2) * R**2
        size = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        self.W = self.W - size * P @ (self.m / (self.v.sqrt() + 1e-8))
        return self.turned(self.W)
