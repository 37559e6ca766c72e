"""Optim: state written by galore-torch 1.0, read into ours. Nothing else knows the published format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.layout import AnyRule, Layout
from galore_torch.engine.stored import state_spec, stored_moments
from galore_torch.ops.codecs import StoredTensor
from galore_torch.slots.torch_rule import BaseRule

MARKS = {"projector", "state1", "RMS"}  # keys only the published package (or bitsandbytes inside it) writes
NESTED = "__bnb_optimizer_quant_state__"  # where later releases of bitsandbytes keep theirs


def convert_published(saved: Mapping[str, Any], layout: Layout, group: Mapping[str, Any], rule: AnyRule) -> dict[str, Any]:
    """One parameter's state in our keys; state that is already ours is returned as it is.

    The published projector holds its basis as ``ortho_matrix``: U (m x r), Vh (r x n), or both in a list; 8-bit moments are
    bitsandbytes' flat blocks (state1, qmap1, absmax1). Values are copied, so that no view of a whole U or Vh survives.
    """
    saved = {**{key: value for key, value in saved.items() if key != NESTED}, **saved.get(NESTED, {})}
    if isinstance(rule, BaseRule) or not MARKS & saved.keys():
        return dict(saved)
    projector = saved.get("projector")
    if (projector is not None) != (bool(layout.ranks)):
        warnings.warn(
            f"the checkpoint's state of a parameter of shape {layout.shape} was made at another rank than this group's {group['rank']}; "
            "it starts anew",
            stacklevel=2,
        )
        return {}
    state: dict[str, Any] = {key: tensor.allocate(torch.device("cpu")) for key, tensor in state_spec(layout, group, rule).items()}
    state["step"] = int(saved["step"])
    if projector is not None:
        matrices = projector.ortho_matrix if isinstance(projector.ortho_matrix, list | tuple) else [projector.ortho_matrix]
        if not all(isinstance(stored, StoredTensor) for stored in layout.bases.values()):
            raise ValueError(
                f"the checkpoint's state of a parameter of shape {layout.shape} holds a dense basis, and projector={layout.projector!r} "
                "has none: load it with projector='power'"
            )
        for matrix, (axis, stored) in zip(matrices, layout.bases.items(), strict=True):
            stored.encode(state, (matrix if axis == -2 else matrix.mT).to("cpu", layout.compute_dtype), None)
        state["basis_ready"].fill_(True)
    for stored, _ in stored_moments(layout, group, rule):
        stored.encode(state, _published_moment(saved, stored.name).to("cpu", layout.compute_dtype).view(stored.shape), None)
    return state


def _published_moment(saved: Mapping[str, Any], name: str) -> Tensor:
    if "state1" not in saved:
        return saved[name]
    which = {"exp_avg": "1", "exp_avg_sq": "2"}[name]
    value: Tensor = saved[f"state{which}"]
    if value.dtype != torch.uint8:
        return value
    absmax = saved[f"absmax{which}"]
    decoded = saved[f"qmap{which}"][value.flatten().int()]
    block = next(b for b in (256, 2048, 4096, 64, 128, 512, 1024) if -(-decoded.numel() // b) == absmax.numel())
    return (decoded * absmax.repeat_interleave(block)[: decoded.numel()]).view(value.shape)
