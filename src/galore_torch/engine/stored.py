"""From a layout to the tensors of its state: names, shapes, codecs, first values. The ONE source of every state size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch

from galore_torch.engine.layout import AnyRule, Group, Layout, ParamView, rule_of
from galore_torch.ops.codecs import CODED, StoredTensor, TensorSpec, shard_block
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.rules import Moment, Rule
from galore_torch.slots.torch_rule import BaseRule


def stored_moments(layout: Layout, group: Group, rule: Rule) -> tuple[tuple[StoredTensor, Moment], ...]:
    """How each moment of the parameter's rule is stored.

    Under ``min_8bit_size`` elements (of one matrix of a batch) codes give way to fp32: the bytes are few and the blocks too short. What
    four bits are too few for has eight.
    """
    rule = cast(Rule, rule_of(layout, rule))
    moments = tuple(rule.moments(layout.whole_low_shape, group).items())
    codec = group["state_codec"] if rule.coarse or group["state_codec"] != "mulaw4" else "int8"
    return _stored_moments(layout, moments, codec, group["min_8bit_size"])


@lru_cache(maxsize=4096)
def _stored_moments(
    layout: Layout, moments: tuple[tuple[str, Moment], ...], state_codec: str, min_8bit_size: int
) -> tuple[tuple[StoredTensor, Moment], ...]:
    out = []
    for name, moment in moments:
        shape, whole = moment.shape(layout.low_shape), moment.shape(layout.whole_low_shape)
        small = not shape or prod(whole[len(layout.batch) :]) < min_8bit_size
        codec = "fp32" if small and state_codec in CODED else state_codec
        axis = layout.long_axis if len(shape) == len(layout.low_shape) else len(shape) - 1
        dtype = layout.compute_dtype
        if moment.kind == "second" and dtype.is_complex:  # |R|^2
            dtype = dtype.to_real()
        kept = moment.shape(tuple(range(len(layout.low_shape))))  # the axes of R that the moment has
        cut = layout.cut(kept[axis]) if shape else None
        unit = shard_block(whole[axis], cut.ways) if cut else 0
        out.append((StoredTensor(name, shape, codec, axis, moment.kind != "second", dtype, moment.fill, unit), moment))
    return tuple(out)


def carried_moments(view: ParamView) -> dict[str, tuple[StoredTensor, Moment]]:
    """The moments that a transport takes across a change of basis, by name: how each is stored, and its kind."""
    layout, rule = view.layout, view.rule
    if isinstance(rule, Rule):
        pairs = stored_moments(layout, view.group, rule)
        return {stored.name: (stored, moment) for stored, moment in pairs if moment.kind != "other"}
    moments = rule.moments(layout.one.low_shape, view.group).items()
    held = {name: StoredTensor(name, layout.low_shape, compute_dtype=layout.compute_dtype) for name, _ in moments}
    return {name: (held[name], moment) for name, moment in moments if moment.kind != "other"}


def stored_error(layout: Layout, group: Group) -> StoredTensor | None:
    """How the carry of a projected parameter is stored; None where there is none.

    Blocks of codes run along a projected axis, which is whole on every process; in a tensor along the longest. Under ``min_8bit_size``
    elements (of one matrix of a batch) codes give way to fp32.
    """
    if group["carry"] is None or not layout.ranks:
        return None
    return _stored_error(layout, group["carry_codec"], group["min_8bit_size"])


@lru_cache(maxsize=4096)
def _stored_error(layout: Layout, codec: str, min_8bit_size: int) -> StoredTensor:
    if codec == "weight":
        codec = "bf16" if layout.dtype.itemsize == 2 else "fp32"
    if codec in ("int8", "int4") and prod(layout.whole[len(layout.batch) :]) < min_8bit_size:
        codec = "fp32"
    axis = len(layout.view) + next(iter(layout.ranks))
    if layout.is_tensor:
        axis = layout.view.index(max(layout.view))
    return StoredTensor("error", layout.view, codec, axis, compute_dtype=layout.compute_dtype)


def state_spec(layout: Layout, group: Group, rule: AnyRule) -> dict[str, TensorSpec]:
    """Every state tensor of one parameter: key -> shape, dtype, first value. Two Python numbers, step and index, stand beside them."""
    keys = group["gap_range"] and group["update_proj_gap"], group["recovery"], stored_error(layout, group)
    if isinstance(rule, BaseRule):
        inside = layout.dtype if not layout.ranks else layout.compute_dtype
        inner = rule.spec(layout.one.low_shape, inside, group)
        return _slots_spec(layout, *keys) | {key: replace(spec, shape=(*layout.batch, *spec.shape)) for key, spec in inner.items()}
    return _state_spec(layout, keys, stored_moments(layout, group, rule))


@lru_cache(maxsize=4096)
def _state_spec(layout: Layout, keys: tuple[Any, ...], moments: tuple[tuple[StoredTensor, Moment], ...]) -> dict[str, TensorSpec]:
    spec = _slots_spec(layout, *keys)
    for stored, _ in moments:
        spec |= stored.spec()
    return spec


def _slots_spec(layout: Layout, first_gap: int | None, recovery: str, error: StoredTensor | None) -> dict[str, TensorSpec]:
    """The state of every slot but the rule's. ``first_gap``: steps to the first refreshes where the gap adapts, else None."""
    if not layout.ranks:
        return {}
    ready = TensorSpec(layout.batch, torch.bool, host=True)
    spec = {} if PROJECTORS[layout.projector].find is None else {"basis_ready": ready}
    if first_gap and PROJECTORS[layout.projector].find is not None:
        spec |= {"gap": TensorSpec((), torch.int64, first_gap, host=True), "gap_start": TensorSpec((), torch.int64, host=True)}
    for stored in layout.bases.values():
        spec |= stored.spec()
    spec |= RECOVERIES[recovery].state_spec(layout.view, tuple(layout.ranks), layout.compute_dtype)
    return spec | error.spec() if error else spec


def state_cuts(layout: Layout, group: Group, rule: AnyRule) -> dict[str, tuple[tuple[int, ...], dict[int, int]]]:
    """Of a parameter that lies on several processes: state key -> shape of the whole, and dimension of the parameter -> that of the state
    tensor which is cut with it.

    An axis of a state tensor belongs to the one of the parameter whose length it follows.
    """
    spec = state_spec(layout.entire, group, rule)
    out: dict[str, tuple[tuple[int, ...], dict[int, int]]] = {key: (tensor.shape, {}) for key, tensor in spec.items()}
    for cut in layout.cuts:
        view = tuple(2 * size if axis == cut.axis else size for axis, size in enumerate(layout.whole))
        for key, longer in state_spec(replace(layout.entire, view=view), group, rule).items():
            shape, dims = out[key]
            for axis, size in enumerate(longer.shape):
                if size != shape[axis]:
                    dims[cut.dim] = axis
    return out
