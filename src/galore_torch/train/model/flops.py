"""Model FLOPs: what a training token costs by formula, and which share of the device's peak that is (MFU).

Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B. Operations that only save memory (recomputed activations) and those
of the optimizer count for nothing, so that a method that needs fewer of them has a higher share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from galore_torch.train.model.gpus import find_gpu
from galore_torch.train.model.sizes import experts_used, roles_of

if TYPE_CHECKING:
    from torch import nn


def flops_per_token(model: nn.Module, length: float) -> float:
    """6 N + 12 layers width length: one token, forward and backward, in sequences of `length`.

    N: entries of the matrices that a token is multiplied with (the head, not the embedding, which is looked up; of a mixture's experts
    those that it goes through); 2 each forward, 2 for the gradient of what came in, 2 for that of the matrix, which a frozen one does
    not have. The second term: queries times keys and shares times values, over the whole sequence as in the paper, causal or not; width
    is heads times their size.
    """
    from torch import nn

    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", None) or 0  # a state space model has none, and no such products
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]  # None of a classifier
    multiplied = [p for p in model.parameters() if p.dim() >= 2 and (p not in looked_up or (head is not None and p is head.weight))]
    stacks = {key for key, role in roles_of(model).items() if role == "experts"}
    products = 12.0 * config.num_hidden_layers * width * length
    for p in multiplied:
        share = experts_used(config, p.shape[0]) if p.dim() == 3 and id(p) in stacks else 1.0  # (E, out, in)
        products += share * p.numel() * (6 if p.requires_grad else 4)
    return products


def peak_flops(device: str, dtype: str) -> float | None:
    """The FLOP/s that the device's maker states for products of `dtype` ("bfloat16" or "float32"); None where that is not known."""
    if device != "cuda":
        return None
    import torch

    gpu = find_gpu(torch.cuda.get_device_name())
    return None if gpu is None else gpu.peak_flops(dtype)
