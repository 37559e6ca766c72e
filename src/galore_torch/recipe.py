"""Naming: the table of optimizers. A recipe is one choice for each slot; an illegal one is refused when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from galore_torch.codecs import CODECS
from galore_torch.projectors import PROJECTORS
from galore_torch.recovery import RECOVERIES
from galore_torch.rules import RULES
from galore_torch.transport import TRANSPORTS

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Recipe:
    """One row of the table: which function fills each slot, and how state is stored."""

    rule: str = "adam"
    projector: str = "svd"
    transport: str = "rotate"
    recovery: str = "project_back"
    state_codec: str = "fp32"
    basis_codec: str = "fp32"

    def __post_init__(self) -> None:
        one_of("rule", self.rule, (*RULES, "torch"))
        one_of("projector", self.projector, PROJECTORS)
        one_of("transport", self.transport, TRANSPORTS)
        one_of("recovery", self.recovery, RECOVERIES)
        one_of("state_codec", self.state_codec, CODECS)
        one_of("basis_codec", self.basis_codec, ("fp32", "bf16"))
        if self.rule == "torch" and self.state_codec != "fp32":
            raise ValueError(
                f"state_codec={self.state_codec!r} needs a rule of this package: a torch.optim class keeps its own state. "
                "Use state_codec='fp32', or GaLoreAdamW, GaLoreAdafactor, GaLoreAdagrad or GaLoreSGD."
            )

    def group_keys(self) -> dict[str, str]:
        """The part of the row that a parameter group may change."""
        return {key: getattr(self, key) for key in ("projector", "transport", "state_codec", "basis_codec")}


RECIPES = {
    "galore_adamw": Recipe("adam"),
    "galore_adamw8bit": Recipe("adam", state_codec="int8", basis_codec="bf16"),
    "galore_adafactor": Recipe("adafactor"),
    "galore_adagrad": Recipe("adagrad"),
    "galore_sgd": Recipe("momentum"),
    "galore": Recipe("torch"),
}

# The keys every group has beside its recipe's and its rule's; the first four carry the published names and defaults.
PROJECTION_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "decay": "before",
    "stochastic_rounding": True,
    "min_8bit_size": 4096,
}


def check_group(group: Mapping[str, Any], row: Recipe, known: Iterable[str]) -> None:
    """Refuse a parameter group that cannot work, at construction: ValueError with the value, the bound and the cure."""
    rank, gap, scale = group["rank"], group["update_proj_gap"], group["scale"]
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    fraction = isinstance(rank, float) and 0.0 < rank < 1.0
    if not (rank is None or whole or fraction):
        raise ValueError(
            f"rank={rank!r} is not a rank: give a whole number from 1 (such as 128), a fraction of the short side between 0 and 1 "
            "(such as 0.25), or None to train the group at full rank"
        )
    if not (isinstance(gap, int) and not isinstance(gap, bool) and gap >= 1):
        raise ValueError(f"update_proj_gap={gap!r} is not a number of steps: give a whole number from 1 (such as 200)")
    if not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f"scale={scale!r} is not a finite number: give the factor of the projected update (such as 0.25)")
    one_of("proj_type", group["proj_type"], PROJ_TYPES)
    one_of("decay", group["decay"], ("before", "after"))
    Recipe(row.rule, recovery=row.recovery, **{key: group[key] for key in row.group_keys()})
    dim = group.get("dim", 2)
    if not isinstance(dim, int) or dim > 2:
        raise ValueError(f"dim={dim!r} asks for a tensor projection, which is not available yet; leave dim out: tensors are projected as matrices")
    for key in group:
        if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.8)):
            raise ValueError(f"group key {key!r} is not known; did you mean {near[0]!r}?")
    check_hyperparameters(group)


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """The bounds of the inner optimizers' numbers, as torch.optim states them."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements: a tensor lr must be 1-element")
    if lr is not None and not isinstance(lr, torch.Tensor) and not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: lr={lr!r} must be at least 0")
    for i, beta in enumerate(group.get("betas", ())):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta!r} must lie in [0, 1)")
    eps = group.get("eps", 0.0)
    for value in eps if isinstance(eps, tuple | list) else (eps,):
        if not value >= 0.0:
            raise ValueError(f"Invalid epsilon value: eps={eps!r} must be at least 0")
    for key in ("weight_decay", "momentum", "lr_decay", "initial_accumulator_value"):
        if not (value := group.get(key, 0.0)) >= 0.0:
            raise ValueError(f"Invalid {key} value: {key}={value!r} must be at least 0")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum above 0 and zero dampening")
