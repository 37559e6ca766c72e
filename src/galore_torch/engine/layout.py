"""Naming: from (shape, dtype, group) to sides and sizes. The ONE source of every state size.

Recomputed wherever it is needed and never remembered, so a loaded optimizer, a fresh one and a planner agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch

from galore_torch.ops.codecs import StoredTensor, TensorSpec
from galore_torch.slots.rules import Moment, Rule
from galore_torch.slots.torch_rule import BaseRule

AnyRule = Rule | BaseRule


@dataclass(frozen=True)
class Layout:
    """How one parameter is seen by the engine.

    ``modes``: the projected axes of its matrix, 0 = rows (basis on the left), 1 = columns (basis on the right), () = full rank.
    ``scaled``: whether the group's scale applies; it does to a matrix whose rank turned out not to be smaller.
    A tensor of more than two dimensions is the matrix (first, product of the rest).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    modes: tuple[int, ...]
    rank: int | None
    scaled: bool

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the parameter's arithmetic."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def matrix(self) -> tuple[int, int]:
        return self.shape[0], prod(self.shape[1:])

    @cached_property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the gradient that the rule sees."""
        if self.rank is None:
            return self.shape
        return tuple(self.rank if mode in self.modes else size for mode, size in enumerate(self.matrix))

    @cached_property
    def basis_keys(self) -> dict[int, str]:
        """mode -> state key."""
        if len(self.modes) == 2:
            return {0: "basis_left", 1: "basis_right"}
        return dict.fromkeys(self.modes, "basis")

    @cached_property
    def long_axis(self) -> int:
        """The axis of int8 blocks: inside one singular direction, so the one that is not projected.

        Where neither or both are, the last, or the longest when the last is too short for blocks (a convolution's kernel).
        """
        if len(self.modes) == 1:
            return 1 - self.modes[0]
        last = max(0, len(self.low_shape) - 1)
        return last if not self.low_shape or self.low_shape[last] >= 64 else self.low_shape.index(max(self.low_shape))


def fits(shape: tuple[int, ...], rank: int | float | None) -> int | None:
    """The rank in use: None when the group has none, for vectors, and where it is not smaller than the matrix."""
    if rank is None or len(shape) < 2:
        return None
    short = min(shape[0], prod(shape[1:]))
    rank = max(1, int(rank * short)) if isinstance(rank, float) else rank
    return rank if rank < short else None


@lru_cache(maxsize=4096)
def make_layout(shape: tuple[int, ...], dtype: torch.dtype, rank: int | float | None, proj_type: str) -> Layout:
    """The side follows the published table: std projects the short side, reverse_std the long one; a square counts as tall."""
    resolved = fits(shape, rank)
    modes = () if resolved is None else projected_modes(shape, proj_type)
    return Layout(shape, dtype, modes, resolved, scaled=rank is not None and len(shape) > 1)


def projected_modes(shape: tuple[int, ...], proj_type: str) -> tuple[int, ...]:
    """The projected axes of a tensor's matrix, by the published table."""
    tall = shape[0] >= prod(shape[1:])
    short, long = ((1,), (0,)) if tall else ((0,), (1,))
    return {"std": short, "reverse_std": long, "left": (0,), "right": (1,), "full": (0, 1)}[proj_type]


@lru_cache(maxsize=4096)
def stored_bases(layout: Layout, basis_codec: str) -> dict[int, StoredTensor]:
    """mode -> how its basis (size of the mode x rank) is stored."""
    assert layout.rank is not None or not layout.modes
    return {
        mode: StoredTensor(key, (layout.matrix[mode], layout.rank or 0), basis_codec, compute_dtype=layout.compute_dtype)
        for mode, key in layout.basis_keys.items()
    }


def stored_moments(layout: Layout, group: Mapping[str, Any], rule: Rule) -> tuple[tuple[StoredTensor, Moment], ...]:
    """How each moment of the rule is stored.

    Under ``min_8bit_size`` elements int8 gives way to fp32: the bytes are few and the blocks too short.
    """
    moments = tuple(rule.moments(layout.low_shape, group).items())
    return _stored_moments(layout, moments, group["state_codec"], group["min_8bit_size"])


@lru_cache(maxsize=4096)
def _stored_moments(
    layout: Layout, moments: tuple[tuple[str, Moment], ...], state_codec: str, min_8bit_size: int
) -> tuple[tuple[StoredTensor, Moment], ...]:
    out = []
    for name, moment in moments:
        shape = moment.shape(layout.low_shape)
        small = not shape or prod(shape) < min_8bit_size
        codec = "fp32" if small and state_codec == "int8" else state_codec
        axis = layout.long_axis if len(shape) == len(layout.low_shape) else len(shape) - 1
        out.append((StoredTensor(name, shape, codec, axis, moment.kind != "second", layout.compute_dtype, moment.fill), moment))
    return tuple(out)


def state_spec(layout: Layout, group: Mapping[str, Any], rule: AnyRule) -> dict[str, TensorSpec]:
    """Every state tensor of one parameter: key -> shape, dtype, first value. Two Python numbers, step and turn, stand beside them."""
    if isinstance(rule, BaseRule):
        return _basis_spec(layout, group["basis_codec"], _first_gap(group)) | rule.spec(
            layout.low_shape, layout.dtype if layout.rank is None else layout.compute_dtype, group
        )
    return _state_spec(layout, group["basis_codec"], _first_gap(group), stored_moments(layout, group, rule))


def _first_gap(group: Mapping[str, Any]) -> int | None:
    """Steps to the first refreshes where the gap adapts, else None: then it is no state."""
    return None if group["gap_range"] is None else group["update_proj_gap"]


@lru_cache(maxsize=4096)
def _state_spec(
    layout: Layout, basis_codec: str, first_gap: int | None, moments: tuple[tuple[StoredTensor, Moment], ...]
) -> dict[str, TensorSpec]:
    spec = _basis_spec(layout, basis_codec, first_gap)
    for stored, _ in moments:
        spec |= stored.spec()
    return spec


def _basis_spec(layout: Layout, basis_codec: str, first_gap: int | None) -> dict[str, TensorSpec]:
    if layout.rank is None:
        return {}
    spec = {"basis_ready": TensorSpec((), torch.bool, host=True)}
    if first_gap is not None:
        spec |= {"gap": TensorSpec((), torch.int64, first_gap, host=True), "gap_start": TensorSpec((), torch.int64, host=True)}
    for stored in stored_bases(layout, basis_codec).values():
        spec |= stored.spec()
    return spec
