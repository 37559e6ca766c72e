"""The best recipe that fits: the largest rank, then the largest batch, then the least recomputing, then the ordinary backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.optimizers.registry import optimizer_spec
from galore_torch.train.plan.answer import Plan, plan_request, planned

# 8-bit moments before all: with bf16 weights fp32 ones hold more than bf16 AdamW does. Q-GaLore's int8 weights cost some quality: last.
PREFERRED = (("galore_adamw8bit", "galore_adamw8bit_per_layer"), ("qgalore_adamw8bit_per_layer",))
SHARES = (2, 4, 8, 16, 32)  # of the short side: ranks to try, the largest first
MOST_SEQUENCES = 512  # in one forward pass: the published batch of a step
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
    model = PretrainConfig(**{key: given[key] for key in ("model_config", "hf_model", "max_length", "targets") if key in given})
    width = plan_request(model, device="cpu").sizes.short_side
    batches = [2**power for power in range(MOST_SEQUENCES.bit_length())][::-1]
    tiers = ((given["optimizer"],),) if "optimizer" in given else PREFERRED
    for tier in tiers:
        uses_rank = any("rank" in optimizer_spec(name).flags for name in tier)
        tried = [width // share for share in SHARES if width >= share] if uses_rank else [None]
        ranks = [given["rank"]] if "rank" in given else tried
        for rank in ranks:
            for batch in [given["batch_size"]] if "batch_size" in given else batches:
                for recompute in [given["activation_checkpointing"]] if "activation_checkpointing" in given else [False, True]:
                    for name in tier:
                        yield PretrainConfig(
                            **{**given, "rank": rank, "batch_size": batch, "activation_checkpointing": recompute, "optimizer": name},
                            given=frozenset(given),
                        )
