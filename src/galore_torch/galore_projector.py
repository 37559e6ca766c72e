"""The projector class of galore-torch 1.0, for code that imports it and checkpoints that hold it. Optimizers do not use it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from galore_torch.choices import PROJ_TYPES, one_of
from galore_torch.engine.layout import projected_axes
from galore_torch.ops.linalg import mode_product, svd_bases


class GaLoreProjector:
    """Projects one matrix's gradient and its update back, refreshing the basis every ``update_proj_gap`` calls.

    ``ortho_matrix`` holds the basis in the published form: U (m x r), Vh (r x n), or [U, Vh] for proj_type "full".
    """

    def __init__(self, rank: int, verbose: bool = False, update_proj_gap: int = 200, scale: float = 1.0, proj_type: str = "std"):
        one_of("proj_type", proj_type, PROJ_TYPES)
        self.rank = rank
        self.verbose = verbose
        self.update_proj_gap = update_proj_gap
        self.scale = scale
        self.ortho_matrix: Any = None
        self.proj_type = proj_type

    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor:
        """The low-rank gradient, in the gradient's dtype; a new basis at the first call and when iter is a multiple of the gap."""
        shape = tuple(full_rank_grad.shape)
        if full_rank_grad.dim() != 2:
            raise ValueError(f"a gradient of shape {shape} is no matrix: GaLoreProjector takes two dimensions; reshape it")
        self._axes = projected_axes(shape, self.proj_type)
        if self.ortho_matrix is None or iter % self.update_proj_gap == 0:
            left, right = (basis.to(full_rank_grad.dtype) for basis in svd_bases(full_rank_grad.float(), self.rank))
            matrices = {-2: left, -1: right.mT.contiguous()}
            kept = [matrices[axis] for axis in self._axes]
            self.ortho_matrix = kept if len(kept) == 2 else kept[0]
        low = full_rank_grad
        for axis, basis in self._bases().items():
            low = mode_product(low, basis.mT, axis)
        return low

    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        """The full-size update, times ``scale``."""
        full = low_rank_grad
        for axis, basis in self._bases().items():
            full = mode_product(full, basis, axis)
        return full * self.scale

    def _bases(self) -> dict[int, Tensor]:
        matrices = self.ortho_matrix if isinstance(self.ortho_matrix, list) else [self.ortho_matrix]
        return {axis: matrix if axis == -2 else matrix.mT for axis, matrix in zip(self._axes, matrices, strict=True)}
