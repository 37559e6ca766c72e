"""The table of optimizers. A recipe is one row for each slot; one that cannot work is refused by what its rows declare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from galore_torch.choices import BASIS_CODECS, CARRY_CODECS, FULL, STATE_CODECS, one_of
from galore_torch.slots.carry import CARRIES
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import RULES
from galore_torch.slots.transport import TRANSPORTS


@dataclass(frozen=True)
class Recipe:
    """One row of the table: which row fills each slot, how state is stored, and the gap and the scale that suit it."""

    rule: str = "adam"
    projector: str = "power"
    transport: str = "rotate"
    recovery: str = "project_back"
    carry: str | None = None
    state_codec: str = "fp32"
    basis_codec: str = "weight"
    update_proj_gap: int = 200
    scale: float = 0.25

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

        if self.state_codec == "mulaw4" and not RULES[self.rule].coarse:
            raise ValueError(
                f"state_codec={self.state_codec!r} is too coarse for the moments of the rule {self.rule!r}, which divides by them or adds "
                "them up as they are: use 'int8', or GaLoreMuon, which keeps the directions of a momentum alone"
            )
        if self.rule == "torch" and RECOVERIES[self.recovery].native:
            raise ValueError(
                f"recovery={self.recovery!r} needs a rule of this package, whose step size it knows: leave it 'project_back' for "
                "GaLore(base), or use GaLoreAdamW, GaLoreAdafactor, GaLoreAdagrad or GaLoreSGD"
            )

        rule = None if self.rule == "torch" else RULES[self.rule]
        needed = rule and rule.recovery
        if needed != self.recovery and (needed or any(row.recovery == self.recovery for row in RULES.values())):
            raise ValueError(
                f"recovery={self.recovery!r} does not go with the rule {self.rule!r}: 'orthogonal' is GaLoreMuon's, which has no other; "
                "leave recovery out"
            )
        carry = CARRIES[self.carry]
        if carry is not None and self.recovery != "project_back":
            raise ValueError(
                f"carry={self.carry!r} adds what the projection drops to the next gradient, and recovery={self.recovery!r} has made a step "
                "of it: leave one of them out"
            )
        if carry is not None and PROJECTORS[self.projector].find and PROJECTORS[self.projector].overlap is None:
            raise ValueError(
                f"carry={self.carry!r} needs orthonormal bases, for others let the error grow, and those of projector={self.projector!r} "
                "are not: use 'power'"
            )
        for key, follows in (("projector", PROJECTORS[self.projector].follows), ("carry", carry is not None and carry.momentum)):
            if follows and (rule is None or rule.blend is None):
                raise ValueError(
                    f"{key}={getattr(self, key)!r} follows a first moment, and the rule {self.rule!r} has none that it knows: leave it "
                    "out, or use a class such as GaLoreAdamW"
                )
        if TRANSPORTS[self.transport].adam and self.rule != "adam":
            raise ValueError(f"transport={self.transport!r} is for the two moments of Adam: use 'rotate', or a class such as GaLoreAdamW")
        recovery = RECOVERIES[self.recovery]
        only, projector = recovery.only or (self.rule, None)
        if self.rule != only or projector not in (None, self.projector):
            also = f"projector={projector!r} and " if projector else ""
            raise ValueError(
                f"recovery={self.recovery!r} is {recovery.about}: it needs {also}a class such as GaLoreAdamW, and met "
                f"projector={self.projector!r} with the rule {self.rule!r}"
            )

    def group_keys(self) -> dict[str, Any]:
        """The part of the row that a parameter group may change."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rule"}


def check_slots(group: Mapping[str, Any], row: Recipe) -> None:
    """Refuse a group whose rows are not known, or cannot work together or with its settings: ValueError with the cure."""
    Recipe(row.rule, **{key: group[key] for key in row.group_keys()})
    one_of("tensor", group["tensor"], (False, True, "auto"))
    projector, recovery = PROJECTORS[group["projector"]], RECOVERIES[group["recovery"]]
    if group["projector"] == "identity":
        raise ValueError(f"projector='identity' is what rank={FULL!r} means, with GaLoreMuon: give that")
    if group["rank"] == FULL:
        _check_full(group, row)
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
    if projector.basis and group["basis_codec"] not in ("weight", row.basis_codec):
        raise ValueError(
            f"basis_codec={group['basis_codec']!r} has no effect with projector={group['projector']!r}, whose basis is {projector.basis}: "
            "leave it out"
        )
    if projector.find and projector.overlap is None and TRANSPORTS[group["transport"]].turns:
        raise ValueError(
            f"transport={group['transport']!r} turns moments from one orthonormal basis to the next, and those of "
            f"projector={group['projector']!r} are not: use transport='keep' or 'reset'"
        )
    _check_random_after(group)
    one_of("carry_codec", group["carry_codec"], ("weight", *CARRY_CODECS))
    if group["carry"] is None and group["carry_codec"] != "weight":
        raise ValueError(f"carry_codec={group['carry_codec']!r} has no effect without a carry: give that too, such as 'error_feedback'")
    if projector.find is None:
        for key, default in (("update_proj_gap", row.update_proj_gap), ("transport", row.transport)):
            if group[key] != default:
                raise ValueError(
                    f"{key}={group[key]!r} has no effect with projector={group['projector']!r}, whose subspace never changes: leave it out"
                )
    if recovery.one_sided and group["proj_type"] == "full":
        raise ValueError(
            f"recovery={group['recovery']!r} scales the columns of one projected side, and proj_type='full' projects both: use 'std', "
            "'reverse_std', 'left' or 'right'"
        )


def _check_full(group: Mapping[str, Any], row: Recipe) -> None:
    """Refuse the rank of the whole matrix where that is the same as none, and beside it what only a subspace has."""
    if not RECOVERIES[group["recovery"]].whole:
        raise ValueError(
            f"rank={FULL!r} with recovery={group['recovery']!r} is the same as no rank: leave rank None, or use GaLoreMuon, which "
            "orthogonalises the matrices of groups with a rank"
        )
    defaults = {"projector": row.projector, "transport": row.transport, "update_proj_gap": row.update_proj_gap}
    for key, default in {**defaults, "gap_range": None, "proj_type": "std", "random_after": None}.items():
        if group[key] != default:
            raise ValueError(f"{key}={group[key]!r} has no effect with rank={FULL!r}, which projects nothing: leave it out")
    if group["basis_codec"] not in ("weight", row.basis_codec):
        raise ValueError(f"basis_codec={group['basis_codec']!r} has no effect with rank={FULL!r}, which has no basis: leave it out")


def _check_random_after(group: Mapping[str, Any]) -> None:
    after, projector = group["random_after"], PROJECTORS[group["projector"]]
    if after is None:
        return
    if not isinstance(after, int) or isinstance(after, bool) or after < 0:
        raise ValueError(f"random_after={after!r} is not a step: give a whole number from 0, from which on bases are random, or None")
    if not projector.looks or projector.basis or takes_tensors(group) or group["gap_range"] is not None:
        raise ValueError(
            f"random_after={after!r} changes from bases of the gradient to random ones: it needs a projector such as 'power', and "
            f"neither tensor nor gap_range; met projector={group['projector']!r}, tensor={group['tensor']!r}, "
            f"gap_range={group['gap_range']!r}"
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
    if RECOVERIES[group["recovery"]].native:
        raise ValueError(
            f"recovery={group['recovery']!r} is for projected sides of a matrix, and tensor={group['tensor']!r} projects every dimension: "
            "leave it 'project_back'"
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
    if sparse is not None and TRANSPORTS[group["transport"]].adam:
        raise ValueError(f"transport={group['transport']!r} has no rule for the single elements of sparse={sparse!r}: use 'rotate'")
    if sparse is not None and not takes_tensors(group):
        raise ValueError(f"sparse={sparse!r} keeps elements beside a tensor projection: give tensor=True or 'auto' too, or leave it None")


def needs_gradient(group: Mapping[str, Any]) -> str | None:
    """The row of a projected group that reads the full gradient, in the words of its key; None where R is enough."""
    if group["rank"] is None:
        return None
    if "grad" in RECOVERIES[group["recovery"]].reads:
        return f"recovery={group['recovery']!r}"
    if PROJECTORS[group["projector"]].follows:
        return f"projector={group['projector']!r}"
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
    "galore_muon": Recipe("muon", "momentum", recovery="orthogonal", state_codec="int8", basis_codec="bf16", update_proj_gap=1, scale=0.2),
    "galore": Recipe("torch"),
}

# The keys every group has beside its recipe's and its rule's. update_proj_gap and scale, the published names, are a recipe's too.
# foreach and fused are hints that change no result: there is one implementation.
PROJECTION_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "gap_range": None,
    "overlap_range": (0.4, 0.6),
    "proj_type": "std",
    "random_after": None,
    "carry_codec": "weight",
    "batch_dims": None,
    "tensor": False,
    "sparse": None,
    "sparse_scale": 1.0,
    "scale_parameter": False,
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
