"""What an optimizer makes a parameter cost: this package's by `param_bytes`, all others by one step on meta tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from galore_torch.train.optimizers.registry import OPTIMIZERS, OptimizerSpec, optimizer_spec
from galore_torch.train.plan.sizes import Part

if TYPE_CHECKING:
    import torch

Q_GALORE = "qgalore_adamw8bit"
# Q-GaLore's storage (arXiv 2407.08296): int8 weights with a bf16 scale and offset a block; two int4 codes a byte and their scales.
_BLOCK, _BLOCK_BYTES, _INT4_BASIS = 256, 4, 0.53
_COUNTER = 4  # a 0-d fp32 tensor: the count of steps, or a root mean square
FACTORED = {"low_rank": False, "lora": True, "relora": True}  # baselines whose matrices get two factors: do the matrices stay, frozen?


@dataclass(frozen=True)
class Cost:
    """Bytes of one parameter. ``gradient`` is whole, ``low`` its projection (0: there is none), ``transient`` a step's."""

    weight: int
    gradient: int
    low: int
    basis: int
    moments: int
    transient: int
    unpacked: int = 0  # a floating copy of a quantised weight, while a product needs it


def known_optimizer(name: str) -> OptimizerSpec:
    """The row for `name`; Q-GaLore can be planned where this version cannot train it."""
    lower = name.lower()
    if lower.removesuffix("_per_layer") == Q_GALORE and lower not in OPTIMIZERS:
        return replace(OPTIMIZERS["galore_adamw8bit"], per_layer=lower.endswith("_per_layer"))
    return optimizer_spec(name)


def trained_parts(name: str, parts: tuple[Part, ...], rank: int) -> list[tuple[Part, bool]]:
    """The parameters once the optimizer `name` has changed the layers, and whether each is trained."""
    out = []
    for part in parts:
        if name not in FACTORED or part.role != "matrix":
            out.append((part, True))
            continue
        m, n = part.shape
        if FACTORED[name]:
            out.append((part, False))
        out += [(Part((m, rank), part.count, "plain"), True), (Part((rank, n), part.count, "plain"), True)]
    return out


def cost(part: Part, trained: bool, name: str, dtype: str, device: str, settings: Mapping[str, Any]) -> Cost:
    """Of one parameter of `part`; ``settings`` as `build_optimizer` takes them."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    size = prod(part.shape)
    weight = size * kind.itemsize
    if not trained:
        return Cost(weight, 0, 0, 0, 0, 0)
    if known_optimizer(name).home != "galore_torch":
        moments, transient = _foreign(part, "adamw" if name in FACTORED else name, kind.itemsize, settings["beta1"])
        return Cost(weight, weight, 0, 0, moments, transient)
    from galore_torch.ops.linalg import product_dtype
    from galore_torch.train.plan.optimizer_bytes import param_bytes

    quantised = name.removesuffix("_per_layer") == Q_GALORE
    rule, full, projected = _groups(name, frozen(settings))
    group = projected if part.role == "matrix" else full
    found = param_bytes(part.shape, kind, group, rule, device)
    if not quantised or part.role != "matrix":
        return Cost(weight, weight, found.low, found.basis, found.moments, found.transient)
    basis = found.basis if group["basis_codec"] == "int4" else round(found.basis / 2 * _INT4_BASIS)
    coded, unpacked = size + _BLOCK_BYTES * -(-size // _BLOCK), size * product_dtype(kind, device).itemsize
    return Cost(coded, weight, found.low, basis, found.moments, found.transient, unpacked)


def frozen(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))


@lru_cache(maxsize=256)
def _groups(name: str, settings: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, Any]:
    """(rule, group of what trains in full, group of the matrices) as the optimizer would have them.

    From the defaults in its signature: to make one imports the half of torch that a step may need, which takes seconds.
    """
    import galore_torch
    from galore_torch.slots.rules import RULES

    spec, given = known_optimizer(name), dict(settings)
    made = getattr(galore_torch, spec.class_name)
    group = {key: parameter.default for key, parameter in inspect.signature(made).parameters.items()} | dict(spec.extra)
    if given["beta1"] is not None:
        group |= {"momentum": given["beta1"], "beta1": given["beta1"] or None}
    projection = {key: given[key] for key in ("rank", "update_proj_gap", "gap_range", "proj_type")} if spec.low_rank else {}
    if group["basis_codec"] == "int4" and not projection["gap_range"]:
        projection["gap_range"] = (1, 1)  # Q-GaLore's gap adapts unless it is told otherwise, and so is state
    return RULES[made.row.rule], group, group | projection


def _foreign(part: Part, name: str, itemsize: int, beta1: float | None) -> tuple[int, int]:
    """(bytes of the state, bytes that a step needs for a moment) of an optimizer of others, one parameter after the other.

    By arithmetic, as torch's would take seconds to import what a step imports; the tests ask the optimizers themselves.
    """
    size, matrix = prod(part.shape), len(part.shape) == 2
    if name == "muon":
        if part.role == "matrix":
            return size * itemsize, size * (3 * itemsize + 3 * 2)  # Newton-Schulz runs in bf16
        name = "adamw"
    if name in ("adam", "adamw"):
        return 2 * size * itemsize + _COUNTER, 2 * size * itemsize
    if name == "adagrad":
        return size * itemsize + _COUNTER, size * itemsize
    if name == "sgd":
        return (size * itemsize if beta1 else 0), 0
    assert name == "adafactor", name
    second = sum(part.shape) if matrix else size  # in fp32, with copies of a 16-bit gradient and weight
    return 4 * (second + (size if beta1 else 0)) + _COUNTER, size * (12 + (8 if itemsize == 2 else 0))
