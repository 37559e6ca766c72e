"""The tensor projector's published name, for code that calls one by hand. Optimizers do not use it: they take ``tensor=True``."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_torch.engine.checks import check_gap, check_rank
from galore_torch.ops.write import WeightUpdate
from galore_torch.slots import tucker


class GaLoreProjectorTensor:
    """Projects one tensor's gradient on a factor for each mode, and its update back (Tensor-GaLore, arXiv 2501.02379).

    The factors are made at the first call, and follow the gradient each ``update_proj_gap`` calls; the published class never refreshed.
    ``rank``: a number for every dimension, a list with one for each, or a fraction of the elements. ``ortho_matrix``: axis, counted from
    the end, -> factor (N_k x R_k); dimensions that keep their length have none. Raises ValueError for what is no rank or gap.
    """

    def __init__(self, rank: int | float | list[int | None], verbose: bool = False, update_proj_gap: int = 200, scale: float = 1.0) -> None:
        check_rank(rank)
        check_gap(update_proj_gap)
        self.rank = tuple(rank) if isinstance(rank, list) else rank
        self.verbose = verbose
        self.update_proj_gap = update_proj_gap
        self.scale = scale
        self.ortho_matrix: dict[int, Tensor] | None = None

    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor:
        """The core (R_1 x ... x R_d), in fp32 or fp64; new factors at the first call and when iter is a multiple of the gap."""
        if self.ortho_matrix is None or iter % self.update_proj_gap == 0:
            exact = full_rank_grad.to(torch.promote_types(full_rank_grad.dtype, torch.float32))
            ranks = tucker.mode_ranks(tuple(exact.shape), self.rank)
            self.ortho_matrix = tucker.find(exact, ranks, self.ortho_matrix, iter)
        return tucker.project(full_rank_grad, self.ortho_matrix)

    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        """The full-size update, times ``scale``."""
        assert self.ortho_matrix is not None, "project comes first"
        if not self.ortho_matrix:  # every dimension keeps its length
            return self.scale * low_rank_grad
        sizes = {axis: factor.shape[0] for axis, factor in self.ortho_matrix.items()}
        full = low_rank_grad.new_zeros([sizes.get(axis - low_rank_grad.dim(), size) for axis, size in enumerate(low_rank_grad.shape)])
        tucker.back(WeightUpdate(full, scale=-self.scale), low_rank_grad, self.ortho_matrix)
        return full
