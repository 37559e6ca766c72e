"""Which modules of a model are its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The members of the longest list of modules; none where there is no list."""
    from torch import nn

    return list(max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=()))
