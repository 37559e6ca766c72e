"""Which parameters are projected: every linear weight of a model's layers, or those that the caller names. No state is made here."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Attention and MLP layers as the common model families name them (LLaMA, GPT, BERT, T5, OPT, ViT, torch's own Transformer), in any case.
ATTENTION_AND_MLP = re.compile(
    r"attn|attention|\b[qkvo]_proj\b"
    r"|mlp|ffn|feed_?forward|intermediate|output\.dense|DenseReluDense|\bfc[12]\b|linear[12]|\b(gate|up|down)_proj\b",
    re.IGNORECASE,
)
_BARE = re.compile(r"(^|_)(weight|proj|w\d)(_|$)")  # parameters outside of linear layers that are weights: gate_up_proj, in_proj_weight
_NOT_LINEAR = re.compile(r"Norm|Conv|Embed|Router")  # classes whose "weight" multiplies nothing as a matrix, or chooses experts
PLACE = "_galore_place"  # a parameter's number in its model's groups, which decides on its turn in whatever optimizer it lands
ENOUGH = 0.8  # of the body: below, a model trains mostly at full rank, and says so


def galore_param_groups(
    model: nn.Module,
    rank: int | float | str,
    *,
    targets: str | Sequence[str] | None = None,
    update_proj_gap: int | None = None,
    scale: float | None = None,
    proj_type: str = "std",
    rank_factors: Mapping[str, float] | None = None,
    show: bool = False,
    **keys: Any,
) -> list[dict[str, Any]]:
    """Split a model's parameters into a full-rank and a projected group, both named, ready for any optimizer here.

    By default every linear weight of the body is projected: those inside the model's repeated layers, and those of attention and MLP
    layers wherever they are. Also 3-D weights of experts (E x out x in), `nn.MultiheadAttention`'s ``in_proj_weight``, and the matrix
    behind a weight that torch computes (weight_norm, spectral_norm, orthogonal, pruning). Never by default: embeddings, the output head,
    routers, convolutions, norms and vectors. A model without such names or repeated layers gets all its linear layers.

    Args:
        model: any module. A tied parameter is counted once. Frozen parameters are in the groups too, as in ``AdamW(model.parameters())``:
            they cost no state, and train as soon as they are thawed.
        rank, update_proj_gap, scale, proj_type: as GaLoreAdamW, for the projected group; a gap or scale of None is the optimizer's own.
        rank_factors: {pattern: factor} multiplies the rank of the layers in whose names the regular expression is found; the first that is
            found counts. Each factor has a group of its own. {"q_proj|k_proj": 0.5, "down_proj": 2.0} moves rank to where gradients need
            it, at about the same memory.
        targets: None as above; "all-linear" for every linear weight, the head too unless it is tied to the embedding; or regular
            expressions searched in the names of linear layers and of the other weights.
        show: print a table of what is projected.
        keys: further keys of the projected group, such as transport="keep" or lr=1e-3.

    Raises ValueError when a pattern matches nothing, when all that matches is frozen, and when a factor makes no rank of the rank. Warns
    where the default takes all linear layers for want of a name, and where it reaches less than 80 % of the body, see `coverage`.
    """
    chosen = chosen_weights(model, targets)
    weights = {id(weight.parameter) for weight in chosen}
    if not any(weight.parameter.requires_grad for weight in chosen):
        raise ValueError(
            f"all {len(chosen)} layers that match are frozen: nothing is left to project. Make the groups first and freeze layers "
            "afterwards, if they are to be thawed later"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad or p.is_floating_point()]
    ranks = _ranks(chosen, rank, rank_factors or {})
    projected: dict[int | float | str, list[tuple[str, nn.Parameter]]] = {each: [] for each in ranks.values()}
    for name, p in named:
        if id(p) in weights:
            projected[ranks[id(p)]].append((name, p))
    rest = [(name, p) for name, p in named if id(p) not in weights]
    stacks = (
        {"batch_dims": 1} if any(weight.parameter.dim() == 3 for weight in chosen) else {}
    )  # E x out x in: E matrices, whatever their size
    own: dict[str, Any] = {key: value for key, value in (("update_proj_gap", update_proj_gap), ("scale", scale)) if value is not None}
    own |= {"proj_type": proj_type, **stacks, **keys}
    groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
    groups += [{"params": params, "rank": each, **own} for each, params in projected.items() if params]
    for place, (_, p) in enumerate(entry for each in groups for entry in each["params"]):
        setattr(p, PLACE, place)
    if targets is None:
        _note(model, chosen, groups)
    if show:
        print(_table(groups))
    return groups


@dataclass(frozen=True)
class LinearWeight:
    """A matrix, or a batch of matrices, that multiplies activations: ``owner._parameters[key]``.

    ``name``: its layer's, or its own where it belongs to no linear layer. ``layer``: that linear layer, or None.
    """

    name: str
    owner: nn.Module
    key: str
    layer: nn.Module | None

    @property
    def parameter(self) -> nn.Parameter:
        p = self.owner._parameters[self.key]
        assert p is not None
        return p


@dataclass(frozen=True)
class Coverage:
    """How much of a model's body is projected. ``str()`` gives "14 of 14 matrices, 100 % of the body"."""

    projected: int
    matrices: int
    projected_elements: int
    elements: int
    left_out: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the body's elements, 0 to 1."""
        return self.projected_elements / self.elements if self.elements else 0.0

    @property
    def enough(self) -> bool:
        """At least 80 % of the body."""
        return self.share >= ENOUGH

    def __str__(self) -> str:
        percent = 100 if self.projected == self.matrices else min(99, round(100 * self.share))
        return f"{self.projected} of {self.matrices} matrices, {percent} % of the body"


def coverage(model: nn.Module, param_groups: Iterable[Mapping[str, Any]]) -> Coverage:
    """What of the model's body is in groups with a rank: ``coverage(model, optimizer.param_groups)``, also before the optimizer is made.

    The body is every linear weight but embeddings, output head and routers, and what `galore_param_groups` cannot take of the layers:
    weights of unknown names that are as wide as the linear ones, and convolutions that mix channels. An expert weight counts once.
    """
    held = [entry for group in param_groups if group.get("rank") is not None for entry in group["params"]]
    mine = {id(entry[1] if isinstance(entry, tuple) else entry) for entry in held}
    body = _body(model)
    sizes = {name: p.numel() for name, p in body.items()}
    left_out = tuple(name for name, p in body.items() if id(p) not in mine)
    elements, missing = sum(sizes.values()), sum(sizes[name] for name in left_out)
    return Coverage(len(body) - len(left_out), len(body), elements - missing, elements, left_out)


def chosen_weights(model: nn.Module, targets: str | Sequence[str] | None = None) -> list[LinearWeight]:
    """The linear weights that ``targets`` means, see `galore_param_groups`, in the model's order. Silent."""
    weights = list(_linear_weights(model))
    if targets is None or targets == "all-linear":
        outer = _embeddings(model) | (_heads(model) if targets is None else set())
        weights = [weight for weight in weights if id(weight.parameter) not in outer]
        if targets is None:
            blocks = _blocks(model)
            weights = [weight for weight in weights if not _is_router(model, weight) and min(weight.parameter.shape[-2:]) > 1]
            weights = [weight for weight in weights if _in_blocks(weight.name, blocks) or _is_named(model, weight)] or weights
        if not weights:
            raise ValueError(f"{type(model).__name__} has no linear layer beside embeddings and output head: nothing is left to project")
        return weights
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty: give patterns of layer names, 'all-linear', or None for the body's linear layers")
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {weight.name for weight in weights if re.search(pattern, weight.name)}
        except re.error as error:
            raise ValueError(f"target pattern {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise ValueError(f"target pattern {pattern!r} matches no linear layer among {_sample([weight.name for weight in weights])}")
        chosen |= found
    return [weight for weight in weights if weight.name in chosen]


def _ranks(chosen: list[LinearWeight], rank: int | float | str, factors: Mapping[str, float]) -> dict[int, int | float | str]:
    """id of each weight -> its rank: that of all, times the factor of the first pattern that is found in its name."""
    found = {id(weight.parameter): rank for weight in chosen}
    free = {weight.name: id(weight.parameter) for weight in chosen}
    if not isinstance(factors, Mapping):
        raise ValueError(f"rank_factors={factors!r} must map patterns of layer names to factors, such as {{'q_proj|k_proj': 0.5}}")
    for pattern, factor in factors.items():
        good = isinstance(rank, int | float) and isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf
        new = rank * factor if good else 0  # type: ignore[operator]
        new = max(1, round(new)) if isinstance(rank, int) and new else new
        if not new or (isinstance(rank, float) and new >= 1):
            raise ValueError(
                f"rank_factors={{{pattern!r}: {factor!r}}} makes no rank of rank={rank!r}: give a factor above 0, and with a fraction "
                "one that keeps it below 1"
            )
        try:
            names = [name for name in free if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"rank_factors: the pattern {pattern!r} is no regular expression: {error}") from error
        if not names:
            raise ValueError(
                f"rank_factors: the pattern {pattern!r} matches none of the projected layers that no pattern before it has matched, among "
                f"{_sample(list(free))}"
            )
        found |= {free.pop(name): new for name in names}
    return found


# --- what a linear weight is ------------------------------------------------------------------------------------------------


def _linear_weights(model: nn.Module) -> Iterator[LinearWeight]:
    for name, module in model.named_modules():
        for tensor, owner, key in _held(module):
            p = owner._parameters[key]
            assert p is not None
            if tensor == "weight" and p.dim() == 2 and _is_linear(module):
                yield LinearWeight(name, owner, key, module)
            elif p.dim() in (2, 3) and _BARE.search(tensor) and "bias" not in tensor and not _NOT_LINEAR.search(type(module).__name__):
                yield LinearWeight(f"{name}.{tensor}".lstrip("."), owner, key, None)


def _held(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(tensor, owner, key) of each matrix that the module holds; ``tensor`` is the name it is used by.

    A weight that torch computes is no parameter; what it is computed from is: parametrizations.weight.original (original1 of a
    weight_norm, beside a vector), or weight_v and weight_orig of the older hooks.
    """
    for key, p in module._parameters.items():
        if p is not None and p.dim() > 1:
            tensor = re.sub(r"_(v|orig)$", "", key) if hasattr(module, re.sub(r"_(v|orig)$", "", key)) else key
            yield tensor, module, key
    parametrizations = getattr(module, "parametrizations", None)
    for tensor, originals in parametrizations.items() if isinstance(parametrizations, nn.ModuleDict) else ():
        for key, p in originals._parameters.items():
            if p is not None and p.dim() > 1 and min(p.shape[-2:]) > 1:
                yield tensor, originals, key


def _is_linear(module: nn.Module) -> bool:
    """torch's Linear, classes named like it, and transformers' Conv1D (GPT-2's linear layer, with its weight transposed)."""
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or kind.endswith("Linear") or kind == "Conv1D"


# --- where the body is ------------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> set[str]:
    """Names of the repeated layers: members with parts of their own, of a ModuleList, or of a Sequential that repeats a class."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            members = {key: member for key, member in module.named_children() if any(True for _ in member.children())}
            kinds = [type(member) for member in members.values()]
            if isinstance(module, nn.ModuleList) or len(set(kinds)) < len(kinds):
                found |= {f"{name}.{key}".lstrip(".") for key in members}
    return found


def _in_blocks(name: str, blocks: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in blocks for end in range(1, len(parts) + 1))


def _is_named(model: nn.Module, weight: LinearWeight) -> bool:
    """Whether it is an attention's or an MLP's, by its name, or by torch's class of attention."""
    parent = model.get_submodule(weight.name.rpartition(".")[0])
    return ATTENTION_AND_MLP.search(weight.name) is not None or isinstance(parent, nn.MultiheadAttention)


def _is_router(model: nn.Module, weight: LinearWeight) -> bool:
    """Whether it chooses among experts: named so, or a gate beside them."""
    parent, _, last = weight.name.rpartition(".")
    return "router" in weight.name.lower() or (last == "gate" and hasattr(model.get_submodule(parent), "experts"))


def _embeddings(model: nn.Module) -> set[int]:
    """Ids of embedding tables, and so of a head that is tied to one."""
    return {id(p) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) for p in module.parameters()}


def _heads(model: nn.Module) -> set[int]:
    """Ids of the output head's parameters, where the model says which module that is."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()


def _body(model: nn.Module) -> dict[str, Tensor]:
    """name -> parameter of the matrices that `coverage` counts."""
    try:
        chosen = chosen_weights(model)
    except ValueError:
        chosen = []
    linear, embeddings, blocks = list(_linear_weights(model)), _embeddings(model), _blocks(model)
    tables = {p.shape for p in model.parameters() if id(p) in embeddings}  # a model of one's own does not say which layer is its head
    known = embeddings | _heads(model) | {id(weight.parameter) for weight in linear}
    counted = {id(weight.parameter) for weight in chosen}
    for weight in linear:
        p = weight.parameter
        if id(p) not in embeddings | _heads(model) and p.shape not in tables and min(p.shape[-2:]) > 1 and not _is_router(model, weight):
            counted.add(id(p))
    widths = {size for weight in chosen for size in weight.parameter.shape[-2:]}
    for name, module in model.named_modules():
        mixes = isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
        if (_NOT_LINEAR.search(type(module).__name__) and not mixes) or (blocks and not _in_blocks(name, blocks)):
            continue
        for p in module._parameters.values():
            if p is not None and p.dim() > 1 and id(p) not in known and (mixes or {p.shape[0], p[0].numel()} <= widths):
                counted.add(id(p))
    return {name: p for name, p in model.named_parameters() if id(p) in counted}


# --- what is said of it -----------------------------------------------------------------------------------------------------


def _note(model: nn.Module, chosen: list[LinearWeight], groups: list[dict[str, Any]]) -> None:
    if not any(_is_named(model, weight) for weight in chosen):
        kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", weight.name) for weight in chosen))
        warnings.warn(
            f"no layer of {type(model).__name__} is named as attention or MLP: all its {len(chosen)} linear layers are projected "
            f"({', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}). Pass targets to choose among them",
            stacklevel=3,
        )
    covered = coverage(model, groups)
    if not covered.enough:
        warnings.warn(
            f"{covered}: the rest of {type(model).__name__} trains at full rank, such as {covered.left_out[0]}. What is no linear layer "
            "is projected where it is given to the optimizer in a group of its own with a rank",
            stacklevel=3,
        )


def _sample(names: list[str]) -> str:
    return f"{len(names)} linear layers ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "0 linear layers"


def _table(groups: list[dict[str, Any]]) -> str:
    """One line for each shape: how many, and how they are trained."""
    lines = [f"{'shape':>16} {'count':>6} {'elements':>13}  trained"]
    for group in sorted(groups, key=lambda group: "rank" not in group):  # what is projected first
        label = f"rank {group['rank']}" if "rank" in group else "full rank"
        counts: dict[tuple[tuple[int, ...], str], int] = {}
        for _, p in group["params"]:
            key = tuple(p.shape), label if p.requires_grad else "frozen"
            counts[key] = counts.get(key, 0) + 1
        for (shape, how), count in counts.items():
            elements = count
            for size in shape:
                elements *= size
            lines.append(f"{' x '.join(map(str, shape)):>16} {count:>6} {elements:>13,}  {how}")
    return "\n".join(lines)
