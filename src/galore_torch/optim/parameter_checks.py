"""What an optimizer refuses, or says, of single parameters in a group whose settings are known to be good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.inductor import has_compiler
from galore_torch.engine.layout import layout_of
from galore_torch.engine.recipe import Recipe, takes_tensors
from galore_torch.ops.int8_weight import Int8Weight
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.sparse_tucker import SET


def check_parameter(p: Tensor, group: Mapping[str, Any], row: Recipe, name: str) -> None:
    """Refuse a parameter that the optimizer of this row and name cannot train: ValueError with the cure."""
    check_compiler(p, group)
    what = f"a parameter of shape {tuple(p.shape)} is {p.dtype}: "
    if isinstance(p, Int8Weight) and SET in layout_of(p, group).ranks:
        raise ValueError(
            f"sparse={group['sparse']!r} writes single elements of a parameter of shape {tuple(p.shape)}, whose INT8 weight is written in "
            "blocks: leave sparse None in its group"
        )
    if not p.is_complex():
        return
    if p.dtype == torch.complex32:
        raise ValueError(what + "torch computes little in halves of complex numbers; keep the weight in torch.complex64")
    if row.rule == "torch":
        raise ValueError(
            what + f"{name} runs another class in the subspace of real ones alone; give complex parameters to another optimizer, such as "
            "GaLoreAdamW or GaLoreSGD"
        )
    if group["rank"] is not None and RECOVERIES[group["recovery"]].native:
        raise ValueError(
            what + f"recovery={group['recovery']!r} is for sides of real matrices; give complex parameters a group without a rank, or to "
            "another optimizer, such as TensorGaLoreAdamW"
        )
    if group["compile"]:
        raise ValueError(what + "the compiler has no complex arithmetic; leave compile=None, or give complex weights a group")


def check_compiler(p: Tensor, group: Mapping[str, Any]) -> None:
    if group["compile"] and not has_compiler(p.device.type):
        raise ValueError(
            f"compile=True found no compiler for a parameter on {p.device}: torch.compile needs a C++ compiler such as g++ on a CPU "
            "and Triton on a GPU. Install it, or use compile=None, which compiles only where it can"
        )


def notes(group: Mapping[str, Any], row: Recipe, alone: bool) -> Iterator[str]:
    """What a group with a rank does not do for its parameters; ``alone``: the optimizer has one parameter."""
    if group["rank"] is None or not group["params"]:
        return
    if all(p.dim() < 2 for p in group["params"]):
        if alone and group["params"][0].numel() <= 1 << 14:
            return  # a norm or bias with an optimizer of its own, as layer-wise loops make them
        yield (
            f"rank={group['rank']} projects none of this group's {len(group['params'])} parameters, for all are vectors: they train at "
            "full rank, and no memory is saved. If something has flattened matrices, as FSDP1 and DeepSpeed ZeRO do, train under "
            "fully_shard or DistributedDataParallel. In a group of true vectors leave rank out"
        )
        return
    layouts = [layout_of(p, group) for p in group["params"] if p.dim() > 1 and p.numel()]
    if whole := [layout.shape for layout in layouts if not layout.ranks]:
        blocks = "leaves no means of 2, 4, 8, ... neighbours, which divide it, on the projected side"
        why = blocks if group["projector"] == "block_mean" else "is not smaller than the short side"
        if takes_tensors(group):
            why = "leaves no dimension above 4, or above its own rank, to shorten"
        yield (
            f"rank={group['rank']} {why} of {len(whole)} of {len(group['params'])} parameters "
            f"(such as {min(whole, key=min)}): they are trained at full rank. Choose a smaller rank to save their memory."
        )
    projected = [layout for layout in layouts if layout.ranks]
    if group["sparse"] is not None and not any(SET in layout.ranks for layout in projected):
        yield (
            f"sparse={group['sparse']} keeps single elements of none of this group's {len(group['params'])} parameters, for none is "
            "projected as a tensor: leave sparse out, or give tensor=True, which takes matrices too"
        )
    if group["tensor"] == "auto" and projected and all(layout.is_tensor for layout in projected):
        for key, default in (("projector", row.projector), ("proj_type", "std"), ("batch_dims", None)):
            if group[key] != default and not (key == "projector" and PROJECTORS[group[key]].modes):
                yield (
                    f"{key}={group[key]!r} has no effect in a group whose parameters are all projected as tensors, in each dimension: "
                    f"leave it {default!r}"
                )
