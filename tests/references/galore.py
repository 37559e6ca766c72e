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


# --- Q-GaLore -------------------------------------------------------------------------------------------------------------


def bf16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32).to(torch.bfloat16))


def bf16_neighbour(value: float, towards: float) -> float:
    return float(torch.nextafter(torch.tensor(value, dtype=torch.bfloat16), torch.tensor(towards, dtype=torch.bfloat16)))


def affine_grid(low: float, high: float, levels: int, headroom: float = 0.0) -> tuple[float, float]:
    """(step, start): numbers of bf16 with start <= low and start + levels step >= high, and ``headroom`` of the range free at each end."""
    free = headroom * (high - low)
    start = bf16(low - free)
    if start > low - free:
        start = bf16_neighbour(start, -math.inf)
    step = bf16((high + free - start) / levels)
    if start + levels * step < high + free:
        step = bf16_neighbour(step, math.inf)
    return step, start


class QGaLoreReference:
    """One step of Q-GaLore (arXiv 2407.08296) on one matrix, block by block, from the state as it is stored to the numbers to be rounded.

    Codes are decoded here by their definition: offset + code * step for weights (256 in a row of memory) and the basis (blocks down
    each column, two codes to a byte), level[code] * scale for the moments.
    """

    def __init__(self, lr: float, betas: tuple[float, float], eps: float, scale: float, weight_decay: float):
        self.lr, self.betas, self.eps, self.scale, self.weight_decay = lr, betas, eps, scale, weight_decay

    @staticmethod
    def weight(codes: Tensor, step: Tensor, start: Tensor) -> Tensor:
        flat = codes.flatten().double()
        for i in range(len(flat)):
            flat[i] = float(start[i // 256]) + float(flat[i]) * float(step[i // 256])
        return flat.view(codes.shape)

    @staticmethod
    def basis(packed: Tensor, step: Tensor, start: Tensor, rows: int) -> Tensor:
        block, half = -(-rows // step.shape[0]), packed.shape[0]
        out = torch.zeros(rows, packed.shape[1], dtype=torch.float64)
        for i in range(rows):
            for j in range(packed.shape[1]):
                byte = int(packed[i % half, j])
                code = byte % 16 if i < half else byte // 16
                out[i, j] = float(start[i // block, j]) + code * float(step[i // block, j])
        return out

    @staticmethod
    def moment(codes: Tensor, scale: Tensor, levels: Tensor, axis: int) -> Tensor:
        block = codes.shape[axis] // scale.shape[axis]
        return levels.double()[codes.long()] * scale.double().repeat_interleave(block, axis)

    def moved(self, W: Tensor, P: Tensor, m: Tensor, v: Tensor, G: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, first and second moment) before they are rounded. P on the left of a wide G, on the right of a tall one."""
        left = G.shape[0] < G.shape[1]
        R = P.T @ G.double() if left else G.double() @ P
        b1, b2 = self.betas
        m, v = b1 * m + (1 - b1) * R, b2 * v + (1 - b2) * R * R
        N = self.lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + self.eps)
        return W * (1 - self.lr * self.weight_decay) - self.scale * (P @ N if left else N @ P.T), m, v

    @staticmethod
    def grid(values: Tensor, step: float, start: float) -> tuple[float, float]:
        """The grid of one block's new values: the old one while they fit it and a new one would not be a quarter finer."""
        low, high = float(values.min()), float(values.max())
        new = affine_grid(low, high, 255, 1 / 32)
        fits = low >= start and high <= start + 255 * step
        return (step, start) if fits and 0.75 * step <= new[0] else new
