"""Ground: which parameters are projected. First match wins, and a pattern that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

# Attention and MLP linears as the common model families name them (LLaMA, GPT, BERT, T5, OPT, ViT, torch's own Transformer).
ATTENTION_AND_MLP = (
    r"attn|attention|\b[qkvo]_proj\b",
    r"mlp|ffn|feed_?forward|intermediate|output\.dense|DenseReluDense|\bfc[12]\b|linear[12]|\b(gate|up|down)_proj\b",
)


def galore_param_groups(
    model: nn.Module,
    rank: int | float,
    *,
    targets: str | Sequence[str] | None = None,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    show: bool = False,
    **keys: Any,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a full-rank and a projected group, both named, ready for any optimizer here.

    Args:
        model: any module; tied and frozen parameters are counted once and left out.
        rank, update_proj_gap, scale, proj_type: as GaLoreAdamW, for the projected group.
        targets: regular expressions searched in the names of linear layers, "all-linear", or None for attention and MLP layers.
            Embeddings, the output head, norms and biases are never chosen by None.
        show: print a table of what is projected.
        keys: further keys of the projected group, such as transport="keep" or lr=1e-3.

    Raises ValueError when a pattern matches no linear layer.
    """
    chosen = chosen_linears(model, targets)
    weights = {id(module.weight) for module in chosen.values()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projected = [(name, p) for name, p in named if id(p) in weights]
    if not projected:
        raise ValueError(f"all {len(chosen)} layers that match are frozen: nothing is left to project")
    rest = [(name, p) for name, p in named if id(p) not in weights]
    group = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, **keys}
    if show:
        print(_table(projected, rest, rank))
    return ([{"params": rest}] if rest else []) + [{"params": projected, **group}]


def chosen_linears(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, Any]:
    """name -> linear layer that ``targets`` means, see `galore_param_groups`, in the model's order."""
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linears = {name: module for name, module in linears.items() if module is not head}
        chosen = {name for name in linears if any(re.search(pattern, name) for pattern in ATTENTION_AND_MLP)}
        if not chosen:
            raise ValueError(
                f"no attention or MLP layer was found by its name among {_sample(linears)}: "
                "pass targets, patterns of the layers to project, or targets='all-linear'"
            )
    elif targets == "all-linear":
        chosen = set(linears)
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        if not patterns:
            raise ValueError("targets is empty: give patterns of layer names, 'all-linear', or None for attention and MLP layers")
        chosen = set()
        for pattern in patterns:
            try:
                found = {name for name in linears if re.search(pattern, name)}
            except re.error as error:
                raise ValueError(f"target pattern {pattern!r} is no regular expression: {error}") from error
            if not found:
                raise ValueError(f"target pattern {pattern!r} matches no linear layer among {_sample(linears)}")
            chosen |= found
    return {name: linears[name] for name in linears if name in chosen}


def _is_linear(module: nn.Module) -> bool:
    """torch's Linear and transformers' Conv1D (GPT-2's linear layer, with its weight transposed)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None)


def _sample(linears: dict[str, Any]) -> str:
    names = list(linears)
    return f"{len(names)} linear layers ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "0 linear layers"


def _table(projected: list[Any], rest: list[Any], rank: int | float) -> str:
    """One line for each shape: how many, and how they are trained."""
    lines = [f"{'shape':>16} {'count':>6} {'elements':>13}  trained"]
    for group, label in ((projected, f"rank {rank}"), (rest, "full rank")):
        counts: dict[tuple[int, ...], int] = {}
        for _, p in group:
            counts[tuple(p.shape)] = counts.get(tuple(p.shape), 0) + 1
        for shape, count in counts.items():
            elements = count
            for size in shape:
                elements *= size
            lines.append(f"{' x '.join(map(str, shape)):>16} {count:>6} {elements:>13,}  {label}")
    return "\n".join(lines)
