"""Slot 1: which subspace? ``projector(G, rank) -> (left m x r, right n x r)``, batched over leading dimensions.

A projector sees a finite, non-zero gradient in fp32 or fp64 and answers with orthonormal columns it owns. Which of the two
bases is used is the layout's business.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from galore_torch import linalg

Projector = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# The cheap warm-started refresh joins this table; the engine does not change.
PROJECTORS: dict[str, Projector] = {
    "svd": linalg.svd_bases,
    "gram": linalg.gram_bases,
}
