"""Model FLOPs: what a training token costs by formula, and which share of the device's peak that is (MFU).

Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B. Operations that only save memory (recomputed activations) and those
of the optimizer count for nothing, so that a method that needs fewer of them has a higher share.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# TFLOP/s from NVIDIA's data sheets: dense bfloat16 with float32 sums (None: no such units), and float32 without TF32, torch's default.
_PEAKS: tuple[tuple[str, float | None, float], ...] = (
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 80GB HBM3", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("V100", None, 15.7),
    ("T4", None, 8.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


def flops_per_token(model: nn.Module, length: int) -> float:
    """6 N + 12 layers width length: one token, forward and backward, in sequences of `length`.

    N: entries of the matrices that a token is multiplied with (the head, not the embedding, which is looked up); 2 each forward, 2
    for the gradient of what came in, 2 for that of the matrix, which a frozen one does not have. The second term: queries times keys
    and shares times values, over the whole sequence as in the paper, causal or not; width is heads times their size.
    """
    from torch import nn

    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    multiplied = [p for p in model.parameters() if p.dim() >= 2 and (p not in looked_up or p is head.weight)]
    products = sum(p.numel() * (6 if p.requires_grad else 4) for p in multiplied)
    return float(products + 12 * config.num_hidden_layers * width * length)


def peak_flops(device: str, dtype: str) -> float | None:
    """The FLOP/s that the device's maker states for products of `dtype` ("bfloat16" or "float32"); None where that is not known."""
    if device != "cuda":
        return None
    import torch

    return known_peak(torch.cuda.get_device_name(), dtype)


def known_peak(name: str, dtype: str) -> float | None:
    """`peak_flops` by the name that CUDA gives a device: "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"."""
    for words, bfloat16, float32 in _PEAKS:
        # A whole name: an A100 is no A10, a 3090 Ti no 3090, a laptop's 4090 another chip.
        if re.search(rf"(?<![\w]){re.escape(words)}(?![\w])(?! Ti| Laptop| D\b)", name):
            peak = bfloat16 if dtype == "bfloat16" else float32
            return None if peak is None else peak * 1e12
    return None
