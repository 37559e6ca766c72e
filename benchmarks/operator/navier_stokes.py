"""Two-dimensional Navier-Stokes in vorticity on a periodic square, by a pseudo-spectral solver: the data of a benchmark.

w_t + u . grad w = nu laplace w, u = (psi_y, -psi_x), laplace psi = -w, on [0, 2 pi)^2. Products are dealiased by the two-thirds rule;
diffusion is exact (an integrating factor), and advection takes the classical Runge-Kutta step of order 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Solver:
    """Fields of size x size points, in fp64."""

    def __init__(self, size: int, viscosity: float):
        k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
        self.kx, self.ky = k[:, None], k[None, : size // 2 + 1].abs()  # of rfft2: the last axis has no negative wave numbers
        self.square = self.kx**2 + self.ky**2
        self.inverse = 1 / self.square.clamp_min(1)  # psi's mean is free
        self.kept = (self.kx.abs() < size / 3) & (self.ky < size / 3)
        self.viscosity, self.size = viscosity, size

    def advection(self, w_hat: Tensor) -> Tensor:
        """-u . grad w, in Fourier space."""
        psi_hat = w_hat * self.inverse

        def field(x_hat: Tensor) -> Tensor:
            return torch.fft.irfft2(x_hat, s=(self.size, self.size))

        u, v = field(1j * self.ky * psi_hat), field(-1j * self.kx * psi_hat)
        w_x, w_y = field(1j * self.kx * w_hat), field(1j * self.ky * w_hat)
        return -torch.fft.rfft2(u * w_x + v * w_y) * self.kept

    def solve(self, w: Tensor, time: float, step: float) -> Tensor:
        """The vorticity (... x size x size) after ``time``, in steps of at most ``step``."""
        steps = math.ceil(time / step)
        h = time / steps
        half = torch.exp(-self.viscosity * self.square * h / 2)  # the integrating factor over half a step
        w_hat = torch.fft.rfft2(w)
        for _ in range(steps):
            a = h * self.advection(w_hat)
            b = h * self.advection(half * (w_hat + a / 2))
            c = h * self.advection(half * w_hat + b / 2)
            d = h * self.advection(half**2 * w_hat + half * c)
            w_hat = half**2 * (w_hat + a / 6) + half * (b + c) / 3 + d / 6
        return torch.fft.irfft2(w_hat, s=(self.size, self.size))


def random_vorticity(samples: int, size: int, seed: int) -> Tensor:
    """Gaussian fields with a spectrum that falls as (k^2 + 9)^-2, of mean 0 and root mean square 1."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    amplitude = (k[:, None] ** 2 + k[None, : size // 2 + 1] ** 2 + 9) ** -2
    amplitude[0, 0] = 0
    noise = torch.randn(samples, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    w = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(size, size))
    return w / w.square().mean((-2, -1), keepdim=True).sqrt()


def pairs(samples: int, size: int = 32, fine: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(vorticity at time 0, at time 1), viscosity 1e-3, solved on ``fine`` points and sampled on ``size``: fp32, samples x size x size."""
    w = random_vorticity(samples, fine, seed)
    later = Solver(fine, 1e-3).solve(w, 1.0, 0.02)
    step = fine // size
    return w[:, ::step, ::step].float(), later[:, ::step, ::step].float()
