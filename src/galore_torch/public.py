"""Every public name, and what importing the package does."""

import torch

from galore_torch.galore_projector import GaLoreProjector
from galore_torch.optim.fused_backward import FusedBackward as FusedBackward
from galore_torch.optim.fused_backward import fused_backward as fused_backward
from galore_torch.optim.galore import GaLore as GaLore
from galore_torch.optim.galore import GaLoreAdafactor as GaLoreAdafactor
from galore_torch.optim.galore import GaLoreAdagrad as GaLoreAdagrad
from galore_torch.optim.galore import GaLoreAdamW as GaLoreAdamW
from galore_torch.optim.galore import GaLoreAdamW8bit as GaLoreAdamW8bit
from galore_torch.optim.galore import GaLoreMuon as GaLoreMuon
from galore_torch.optim.galore import GaLoreSGD as GaLoreSGD
from galore_torch.optim.galore import QGaLoreAdamW8bit as QGaLoreAdamW8bit
from galore_torch.optim.galore import TensorGaLoreAdamW as TensorGaLoreAdamW
from galore_torch.optim.half_life import beta2_of_half_life as beta2_of_half_life
from galore_torch.optim.hf_trainer import LayerwiseMixin as LayerwiseMixin
from galore_torch.optim.low_rank_hook import LowRankHookState as LowRankHookState
from galore_torch.optim.low_rank_hook import low_rank_hook as low_rank_hook
from galore_torch.optim.methods import low_rank_optimizer as low_rank_optimizer
from galore_torch.optim.param_groups import galore_param_groups as galore_param_groups
from galore_torch.optim.quantize import dequantize_linears as dequantize_linears
from galore_torch.optim.quantize import quantize_linears as quantize_linears

# Checkpoints of galore-torch 1.0 hold this class; it carries data only, so torch.load may build it with weights_only=True.
torch.serialization.add_safe_globals([GaLoreProjector])
