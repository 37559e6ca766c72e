"""Coded moments in full for the length of one step, for recoveries that read what the rule has made of them: decoded once, encoded once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.fused import FusedStep, only_if
from galore_torch.engine.inductor import call
from galore_torch.engine.layout import ParamView
from galore_torch.engine.stored import stored_moments
from galore_torch.ops.codecs import matrix_shape, noise
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import Rule


def is_coded(view: ParamView) -> bool:
    """Whether a moment is not stored as it is."""
    return view.group["state_codec"] != "fp32" and any(one.codec != "fp32" for one in _region(view).moments)


def reads_coded(view: ParamView) -> bool:
    """Whether the recovery reads such moments."""
    return "moments" in RECOVERIES[view.group["recovery"]].reads and is_coded(view)


def opened(view: ParamView, fuse: bool) -> ParamView:
    """The same parameter with its moments in full, itself where they are; `close` puts them back. ``fuse``: whether passes are compiled."""
    if not is_coded(view):
        return view
    region, device = _region(view), view.weight.device
    values = {one.name: torch.empty(one.shape, dtype=one.compute_dtype, device=device) for one in region.moments}
    _run(_decode, region, fuse, values, _stored(view, region))
    return replace(view, state={**view.state, **values}, group={**view.group, "state_codec": "fp32"})


def close(view: ParamView, full: ParamView, is_finite: Tensor | bool, seed: int, fuse: bool) -> None:
    """Encode the moments of ``full``, what `opened` made of ``view``, unless the gradient was not finite: then they are as they were.

    ``seed``: the first of the random streams, one a moment, of codecs that round at random.
    """
    if is_finite is False:
        return
    region, device = _region(view), view.weight.device
    values, stored = {one.name: full.state[one.name] for one in region.moments}, _stored(view, region)
    noises = [
        noise(*matrix_shape(one.shape), seed + place, device) if one.codec == "bf16" else None for place, one in enumerate(region.moments)
    ]
    with only_if(is_finite, list(stored.values())):
        _run(_encode, region, fuse, values, stored, noises)


def _region(view: ParamView) -> FusedStep:
    assert isinstance(view.rule, Rule)
    stored = tuple(stored for stored, _ in stored_moments(view.layout, view.group, view.rule))
    return FusedStep(view.rule, stored, False, view.layout.compute_dtype)


def _stored(view: ParamView, region: FusedStep) -> dict[str, Tensor]:
    return {key: view.state[key] for one in region.moments for key in one.keys}


def _run(function: Any, region: FusedStep, fuse: bool, values: dict[str, Tensor], *arguments: Any) -> None:
    if fuse and region.compiles:
        call(function, region, values, *arguments, [one.tables(values[one.name].device) for one in region.moments])
    else:
        function(region, values, *arguments, [None] * len(region.moments))


def _decode(region: FusedStep, values: Any, stored: Any, tables: Any) -> None:
    for one, table in zip(region.moments, tables, strict=True):
        values[one.name].copy_(one.decode(stored, table))


def _encode(region: FusedStep, values: Any, stored: Any, noises: Any, tables: Any) -> None:
    for one, seed, table in zip(region.moments, noises, tables, strict=True):
        one.encode(stored, values[one.name], seed, table)
