"""What a model is made of: its parameters by shape, and the widths that its activations follow from. No tensor is made."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from galore_torch.train.model.llama import ModelShape
from galore_torch.train.model.pretrained import load_model

_LAYER = re.compile(r"\.\d+\.")  # model.layers.0.mlp..., transformer.h.0....


@dataclass(frozen=True)
class Part:
    """``count`` parameters of one shape. ``role``: "matrix" (what GaLore projects), "plain", "embedding" or "head"."""

    shape: tuple[int, ...]
    count: int
    role: str

    @property
    def elements(self) -> int:
        return self.count * prod(self.shape)


@dataclass(frozen=True)
class Sizes:
    """``layer``: the parts of one layer; ``outer``: all others. ``attention`` and ``key_value``: heads times their width."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    attention: int
    key_value: int
    vocabulary: int
    layer: tuple[Part, ...]
    outer: tuple[Part, ...]
    like_llama: bool = True  # whether the formulas for activations are those of this family

    @property
    def parts(self) -> list[Part]:
        """Every parameter of the model."""
        inner = [Part(part.shape, part.count * self.layers, part.role) for part in self.layer]
        return [*self.outer, *inner]

    @property
    def parameters(self) -> int:
        return sum(part.elements for part in self.parts)


def llama_sizes(shape: ModelShape, vocabulary: int) -> Sizes:
    """A LLaMA by arithmetic, at once."""
    extras = dict(shape.extras)
    D, I, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    width = extras.get("head_dim") or D // heads
    Q, KV = heads * width, (extras.get("num_key_value_heads") or heads) * width
    layer = Counter({("matrix", (Q, D)): 1, ("plain", (D,)): 2})
    layer.update([("matrix", (KV, D)), ("matrix", (KV, D)), ("matrix", (D, Q))])
    layer.update([("matrix", (I, D)), ("matrix", (I, D)), ("matrix", (D, I))])
    if extras.get("attention_bias"):
        layer.update([("plain", (Q,)), ("plain", (KV,)), ("plain", (KV,)), ("plain", (D,))])
    if extras.get("mlp_bias"):
        layer.update([("plain", (I,)), ("plain", (I,)), ("plain", (D,))])
    outer = [Part((vocabulary, D), 1, "embedding"), Part((D,), 1, "plain")]
    if not extras.get("tie_word_embeddings"):
        outer.append(Part((vocabulary, D), 1, "head"))
    parts = tuple(Part(size, count, role) for (role, size), count in layer.items())
    return Sizes(D, I, shape.num_hidden_layers, heads, Q, KV, vocabulary, parts, tuple(outer))


@lru_cache(maxsize=4)
def hf_sizes(name: str) -> Sizes:
    """Any causal language model of transformers, counted on a model without memory."""
    import torch

    with torch.device("meta"):
        model = load_model(name, dtype="float32", activation_checkpointing=False)
    return sizes_of(model)


def sizes_of(model: Any) -> Sizes:
    """The same of a model that exists, on any device."""
    from galore_torch import galore_param_groups

    config = model.config.get_text_config()
    projected = {name for name, _ in galore_param_groups(model, 1)[-1]["params"]}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layer: Counter[tuple[str, tuple[int, ...]]] = Counter()
    outer = []
    for name, p in model.named_parameters():
        if _LAYER.search(name):
            layer["matrix" if name in projected else "plain", tuple(p.shape)] += 1
        else:
            role = "embedding" if p is embedding.weight else "head" if head is not None and p is head.weight else "plain"
            outer.append(Part(tuple(p.shape), 1, role))
    layers, D = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or D // heads
    KV = (getattr(config, "num_key_value_heads", None) or heads) * width
    intermediate = getattr(config, "intermediate_size", None) or 4 * D
    parts = tuple(Part(shape, count // layers, role) for (role, shape), count in layer.items())
    like_llama = hasattr(config, "rms_norm_eps") and all(count % layers == 0 for count in layer.values())
    return Sizes(D, intermediate, layers, heads, heads * width, KV, config.vocab_size, parts, tuple(outer), like_llama)
