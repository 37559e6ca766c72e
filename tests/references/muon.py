"""Naive transcriptions of Muon, of full rank and in a subspace, in our words: the oracles. fp64, one matrix, every product in full."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from references.galore import best_subspace


def newton_schulz(X: Tensor) -> Tensor:
    """Five steps of x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5 on the singular values of X / ||X||_F (Jordan et al., 2024), by an SVD."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


class MuonReference:
    """M <- G + mu M; W <- (1 - lr decay) W - lr scale sqrt(max(m, n)) NS5(G + mu M) (Jordan et al., 2024; arXiv 2502.16982, eq. 4)."""

    def __init__(self, W: Tensor, lr: float, mu: float = 0.95, scale: float = 0.2, weight_decay: float = 0.0):
        self.W, self.lr, self.mu, self.decay = W.double().clone(), lr, mu, 1 - lr * weight_decay
        self.size = lr * scale * math.sqrt(max(W.shape))
        self.M = torch.zeros_like(self.W)

    def step(self, G: Tensor) -> Tensor:
        self.M = G.double() + self.mu * self.M
        self.W = self.decay * self.W - self.size * newton_schulz(G.double() + self.mu * self.M)
        return self.W


class SubspaceMuonReference(MuonReference):
    """A = G + mu P M; at every ``gap``-th step P <- orth(A (A^T P)); M <- P^T A; then NS5 of P (mu M + P^T G) + (G - P P^T G).

    The first P is given: any basis of the first gradient's subspace, which only rotates M. P is on the short side; between refreshes it
    stays.
    """

    def __init__(self, W: Tensor, P: Tensor, gap: int = 1, **settings: float):
        super().__init__(W, **settings)  # type: ignore[arg-type]
        self.left, self.gap, self.t = W.shape[0] < W.shape[1], gap, 0
        self.P = P.double().clone()
        self.M = torch.zeros(P.shape[1], max(W.shape), dtype=torch.float64)

    def step(self, G: Tensor) -> Tensor:
        G = G.double() if self.left else G.double().T
        A = G + self.mu * self.P @ self.M
        if self.t and self.t % self.gap == 0:
            self.P = best_subspace(A @ (A.T @ self.P), self.P.shape[1], "left")  # all of its range
        self.t += 1
        P = self.P
        self.M = P.T @ A
        update = newton_schulz(P @ (self.mu * self.M + P.T @ G) + (G - P @ P.T @ G))
        self.W = self.decay * self.W - self.size * (update if self.left else update.T)
        return self.W
