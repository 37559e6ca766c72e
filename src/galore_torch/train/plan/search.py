"""The best recipe that fits: the largest rank, then the largest batch, then the least recomputing, then the least quantised state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.optimizers.registry import OPTIMIZERS, optimizer_spec
from galore_torch.train.plan.answer import Plan, plan_request, planned
from galore_torch.train.plan.methods import Q_GALORE

# Q-GaLore's int8 weights cost some quality: it comes last, where nothing else fits.
PREFERRED = (("galore_adamw", "galore_adamw8bit", "galore_adamw8bit_per_layer"), (f"{Q_GALORE}_per_layer",))
SHARES = (2, 4, 8, 16, 32)  # of the width: ranks to try, the largest first
MOST_SEQUENCES = 512  # in one forward pass: the published batch of an update
_TRACES = 3  # formulas and a trace agree within 3 %: so many borderline recipes are given up before the formulas have it


def best_that_fits(given: Mapping[str, Any], budget: int, device: str, *, traced: bool) -> tuple[PretrainConfig, Plan] | None:
    """The config and its plan, or None. ``given`` are settings that stay as they are; what it leaves out of these four is tried."""
    refused = 0
    for config in _candidates(given):
        plan = planned(plan_request(config, device=device), traced=False)
        if plan.needed > budget:
            continue
        if traced and refused < _TRACES:
            plan = planned(plan.request, traced=True)
            if plan.needed > budget:
                refused += 1
                continue
        return config, plan
    return None


def _candidates(given: Mapping[str, Any]) -> Iterator[PretrainConfig]:
    """Configs from the best to the least."""
    width = PretrainConfig(**{key: given[key] for key in ("model_config", "hf_model", "max_length") if key in given}).shape.hidden_size
    batches = [2**power for power in range(MOST_SEQUENCES.bit_length())][::-1]
    tiers = ((given["optimizer"],),) if "optimizer" in given else PREFERRED
    for tier in tiers:
        names = [name for name in tier if name in OPTIMIZERS]
        uses_rank = any("rank" in optimizer_spec(name).flags for name in names)
        tried = [width // share for share in SHARES if width >= share] if uses_rank else [None]
        ranks = [given["rank"]] if "rank" in given else tried
        for rank in ranks:
            for batch in [given["batch_size"]] if "batch_size" in given else batches:
                for recompute in [given["activation_checkpointing"]] if "activation_checkpointing" in given else [False, True]:
                    for name in names:
                        yield PretrainConfig(
                            **{**given, "rank": rank, "batch_size": batch, "activation_checkpointing": recompute, "optimizer": name},
                            given=frozenset(given),
                        )
