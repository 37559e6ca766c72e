"""Optim: parameters that a model has exchanged after its optimizer was built. They get no gradient, and a step would say nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from galore_torch.engine.sharding import place_of


def refuse_flattened(group: Mapping[str, Any], lost: Iterable[Tensor]) -> None:
    """Raise ValueError where a group with a rank holds vectors that were matrices: FSDP1 and DeepSpeed ZeRO-3 mark theirs, and ZeRO-1 and 2
    put theirs into the place of the optimizer's own, which are ``lost`` since."""
    params = group["params"]
    if group["rank"] is None or not params or any(p.dim() > 1 for p in params):
        return
    if any(getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id") for p in params) or any(p.dim() > 1 for p in lost):
        raise ValueError(
            f"rank={group['rank']} projects matrices, and this group's {len(params)} parameters are vectors that FSDP1 or DeepSpeed ZeRO "
            "has made of them: every step would be at full rank. Use torch.distributed.fsdp.fully_shard, which keeps matrices, or "
            "DistributedDataParallel; or leave rank out"
        )


def left_behind(params: Iterable[Tensor]) -> str | None:
    """Why an optimizer's first step trains nothing, or a part of its parameters only, and the cure; None where nothing points to that.

    `fully_shard` leaves an old parameter as it was, so there is no more to see of it than that it gets no gradient: where none of several
    does, or where a whole one does not among DTensors. One parameter alone may be without, as in layer-wise loops with an unused layer.
    """
    trained = [p for p in params if p.requires_grad]
    waiting = [p for p in trained if p.grad is None]
    if len(trained) < 2 or not waiting:
        return None
    if len(waiting) == len(trained):
        what = f"none of the {len(trained)} parameters has a gradient at the first step, so nothing is trained"
    else:
        whole = [p for p in waiting if place_of(p) is None]
        if not whole or all(place_of(p) is None for p in trained):
            return None
        shape = tuple(whole[0].shape)
        what = f"{len(whole)} whole parameters beside DTensors have no gradient at the first step (such as one of shape {shape})"
    return (
        f"{what}. If backward() was called, the model has others in their place: fully_shard, parallelize_module and "
        "load_state_dict(assign=True) exchange a model's parameters. Call them first, then build the optimizer"
    )
