"""What a model is made of: its parameters by shape, and the widths that its activations follow from. No tensor is made."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch

from galore_torch.optim.param_groups import chosen_weights
from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.freeze import freeze, new_head
from galore_torch.train.model.llama import ModelShape, build_model
from galore_torch.train.model.pretrained import load_model

Targets = str | tuple[str, ...] | None  # which layers are projected, as `galore_param_groups` takes it
_LAYER = re.compile(r"\.\d+\.")  # model.layers.0.mlp..., transformer.h.0....

# Fields of a config that say how large a recurrent state is.
_RECURRENT = (
    *("state_size", "ssm_state_size", "mamba_d_state", "mamba_state_dim", "lru_width", "attention_hidden_size", "conv_L_cache"),
    *("linear_conv_kernel_dim", "slstm_at", "qk_dim_factor"),
)


@dataclass(frozen=True)
class Part:
    """``count`` parameters of one shape.

    ``role``: "matrix" of a linear layer of the body; "experts": a weight of the body outside of them; "plain", "embedding" or "head";
    "new head": what a classifier has beside the model that it is made of. ``projected``: by a low-rank optimizer; the body, where no
    targets say otherwise. ``trained``: whether it is not frozen.
    """

    shape: tuple[int, ...]
    count: int
    role: str
    projected: bool = False
    trained: bool = True

    @property
    def elements(self) -> int:
        return self.count * prod(self.shape)

    @property
    def quantizable(self) -> bool:
        """Whether an optimizer with INT8 weights holds it so: of linear layers alone."""
        return self.projected and self.role in ("matrix", "head")


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
    experts_used: float = 1.0  # share of a layer's experts that a token goes through
    recurrent: bool = False  # whether layers go from token to token: state spaces, linear attention, RWKV

    @property
    def parts(self) -> list[Part]:
        """Every parameter of the model."""
        inner = [replace(part, count=part.count * self.layers) for part in self.layer]
        return [*self.outer, *inner]

    @property
    def parameters(self) -> int:
        return sum(part.elements for part in self.parts)

    @property
    def short_side(self) -> int:
        """Of the projected matrices that hold most, or half as much (an MLP's way back): what a rank must be below.

        A mixture's experts can be narrower than its width.
        """
        projected = [part for part in self.parts if part.projected]
        most = max((part.elements for part in projected), default=0)
        return min((min(part.shape[-2:]) for part in projected if 2 * part.elements >= most), default=self.hidden)

    def flops_per_token(self, length: int) -> float:
        """As `model.flops.flops_per_token`, where all is trained; of experts those that a token goes through."""
        tied = all(part.role != "head" for part in self.outer)
        multiplied = [part for part in self.parts if len(part.shape) > 1 and (part.role != "embedding" or tied)]
        products = sum(part.elements * (self.experts_used if is_stack(part) else 1) for part in multiplied)
        return float(6 * products + 12 * self.layers * self.attention * length)


@lru_cache(maxsize=64)
def llama_sizes(shape: ModelShape, vocabulary: int, targets: Targets = None) -> Sizes:
    """A LLaMA by arithmetic, at once; where `targets` choose its layers, from its names, on a model without memory."""
    if targets is not None:
        with torch.device("meta"):
            named = build_model(
                shape.with_vocab(vocabulary),
                seed=0,
                dtype="float32",
                bos_token_id=None,
                eos_token_id=None,
                activation_checkpointing=False,
            )
        return sizes_of(named, targets)
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
    parts = tuple(Part(size, count, role, role == "matrix") for (role, size), count in layer.items())
    return Sizes(D, I, shape.num_hidden_layers, heads, Q, KV, vocabulary, parts, tuple(outer))


@lru_cache(maxsize=4)
def hf_sizes(name: str, targets: Targets = None, frozen: tuple[str, ...] = ()) -> Sizes:
    """Any causal language model of transformers, counted on a model without memory; UserError for what transformers cannot make.

    `frozen`: patterns of --freeze.
    """
    try:
        with torch.device("meta"):
            model = load_model(name, dtype="float32", activation_checkpointing=False)
        freeze(model, frozen)
        return sizes_of(model, targets)
    except UserError:
        raise
    except Exception as error:  # a family's own code, on a config that it does not take
        raise UserError(f"{name} cannot be planned: transformers makes no model of its config ({first_line(error)})") from error


def sizes_of(model: Any, targets: Targets = None) -> Sizes:
    """The same of a model that exists, on any device. UserError for `targets` that match nothing."""
    config = model.config.get_text_config()
    roles = roles_of(model)
    new = {id(p) for p in new_head(model).parameters()}
    projected = _projected(model, targets) if targets is not None else set(roles)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layer: Counter[tuple[tuple[int, ...], tuple[str, bool, bool]]] = Counter()
    shapes: Counter[tuple[int, ...]] = Counter()
    outer = []
    for name, p in model.named_parameters():
        if _LAYER.search(name):
            layer[tuple(p.shape), (roles.get(id(p), "plain"), id(p) in projected, p.requires_grad)] += 1
            shapes[tuple(p.shape)] += 1
        else:
            role = "embedding" if p is embedding.weight else "head" if head is not None and p is head.weight else roles.get(id(p), "plain")
            role = "new head" if id(p) in new else role
            outer.append(Part(tuple(p.shape), 1, role, id(p) in projected, p.requires_grad))
    counted = [(shape, kind, count) for (shape, kind), count in layer.items()]
    layers, D = config.num_hidden_layers, config.hidden_size
    heads = _first(config, "num_attention_heads", "num_heads") or 1  # a state space model has none
    width = _first(config, "head_dim") or D // heads
    KV = (_first(config, "num_key_value_heads") or heads) * width
    parts = tuple(Part(shape, count // layers, *kind) for shape, kind, count in counted if count >= layers)
    # What not every layer has: counted, and to the byte, but outside of the pass from layer to layer.
    outer += [Part(shape, count % layers, *kind) for shape, kind, count in counted if count % layers]
    uniform = all(count % layers == 0 for count in shapes.values())
    recurrent = _first(config, *_RECURRENT) is not None
    like_llama = hasattr(config, "rms_norm_eps") and uniform and "experts" not in roles.values() and not recurrent
    vocabulary, inner = embedding.weight.shape[0], _intermediate(config)
    used = experts_used(config, max((part.shape[0] for part in [*parts, *outer] if is_stack(part)), default=1))
    return Sizes(D, inner, layers, heads, heads * width, KV, vocabulary, parts, tuple(outer), like_llama, used, recurrent)


def is_stack(part: Part) -> bool:
    """Whether it is E x out x in: a matrix for each expert."""
    return part.role == "experts" and len(part.shape) == 3


def experts_used(config: Any, experts: int) -> float:
    """Share of so many experts that a token goes through; 1 where the config does not say how many it chooses."""
    return min(1.0, (_chosen_experts(config) or experts) / experts)


def roles_of(model: Any) -> dict[int, str]:
    """id of a parameter of the body -> what it is: "matrix" of a linear layer, or "experts"."""
    try:
        return {id(weight.parameter): "experts" if weight.layer is None else "matrix" for weight in chosen_weights(model)}
    except ValueError:  # no linear layer: nothing is projected
        return {}


def _projected(model: Any, targets: Targets) -> set[int]:
    try:
        return {id(weight.parameter) for weight in chosen_weights(model, targets)}
    except ValueError as error:
        raise UserError(f"--targets: {error}") from error


def _intermediate(config: Any) -> int:
    """The MLP's width for one token: of a mixture, that of the experts it goes through."""
    given = _first(config, "intermediate_size", "ffn_dim") or 4 * config.hidden_size
    own = max(given) if isinstance(given, list | tuple) else given
    chosen = _chosen_experts(config)
    if chosen is None:
        return int(own)
    one = _first(config, "moe_intermediate_size", "expert_ffn_hidden_size") or own
    shared = (_first(config, "n_shared_experts", "num_shared_experts") or 0) * one
    return int(chosen * one + (shared or _first(config, "shared_expert_intermediate_size") or 0))


def _chosen_experts(config: Any) -> int | None:
    chosen = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
    return chosen if isinstance(chosen, int) else None


def _first(config: Any, *names: str) -> Any:
    """The first of these fields that has a value; 0, None and no such field are none."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
