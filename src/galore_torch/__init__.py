"""GaLore: full-parameter training whose optimizer state lives in a low-rank subspace of each gradient.

Change one line: ``optimizer = GaLoreAdamW(galore_param_groups(model, rank=128), lr=1e-2)``.
"""

import torch

from galore_torch.fused_backward import FusedBackward, fused_backward
from galore_torch.galore_projector import GaLoreProjector
from galore_torch.param_groups import galore_param_groups
from galore_torch.zoo import GaLore, GaLoreAdafactor, GaLoreAdagrad, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD

__version__ = "2.0.0"
__all__ = [
    "FusedBackward",
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdagrad",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "fused_backward",
    "galore_param_groups",
]

# Checkpoints of galore-torch 1.0 hold this class; it carries data only, so torch.load may build it with weights_only=True.
torch.serialization.add_safe_globals([GaLoreProjector])
