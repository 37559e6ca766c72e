"""Naive one-matrix transcriptions of the papers, in our words: the oracles. fp64, full-size matrices, no cleverness."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def best_subspace(G: Tensor, rank: int, side: str) -> Tensor:
    """Leading singular vectors of G on one side, by a full SVD."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :rank] if side == "left" else Vh[:rank].T


def sides(m: int, n: int, proj_type: str) -> tuple[str, ...]:
    """The published table, spelled out."""
    tall = m >= n
    if proj_type == "std":
        return ("right",) if tall else ("left",)
    if proj_type == "reverse_std":
        return ("left",) if tall else ("right",)
    return ("left", "right") if proj_type == "full" else (proj_type,)


class GaLoreReference:
    """GaLore (arXiv 2403.03507, Alg. 2) on one matrix: project, inner rule, project back, refresh every T steps."""

    def __init__(self, W: Tensor, rule: str, rank: int, gap: int, scale: float, proj_type: str, transport: str, **hyper: Any):
        self.W, self.rule, self.rank, self.gap, self.scale, self.transport = W.double().clone(), rule, rank, gap, scale, transport
        self.sides, self.hyper = sides(*W.shape, proj_type), hyper
        self.t = 0
        self.bases: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def project(self, G: Tensor) -> Tensor:
        if "left" in self.bases:
            G = self.bases["left"].T @ G
        if "right" in self.bases:
            G = G @ self.bases["right"]
        return G

    def back(self, N: Tensor) -> Tensor:
        if "left" in self.bases:
            N = self.bases["left"] @ N
        if "right" in self.bases:
            N = N @ self.bases["right"].T
        return N

    def refresh(self, G: Tensor) -> None:
        old = self.bases
        self.bases = {side: best_subspace(G, self.rank, side) for side in self.sides}
        if not old or self.transport == "keep":
            return
        for name, value in self.state.items():
            if self.transport == "reset":
                self.state[name] = torch.zeros_like(value)
                continue
            second = name in ("v", "row", "col", "sum")
            for side in self.sides:
                C = self.bases[side].T @ old[side]
                if second:  # squares carry squares; what a row has lost is filled with the mean of the old values
                    C = C * C
                    C = C + (1 - C.sum(1, keepdim=True)).clamp_min(0) / C.shape[1]
                if value.dim() == 2:
                    value = C @ value if side == "left" else value @ C.T
                elif (side == "left") == (name == "row"):
                    value = C @ value
            self.state[name] = value

    def step(self, G: Tensor) -> Tensor:
        G, h = G.double(), self.hyper
        if self.t % self.gap == 0:
            self.refresh(G)
        self.t += 1
        R = self.project(G)
        N = getattr(self, self.rule)(R)
        update = self.scale * self.back(N)
        decay = 1 - h["lr"] * h.get("weight_decay", 0.0)
        self.W = (self.W - update) * decay if h.get("decay") == "after" else self.W * decay - update
        return self.W

    def adam(self, R: Tensor) -> Tensor:
        (b1, b2), eps, s = self.hyper["betas"], self.hyper["eps"], self.state
        s["m"] = b1 * s.get("m", torch.zeros_like(R)) + (1 - b1) * R
        s["v"] = b2 * s.get("v", torch.zeros_like(R)) + (1 - b2) * R * R
        size = self.hyper["lr"] * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        return size * s["m"] / (s["v"].sqrt() + eps)

    def adagrad(self, R: Tensor) -> Tensor:
        self.state["sum"] = self.state.get("sum", torch.zeros_like(R)) + R * R
        return self.hyper["lr"] * R / (self.state["sum"].sqrt() + self.hyper["eps"])

    def momentum(self, R: Tensor) -> Tensor:
        mu = self.hyper["momentum"]
        self.state["m"] = mu * self.state.get("m", torch.zeros_like(R)) + R
        return self.hyper["lr"] * self.state["m"]

    def adafactor(self, R: Tensor) -> Tensor:
        h, s = self.hyper, self.state
        beta2 = 1 - self.t ** h["decay_rate"]
        square = R * R + h["eps"][0]
        s["row"] = beta2 * s.get("row", torch.zeros(R.shape[0]).double()) + (1 - beta2) * square.mean(1)
        s["col"] = beta2 * s.get("col", torch.zeros(R.shape[1]).double()) + (1 - beta2) * square.mean(0)
        update = R / torch.sqrt(torch.outer(s["row"], s["col"]) / s["row"].mean())
        update = update / max(1.0, float(update.square().mean().sqrt()) / h["clip_threshold"])
        return h["lr"] * update
