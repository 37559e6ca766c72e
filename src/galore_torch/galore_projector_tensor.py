"""The tensor projector's published name. Tensors of more than two dimensions are projected as matrices until it exists."""

from __future__ import annotations

from typing import Any


class GaLoreProjectorTensor:
    """Not available yet: making one raises NotImplementedError. (The published class never refreshed its basis.)"""

    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError(
            "GaLoreProjectorTensor is not available yet; give the optimizer groups with rank: tensors of more than two dimensions "
            "are projected as matrices (first dimension x the rest)"
        )
