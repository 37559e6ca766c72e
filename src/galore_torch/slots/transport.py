"""Slot 2: how do moments cross a change of basis? ``transport(C per mode, moment, kind, mean_over) -> moment``.

C = new basis^T old basis (r' x r), one for each projected mode (0 = rows, 1 = columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from galore_torch.ops.linalg import mode_product

Overlaps = Mapping[int, Tensor]  # mode -> C
Transport = Callable[[Overlaps, Tensor, str, int | None], Tensor]


def keep(C: Overlaps, moment: Tensor, kind: str, mean_over: int | None) -> Tensor:
    """Leave the numbers where they are, as galore-torch 1.0 does: wrong whenever a basis vector turns or changes its sign."""
    return moment


def reset(C: Overlaps, moment: Tensor, kind: str, mean_over: int | None) -> Tensor:
    """Forget."""
    return moment if kind == "other" else moment.new_zeros(moment.shape)


def rotate(C: Overlaps, moment: Tensor, kind: str, mean_over: int | None) -> Tensor:
    """Carry the moments over: m' = C m, and v' = (C * C) v + (what C * C has lost of each row) x mean v.

    m = basis^T (mean gradient), so C m is its part in the new basis (GoLore, arXiv 2410.11289; LDAdam, arXiv 2410.16103).
    v holds expected squares; for coordinates without correlation the square of C carries them. A new direction that lies
    outside the old subspace has no history: it is given the mean of the old ones, for a second moment near zero would
    make its first updates 1 / sqrt(1 - beta2) times too large. Every C_ij enters squared, so flipping a basis vector
    changes nothing; C = I is the identity; r = m leaves basis m unchanged.
    A moment averaged over one axis (Adafactor's factors) is carried along the axis it still has.
    """
    if kind == "other":
        return moment
    for mode, matrix in C.items():
        axis = mode - 2  # rows -2, columns -1
        if kind == "second":
            matrix = matrix.square()
            lost = (1 - matrix.sum(-1, keepdim=True)).clamp_min(0)
            matrix = matrix + lost / matrix.shape[-1]  # the mean is a product with a constant matrix
        if mean_over is None:
            moment = mode_product(moment, matrix, mode)
        elif axis != mean_over:
            moment = (matrix @ moment.unsqueeze(-1)).squeeze(-1)
    return moment


TRANSPORTS: dict[str, Transport] = {"keep": keep, "reset": reset, "rotate": rotate}
