"""What a parameter group may hold: every refusal names the value, the bound and the cure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, MutableMapping
from numbers import Integral, Real
from typing import Any

import torch

from galore_torch.choices import FULL, PROJ_TYPES, one_of
from galore_torch.engine.recipe import PROJECTION_DEFAULTS, Recipe, check_slots, takes_tensors
from galore_torch.slots.projectors import PROJECTORS


def check_group(group: Mapping[str, Any], row: Recipe) -> None:
    """Refuse a parameter group that cannot work: ValueError with the value, the bound and the cure."""
    gap, scale = group["update_proj_gap"], group["scale"]
    check_rank(group["rank"])
    one_of("projector", group["projector"], PROJECTORS)
    if isinstance(group["rank"], list | tuple) and not takes_tensors(group):
        raise ValueError(
            f"rank={group['rank']!r} has a number for each dimension, which a tensor projection alone reads: give tensor=True too, or one "
            "whole number from 1"
        )
    check_gap(gap)
    _check_adaptive(group)
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ValueError(
            f"scale={scale!r} is not a finite number above 0: give the factor of the projected update (such as 0.25); freezing keeps "
            "weights as they are"
        )
    one_of("proj_type", group["proj_type"], PROJ_TYPES)
    one_of("decay", group["decay"], ("before", "after"))
    one_of("compile", group["compile"], (None, True, False))
    check_slots(group, row)
    if not (group["batch_dims"] in (None, 0) or _is_count(group["batch_dims"])):
        raise ValueError(
            f"batch_dims={group['batch_dims']!r} is not a number of leading dimensions: give a whole number from 0 (1 for the E x m x n "
            "weights of experts), or None to tell them by their shapes"
        )
    dim = group.get("dim", 2)
    if not isinstance(dim, int) or (dim > 2 and not group["tensor"]):
        raise ValueError(
            f"dim={dim!r} asks for a tensor projection, which is tensor=True here: give that; without it tensors are projected as matrices"
        )
    if row.rule != "torch":
        _check_numbers(group)
    elif group["decay"] != "before":  # a torch.optim class checks its own numbers, and decays where it does
        raise ValueError(f"decay={group['decay']!r} needs a rule of this package, such as GaLoreAdamW: leave it 'before' for GaLore(base)")


def check_rank(rank: object) -> None:
    """Refuse what is no rank of a matrix or of a tensor."""
    many = isinstance(rank, list | tuple) and all(r is None or _is_count(r) for r in rank)
    named = rank is None or (isinstance(rank, str) and rank == FULL)
    if not (named or many or _is_count(rank) or (isinstance(rank, float) and 0.0 < rank < 1.0)):
        raise ValueError(
            f"rank={rank!r} is not a rank: give a whole number from 1 (such as 128), a fraction of the short side between 0 and 1 "
            "(such as 0.25; of a tensor's elements), a list with a number or None for each dimension of a tensor, 'full' for GaLoreMuon "
            "without a projection, or None to train the group at full rank"
        )


def check_gap(gap: object) -> None:
    if not _is_count(gap):
        raise ValueError(f"update_proj_gap={gap!r} is not a number of steps: give a whole number from 1 (such as 200)")


def _check_adaptive(group: Mapping[str, Any]) -> None:
    gap, gaps, overlaps = group["update_proj_gap"], group["gap_range"], group["overlap_range"]
    if not (_is_pair(overlaps) and all(isinstance(x, int | float) for x in overlaps) and 0 <= overlaps[0] <= overlaps[1] <= 1):
        raise ValueError(f"overlap_range={overlaps!r} must be a pair of shares between 0 and 1, the lower first, such as (0.4, 0.6)")
    if gaps is None:
        if tuple(overlaps) != PROJECTION_DEFAULTS["overlap_range"]:
            raise ValueError(f"overlap_range={overlaps!r} has no effect without gap_range: give that too, such as gap_range=(50, 1600)")
        return
    if not (_is_pair(gaps) and all(_is_count(x) for x in gaps) and gaps[0] <= gap <= gaps[1]):
        raise ValueError(
            f"gap_range={gaps!r} must be a pair of whole numbers of steps with update_proj_gap={gap} between them, such as "
            f"({max(1, gap // 4)}, {8 * gap}), or None for a gap that stays"
        )


# Keys that schedulers and frameworks write into groups for themselves.
OF_OTHERS = {
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_lr",
    "warmup_lr",
    "swa_lr",
    "initial_momentum",
    "max_momentum",
    "base_momentum",
    "min_momentum",
    "name",
    "names",
    "group_name",
    "layer_name",
    "param_group_name",
    "layer_names",
    "lr_mult",
    "lr_scale",
    "decay_mult",
    "wd_mult",
    "pre_lr_mult",
    "pre_wd_mult",
    "bias_mult",
    "no_weight_decay",
    "moe",
    "allreduce",
    "is_expert",
    "is_expert_parallel",
    "is_decoupled_lr",
    "default_config",
}


def unread_keys(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """The group keys that nothing reads, but for those of schedulers and frameworks. A slip of a known key is a ValueError."""
    known = set(known)
    unread = [key for key in keys if key not in known and key not in OF_OTHERS]
    for key in unread:
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"group key {key!r} is not known; did you mean {near[0]!r}?")
    return unread


def plain_numbers(group: MutableMapping[str, Any]) -> None:
    """Make other numbers, such as ``numpy.float32``, Python's in place: the host computes in double, and torch.load reads them.

    Those in lists and tuples too, and an array becomes a list.
    """
    for key, value in group.items():
        if key not in ("params", "param_names") and (plain := _plain(value)) is not value:
            group[key] = plain


def _plain(value: Any) -> Any:
    if type(value) in (float, int, bool, str, type(None)) or isinstance(value, torch.Tensor):
        return value
    if type(value) in (list, tuple):
        found = [_plain(each) for each in value]
        return value if all(new is old for new, old in zip(found, value, strict=True)) else type(value)(found)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) or (getattr(value, "shape", None) == () and hasattr(value, "__float__")):
        return float(value)
    return _plain(list(value)) if getattr(value, "shape", None) else value


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _within(name: str, value: Any, between: tuple[float, float], bound: str, key: str | None = None) -> None:
    """Raise ValueError unless ``value`` is a number with low <= value < high, the ends ``between``; ``bound`` says so in words."""
    low, high = between
    if not (isinstance(value, int | float) and low <= value < high):
        raise ValueError(f"Invalid {name}: {key or name}={value!r} must be a number {bound}")


def _check_numbers(group: Mapping[str, Any]) -> None:
    """The bounds of the inner optimizers' numbers, as torch.optim states them."""
    one_of("scale_parameter", group["scale_parameter"], (False, True))
    lr, inf = group["lr"], math.inf
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of {lr.numel()} elements: a tensor lr must be 1-element")
    elif not (lr is None and group.get("relative_step")):
        _within("learning rate", lr, (0.0, inf), "from 0, such as 1e-3, or a 1-element tensor", "lr")
    if "betas" in group:
        betas = group["betas"]
        if not _is_pair(betas):
            raise ValueError(f"betas={betas!r} must be a pair of numbers, such as (0.9, 0.999)")
        for i, beta in enumerate(betas):
            _within(f"beta parameter at index {i}", beta, (0.0, 1.0), "in [0, 1)")
        if "momentum" in group:  # of a rule that has Adam for the rest
            _within("momentum", group["momentum"], (0.0, 1.0), "in [0, 1), such as 0.95")
    if "clip_threshold" in group:  # Adafactor
        if not _is_pair(group["eps"]):
            raise ValueError(f"eps={group['eps']!r} must be a pair of numbers, such as (1e-30, 1e-3)")
        if group["beta1"] is not None:
            _within("beta1", group["beta1"], (0.0, 1.0), "in [0, 1), or None for no first moment")
        _within("clip_threshold", group["clip_threshold"], (math.ulp(0.0), inf), "above 0, such as 1.0")
        _within("decay_rate", group["decay_rate"], (-inf, math.ulp(0.0)), "up to 0, such as -0.8")
    eps = group.get("eps", 0.0)
    for value in eps if isinstance(eps, tuple | list) else (eps,):
        _within("eps", value, (0.0, inf), "from 0, such as 1e-8")
    for key in ("weight_decay", "momentum", "lr_decay", "initial_accumulator_value"):
        _within(key, group.get(key, 0.0), (0.0, inf), "from 0")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={group['momentum']} and dampening={group['dampening']}: "
            "Nesterov momentum requires a momentum above 0 and zero dampening"
        )
