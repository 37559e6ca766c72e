"""Rules that look at a whole parameter, where several processes hold parts of it; and what such a parameter cannot have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.layout import AnyRule, Cut, Group, Layout, ParamView
from galore_torch.ops import write
from galore_torch.ops.linalg import readable
from galore_torch.ops.sharded import ShardedMatrix
from galore_torch.slots.rules import Moments, Numbers, Rule
from galore_torch.slots.torch_rule import BaseRule


def check_shared(layout: Layout, group: Group, rule: AnyRule) -> None:
    """Refuse what a parameter that is cut between processes cannot have: ValueError with the cure."""
    if not layout.cuts:
        return
    if isinstance(rule, BaseRule) and not rule.elementwise:
        raise ValueError(
            f"base={rule.base.__name__} looks at whole matrices, and a parameter of shape {layout.whole} is cut between "
            f"{math.prod(cut.ways for cut in layout.cuts)} processes: use a class whose elements move by themselves, such as "
            "torch.optim.AdamW, or one of this package, such as GaLoreAdafactor"
        )
    if group["carry"] and group["carry_codec"] in ("int8", "int4") and any(layout.cut(axis) for axis in layout.ranks):
        raise ValueError(
            f"carry_codec={group['carry_codec']!r} has blocks along the projected side, which processes share in a parameter of shape "
            f"{layout.whole} that is cut along both: use carry_codec='bf16'"
        )
    if layout.batch and layout.cut(0) and group["gap_range"] is not None:
        raise ValueError(
            f"gap_range={group['gap_range']!r} follows the mean of {layout.whole[0]} matrices, which are shared among "
            f"{layout.cuts[0].ways} processes: leave it None for a gap that stays"
        )


def whole_rule(view: ParamView, rule: Rule) -> Rule:
    """A rule that sees R and its moments as DTensors, so that its means and norms are those of the whole matrix; elsewhere itself."""
    if rule.elementwise or not view.parts:
        return rule
    layout, low = view.layout, view.layout.whole_low_shape
    projected = {axis % len(low) for axis in layout.ranks}

    def update(R: Tensor, moments: Moments, numbers: Numbers) -> Tensor:
        cuts = tuple(cut for cut in layout.cuts if cut.axis not in projected)
        kinds, values = rule.moments(low, view.group), {}
        for name, value in moments.items():
            axes = kinds[name].shape(tuple(range(len(low))))  # those of R that the moment has
            own = tuple(cut._replace(axis=axes.index(cut.axis)) for cut in cuts if cut.axis in axes)
            values[name] = _whole(view, value, kinds[name].shape(low), own)
        seen = _whole(view, R, low, cuts)
        found: Any = rule.update(seen, values, numbers)
        changed: Tensor = found.redistribute(placements=seen.placements).to_local()
        return changed

    return replace(rule, update=update)


def rms_of(view: ParamView) -> Tensor:
    """The root mean square of the whole weight, 0-d, whichever processes hold its parts."""
    norm, layout = write.norm(view.weight), view.layout
    if view.place and layout.cuts:
        parts = [part for cut in layout.cuts if (part := view.place.part(cut.dim))]
        norm = reduce(lambda squares, part: part.total(squares), parts, norm.square()).sqrt()
    return norm / math.sqrt(max(1, math.prod(layout.whole)))


def _whole(view: ParamView, local: Tensor, shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> Any:
    """A DTensor of ``shape`` around what is here of a tensor, which is cut at its axes."""
    assert view.place is not None
    return view.place.wrap(local, shape, {cut.dim: cut.axis for cut in cuts})


def of_whole(view: ParamView, function: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """This process' part of the function of a whole matrix, of which it holds ``part``: every process makes all of it."""
    rows, columns = view.part(-2), view.part(-1)
    found = function(ShardedMatrix(part, rows, columns).dense())
    found = rows.of(found, -2) if rows else found
    return columns.of(found, -1) if columns else found


def all_hold(view: ParamView, condition: Tensor | bool, like: Tensor) -> Tensor | bool:
    """Whether a condition holds on every process that has a part of the parameter."""
    fails = 1 - torch.as_tensor(condition, device=like.device).float()
    for part in view.parts:
        fails = part.total(fails)
    return bool(fails == 0) if readable(fails) else fails == 0
