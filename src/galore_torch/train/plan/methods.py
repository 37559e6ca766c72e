"""What an optimizer makes a parameter cost: this package's by `param_bytes`, all others by one step on meta tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from galore_torch.train.errors import UserError
from galore_torch.train.model.sizes import Part
from galore_torch.train.optimizers.registry import group_keys, optimizer_spec, settled_settings

if TYPE_CHECKING:
    import torch

_BLOCK, _BLOCK_BYTES = 256, 4  # Q-GaLore's int8 weights (arXiv 2407.08296): a bf16 scale and offset a block
_COUNTER = 4  # a 0-d fp32 tensor: the count of steps, or a root mean square
FACTORED = {"low_rank": False, "lora": True, "relora": True}  # baselines whose matrices get two factors: do the matrices stay, frozen?


@dataclass(frozen=True)
class Cost:
    """Bytes of one parameter. ``gradient`` is whole (0: it is never made), ``low`` its projection (0: there is none).

    ``transient``: what using the gradient needs for a moment, a refresh included; ``step``: what a step from what was kept of it needs.
    """

    weight: int
    gradient: int
    low: int
    basis: int
    moments: int
    transient: int
    step: int
    unpacked: int = 0  # a floating copy of a quantised weight, while a product needs it


def trained_parts(name: str, parts: tuple[Part, ...], rank: int, alone: bool = False) -> list[tuple[Part, bool]]:
    """The parameters once the optimizer `name` has changed the layers, and whether each is trained. `alone`: beside a baseline's factors
    a new head is all that is. A frozen matrix gets no factors."""
    if experts := [part for part in parts if part.role == "experts" and part.trained and name in FACTORED]:
        raise UserError(
            f"{name} takes the matrices of linear layers; weights of this model are outside of them (such as "
            f"{' x '.join(map(str, experts[0].shape))}): choose galore_adamw8bit or adamw"
        )
    out = []
    for part in parts:
        if name not in FACTORED or part.role != "matrix" or not part.trained:
            out.append((part, part.trained and (name not in FACTORED or not alone or part.role == "new head")))
            continue
        m, n = part.shape
        if FACTORED[name]:
            out.append((part, False))
        out += [(Part((m, rank), part.count, "plain"), True), (Part((rank, n), part.count, "plain"), True)]
    return out


def cost(
    part: Part, trained: bool, name: str, dtype: str, device: str, settings: Mapping[str, Any], tokens: int = 0, shards: int = 1
) -> Cost:
    """Of one parameter of `part`; ``settings`` as `build_optimizer` takes them. ``tokens`` of a forward pass, where the linear layers make
    low-rank gradients themselves; else 0. ``shards``: processes that share it, as under `fully_shard`; the first's part is counted."""
    import torch

    from galore_torch.train.plan.optimizer_bytes import param_bytes, shard_of, thin_bytes

    kind: torch.dtype = getattr(torch, dtype)
    whole, part = part, replace(part, shape=shard_of(part.shape, shards))
    size = prod(part.shape)
    weight = size * kind.itemsize
    if not trained:
        return Cost(weight, 0, 0, 0, 0, 0, 0)
    if optimizer_spec(name).home != "galore_torch":
        moments, transient = _foreign(part, "adamw" if name in FACTORED else name, kind.itemsize, settings["beta1"])
        return Cost(weight, weight, 0, 0, moments, transient, transient)
    from galore_torch.ops.linalg import product_dtype

    rule, full, projected = _groups(name, frozen(settings))
    group = projected if part.projected else full
    found = param_bytes(whole.shape, kind, group, rule, device, shards)
    gradient, transient = weight, found.transient
    if tokens and part.role == "matrix" and found.low:
        gradient, transient = 0, thin_bytes(part.shape, kind, group, rule, tokens, device)
    if not optimizer_spec(name).quantized or not part.quantizable:
        return Cost(weight, gradient, found.low, found.basis, found.moments, transient, found.step)
    coded, unpacked = size + _BLOCK_BYTES * -(-size // _BLOCK), size * product_dtype(kind, device).itemsize
    return Cost(coded, gradient, found.low, found.basis, found.moments, transient, found.step, unpacked)


def thin_input(part: Part, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a linear layer of `part` has a basis on its input's side, so that its input is kept projected."""
    import torch

    from galore_torch.engine.layout import make_layout

    _, full, projected = _groups(name, frozen(settings))
    return -1 in make_layout(part.shape, torch.float32, projected if part.projected else full).ranks


def frozen(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))


@lru_cache(maxsize=256)
def _groups(name: str, settings: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, Any]:
    """(rule, group of what trains in full, group of the matrices) as the optimizer would have them.

    From the defaults in its signature: to make one imports the half of torch that a step may need, which takes seconds.
    """
    import galore_torch
    from galore_torch.slots.rules import RULES

    spec = optimizer_spec(name)
    given = settled_settings(spec, dict(settings))
    made = getattr(galore_torch, spec.class_name)
    group = {key: parameter.default for key, parameter in inspect.signature(made).parameters.items()} | dict(spec.extra)
    if given["beta1"] is not None:
        group |= {"momentum": given["beta1"], "beta1": given["beta1"] or None}
    group |= {key: given[key] for key in ("state_codec", "basis_codec") if key in spec.flags and given[key] is not None}
    if not spec.low_rank:
        return RULES[made.row.rule], group, group | {"rank": spec.rank}
    projection = {key: given[key] for key in ("rank", "update_proj_gap", "gap_range", "proj_type")} | group_keys(spec, given)
    if spec.quantized and not projection["gap_range"]:
        projection["gap_range"] = (1, 1)  # Q-GaLore's gap adapts unless it is told otherwise, and so is state
    return RULES[made.row.rule], group, group | projection


def _foreign(part: Part, name: str, itemsize: int, beta1: float | None) -> tuple[int, int]:
    """(bytes of the state, bytes that a step needs for a moment) of an optimizer of others, one parameter after the other.

    By arithmetic, as torch's would take seconds to import what a step imports; the tests ask the optimizers themselves.
    """
    size = prod(part.shape)
    if name in ("adam", "adamw"):
        return 2 * size * itemsize + _COUNTER, 0
    if name == "adagrad":
        return size * itemsize + _COUNTER, size * itemsize
    if name == "sgd":
        return (size * itemsize if beta1 else 0), 0
    assert name == "adafactor", name
    # The second moment of rows and of columns, in fp32, with copies of a 16-bit gradient and weight.
    second = size // part.shape[-1] + size // part.shape[-2] if len(part.shape) > 1 else size
    return 4 * (second + (size if beta1 else 0)) + _COUNTER, size * (12 + (8 if itemsize == 2 else 0))
