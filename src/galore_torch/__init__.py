"""GaLore: full-parameter training whose optimizer state lives in a low-rank subspace of each gradient.

Change one line: ``optimizer = GaLoreAdamW(galore_param_groups(model, rank=128), lr=1e-2)``.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galore_torch.public import (
        FusedBackward,
        GaLore,
        GaLoreAdafactor,
        GaLoreAdagrad,
        GaLoreAdamW,
        GaLoreAdamW8bit,
        GaLoreMuon,
        GaLoreSGD,
        LayerwiseMixin,
        LowRankHookState,
        QGaLoreAdamW8bit,
        TensorGaLoreAdamW,
        beta2_of_half_life,
        dequantize_linears,
        fused_backward,
        galore_param_groups,
        low_rank_hook,
        low_rank_optimizer,
        quantize_linears,
    )

__version__ = "2.0.0"
__all__ = [
    "FusedBackward",
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdagrad",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreMuon",
    "GaLoreSGD",
    "LayerwiseMixin",
    "LowRankHookState",
    "QGaLoreAdamW8bit",
    "TensorGaLoreAdamW",
    "beta2_of_half_life",
    "dequantize_linears",
    "fused_backward",
    "galore_param_groups",
    "low_rank_hook",
    "low_rank_optimizer",
    "quantize_linears",
]


def __getattr__(name: str) -> Any:
    """Load the public names when the first is asked for, so that the command answers --help without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def _load() -> None:
    import galore_torch.public as public

    globals().update({name: getattr(public, name) for name in __all__})


if "torch" in sys.modules:  # nothing left to save
    _load()
