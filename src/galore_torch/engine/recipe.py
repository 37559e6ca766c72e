"""Naming: the table of optimizers. A recipe is one choice for each slot; an illegal one is refused when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from galore_torch.choices import BASIS_CODECS, STATE_CODECS, one_of
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import RULES
from galore_torch.slots.transport import TRANSPORTS


@dataclass(frozen=True)
class Recipe:
    """One row of the table: which function fills each slot, and how state is stored."""

    rule: str = "adam"
    projector: str = "power"
    transport: str = "rotate"
    recovery: str = "project_back"
    state_codec: str = "fp32"
    basis_codec: str = "fp32"

    def __post_init__(self) -> None:
        one_of("rule", self.rule, (*RULES, "torch"))
        one_of("projector", self.projector, PROJECTORS)
        one_of("transport", self.transport, TRANSPORTS)
        one_of("recovery", self.recovery, RECOVERIES)
        one_of("state_codec", self.state_codec, STATE_CODECS)
        one_of("basis_codec", self.basis_codec, BASIS_CODECS)
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
