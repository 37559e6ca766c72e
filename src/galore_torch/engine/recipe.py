"""The table of optimizers. A recipe is one row for each slot; one that cannot work is refused by what its rows declare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galore_torch.choices import BASIS_CODECS, STATE_CODECS, one_of
from galore_torch.slots.carry import CARRIES
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import RULES
from galore_torch.slots.transport import TRANSPORTS


@dataclass(frozen=True)
class Recipe:
    """One row of the table: which row fills each slot, and how state is stored."""

    rule: str = "adam"
    projector: str = "power"
    transport: str = "rotate"
    recovery: str = "project_back"
    carry: str | None = None
    state_codec: str = "fp32"
    basis_codec: str = "weight"

    def __post_init__(self) -> None:
        one_of("rule", self.rule, (*RULES, "torch"))
        one_of("projector", self.projector, PROJECTORS)
        one_of("transport", self.transport, TRANSPORTS)
        one_of("recovery", self.recovery, RECOVERIES)
        one_of("carry", self.carry, CARRIES)
        one_of("state_codec", self.state_codec, STATE_CODECS)
        one_of("basis_codec", self.basis_codec, ("weight", *BASIS_CODECS))
        if self.rule == "torch" and self.state_codec != "fp32":
            raise ValueError(
                f"state_codec={self.state_codec!r} needs a rule of this package: a torch.optim class keeps its own state. "
                "Use state_codec='fp32', or GaLoreAdamW, GaLoreAdafactor, GaLoreAdagrad or GaLoreSGD."
            )

        if self.rule == "torch" and RECOVERIES[self.recovery].native:
            raise ValueError(
                f"recovery={self.recovery!r} needs a rule of this package, whose step size it knows: leave it 'project_back' for "
                "GaLore(base), or use GaLoreAdamW, GaLoreAdafactor, GaLoreAdagrad or GaLoreSGD"
            )

        only = RECOVERIES[self.recovery].only
        if only and (self.rule, self.projector) != only:
            raise ValueError(
                f"recovery={self.recovery!r} is Adam's step with the residual of block means: it needs projector='block_mean' and a class "
                f"such as GaLoreAdamW, and met projector={self.projector!r} with the rule {self.rule!r}"
            )

    def group_keys(self) -> dict[str, Any]:
        """The part of the row that a parameter group may change."""
        return {key: getattr(self, key) for key in ("projector", "transport", "recovery", "carry", "state_codec", "basis_codec")}


def check_slots(group: Mapping[str, Any], row: Recipe) -> None:
    """Refuse a group whose rows are not known, or cannot work together or with its settings: ValueError with the cure."""
    Recipe(row.rule, **{key: group[key] for key in row.group_keys()})
    one_of("tensor", group["tensor"], (False, True, "auto"))
    projector, recovery = PROJECTORS[group["projector"]], RECOVERIES[group["recovery"]]
    if takes_tensors(group):
        _check_tensors(group, row)
    _check_elements(group)
    if group["gap_range"] is not None and not projector.looks:
        raise ValueError(
            f"gap_range={group['gap_range']!r} needs a projector that looks at the gradient: bases of {group['projector']!r} overlap by "
            "chance, by turns alone or always; leave it None"
        )
    if projector.axes is not None and group["proj_type"] not in ("std", *(("left",) if projector.axes == (-2,) else ())):
        raise ValueError(
            f"proj_type={group['proj_type']!r} has no effect with projector={group['projector']!r}, which takes rows: leave it 'std'"
        )
    if (projector.axes is not None or projector.find is None) and group["basis_codec"] not in ("weight", row.basis_codec):
        raise ValueError(
            f"basis_codec={group['basis_codec']!r} has no effect with projector={group['projector']!r}, whose basis is "
            f"{'nothing that is stored' if projector.find is None else 'indices'}: leave it out"
        )
    if projector.find is None:
        for key, default in (("update_proj_gap", PROJECTION_DEFAULTS["update_proj_gap"]), ("transport", row.transport)):
            if group[key] != default:
                raise ValueError(
                    f"{key}={group[key]!r} has no effect with projector={group['projector']!r}, whose subspace never changes: leave it out"
                )
    if recovery.one_sided and group["proj_type"] == "full":
        raise ValueError(
            f"recovery={group['recovery']!r} scales the columns of one projected side, and proj_type='full' projects both: use 'std', "
            "'reverse_std', 'left' or 'right'"
        )


def takes_tensors(group: Mapping[str, Any]) -> bool:
    """Whether parameters of the group may be projected as tensors, with a rank for each of their dimensions."""
    return bool(group["tensor"]) or PROJECTORS[group["projector"]].modes is not None


def _check_tensors(group: Mapping[str, Any], row: Recipe) -> None:
    """Refuse settings of matrices where every parameter is a tensor, and a recovery for one side."""
    if group["tensor"] != "auto":
        for key, default in (("projector", row.projector), ("proj_type", "std"), ("batch_dims", None)):
            if group[key] != default and not (key == "projector" and PROJECTORS[group[key]].modes):
                raise ValueError(
                    f"{key}={group[key]!r} has no effect with tensor=True, which projects each dimension: leave it {default!r}, or give "
                    "tensor='auto', which leaves matrices, and batches of them, to it"
                )
    if RECOVERIES[group["recovery"]].one_sided or RECOVERIES[group["recovery"]].only:
        raise ValueError(
            f"recovery={group['recovery']!r} is for one projected side of a matrix, and tensor={group['tensor']!r} projects every "
            "dimension: leave it 'project_back'"
        )


def _check_elements(group: Mapping[str, Any]) -> None:
    """Refuse a share of single elements that is none, or that nothing would keep."""
    sparse, factor = group["sparse"], group["sparse_scale"]
    if not (sparse is None or (isinstance(sparse, float) and 0.0 < sparse < 1.0)):
        raise ValueError(f"sparse={sparse!r} is not a share of a tensor's elements between 0 and 1: give one such as 0.05, or None")
    if not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"sparse_scale={factor!r} is not a finite number above 0: give the factor of single elements' update, such as 1.0")
    if sparse is None and factor != PROJECTION_DEFAULTS["sparse_scale"]:
        raise ValueError(f"sparse_scale={factor!r} has no effect without sparse: give that too, such as sparse=0.05")
    if sparse is None and PROJECTORS[group["projector"]].elements:
        raise ValueError(f"projector={group['projector']!r} keeps single elements: say which share of them, such as sparse=0.05")
    if sparse is not None and not takes_tensors(group):
        raise ValueError(f"sparse={sparse!r} keeps elements beside a tensor projection: give tensor=True or 'auto' too, or leave it None")


def needs_gradient(group: Mapping[str, Any]) -> str | None:
    """The row of a projected group that reads the full gradient, in the words of its key; None where R is enough."""
    if group["rank"] is None:
        return None
    if "grad" in RECOVERIES[group["recovery"]].reads:
        return f"recovery={group['recovery']!r}"
    return f"carry={group['carry']!r}" if group["carry"] is not None else None


def check_kept(group: Mapping[str, Any]) -> None:
    """Refuse a group that needs gradients in full, where the backward pass keeps only their projections."""
    if row := needs_gradient(group):
        raise ValueError(
            f"{row} reads the full gradient, and fused_backward in mode='project' or 'direct' keeps its projection alone: use "
            "mode='update', which has it inside the backward pass, or train without fused_backward"
        )


RECIPES = {
    "galore_adamw": Recipe("adam"),
    "galore_adamw8bit": Recipe("adam", state_codec="int8", basis_codec="bf16"),
    "q_galore_adamw8bit": Recipe("adam", state_codec="int8", basis_codec="int4"),
    "galore_adafactor": Recipe("adafactor"),
    "galore_adagrad": Recipe("adagrad"),
    "galore_sgd": Recipe("momentum"),
    "galore": Recipe("torch"),
}

# The keys every group has beside its recipe's and its rule's; the first four carry the published names and defaults.
# foreach and fused are hints that change no result: there is one implementation.
PROJECTION_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "gap_range": None,
    "overlap_range": (0.4, 0.6),
    "scale": 0.25,
    "proj_type": "std",
    "batch_dims": None,
    "tensor": False,
    "sparse": None,
    "sparse_scale": 1.0,
    "decay": "before",
    "stochastic_rounding": True,
    "min_8bit_size": 4096,
    "maximize": False,
    "compile": None,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}
