"""The only door to DTensor: what of a parameter lies here, and how its processes add up what they hold.

Nothing of torch.distributed is imported before there is a DTensor: the code that made one has done that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from galore_torch.ops.sharded import Part

T = TypeVar("T", Tensor, Tensor | None)


@dataclass(frozen=True)
class Placed:
    """Where a shard comes from: the ``shape`` of the whole parameter, and (dimension, processes) of each cut through it."""

    shape: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Place:
    """The processes that hold one parameter: its DTensor's mesh and placements, and its whole shape."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def placed(self) -> Placed:
        return _placed(self)

    @property
    def ranks(self) -> list[int]:
        """Of all of its processes, replicas too."""
        return sorted(int(rank) for rank in self.mesh.mesh.flatten())  # which is kept on the host

    def part(self, dim: int) -> Part | None:
        """This process' part of a dimension of the parameter; None where it is whole."""
        axes = tuple(axis for axis, placement in enumerate(self.placements) if _dim(placement) == dim)
        if not axes:
            return None
        start, length = _extent(self, dim)
        return Part(start, length, self.shape[dim], partial(_reduced, self.mesh, axes, "SUM"), partial(_reduced, self.mesh, axes, "MAX"))

    def scattered_mean(self, tensor: Tensor, dims: Mapping[int, int]) -> Tensor:
        """This process' part of the mean over processes of a tensor that each has whole, with its own values. ``dims``: as for `wrap`."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [_moved(placement, dims) or Replicate() for placement in self.placements]
        parts = DTensor.from_local(tensor / self.mesh.size(), self.mesh, [Partial()] * len(placements), run_check=False)
        return _waited(parts.redistribute(self.mesh, placements).to_local())

    def wrap(self, local: Tensor, shape: tuple[int, ...], dims: Mapping[int, int]) -> Tensor:
        """A DTensor of ``shape`` around this process' part of a state tensor; they share their memory.

        ``dims``: dimension of the parameter -> that of the state tensor which is cut as it is. Any other cut leaves it whole.
        """
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        placements = tuple(_moved(placement, dims) or Replicate() for placement in self.placements)
        meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), local.dtype)
        return DTensor(local, DTensorSpec(self.mesh, placements, meta), requires_grad=False)  # `from_local` moves what is kept on the host


def place_of(p: Tensor) -> Place | None:
    """Where a DTensor lies; None for a plain tensor."""
    if not _is_dtensor(p):
        return None
    dtensor: Any = p
    return _place(dtensor.device_mesh, tuple(dtensor.placements), tuple(dtensor.shape))


@lru_cache(maxsize=4096)
def _place(mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> Place:
    if strange := [placement for placement in placements if placement.is_partial()]:
        raise ValueError(f"a parameter of shape {shape} is a DTensor placed {strange[0]}: redistribute it to Shard or Replicate")
    return Place(mesh, placements, shape)


def local(p: T) -> T:
    """The tensor that this process holds; it shares its memory. A plain tensor is that itself, and so is no gradient."""
    dtensor: Any = p
    return dtensor._local_tensor if _is_dtensor(p) else p


def local_grad(grad: Tensor, place: Place | None) -> Tensor:
    """This process' part of a gradient, cut as its parameter is."""
    if place is None:
        return grad
    dtensor: Any = grad
    if tuple(dtensor.placements) != place.placements:  # such as a sum that is still to be made, under tensor parallelism
        dtensor = dtensor.redistribute(place.mesh, place.placements)
    return _waited(dtensor.to_local())


def _waited(tensor: Any) -> Tensor:
    """A tensor that a collective may still be writing."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def unwrap(saved: Tensor, like: Tensor | None) -> Tensor:
    """This process' part of a checkpoint's tensor. ``like``: what the state tensor is in this optimizer, a DTensor where it is cut.

    A DTensor that is cut as ``like`` gives what it holds; any other is put together first, which all of its processes must do.
    """
    like = like if like is not None and _is_dtensor(like) else None
    if _is_dtensor(saved):
        dtensor: Any = saved
        if like is not None and tuple(dtensor.placements) == tuple(like.placements) and dtensor.device_mesh == like.device_mesh:  # type: ignore[attr-defined]
            return dtensor.to_local()
        saved = dtensor.full_tensor()
    if like is None or tuple(saved.shape) != tuple(like.shape):
        return saved
    place = place_of(like)
    assert place is not None
    for dim in range(saved.dim()):
        saved = saved.narrow(dim, *_extent(place, dim))
    return saved


def _is_dtensor(p: Tensor | None) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def _dim(placement: Any) -> int | None:
    """The dimension that a placement cuts."""
    return getattr(placement, "dim", None)


def _moved(placement: Any, dims: Mapping[int, int]) -> Any:
    """The same cut through another dimension; None where the placement cuts nothing that is in ``dims``."""
    dim = _dim(placement)
    if dim is None or dim not in dims:
        return None
    return placement if dims[dim] == dim else type(placement)(dims[dim], **_factor(placement))


def _factor(placement: Any) -> dict[str, int]:
    return {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}


@lru_cache(maxsize=4096)
def _placed(place: Place) -> Placed:
    cuts: dict[int, int] = {}
    for axis, placement in enumerate(place.placements):
        if (dim := _dim(placement)) is not None:
            cuts[dim] = cuts.get(dim, 1) * place.mesh.size(axis)
    return Placed(place.shape, tuple(sorted(cuts.items())))


@lru_cache(maxsize=4096)
def _extent(place: Place, dim: int) -> tuple[int, int]:
    """(first index, how many) of this process along a dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(place.shape, place.mesh, place.placements)
    return min(offset[dim], place.shape[dim]), shape[dim]


def _reduced(mesh: Any, axes: tuple[int, ...], by: str, tensor: Tensor) -> Tensor:
    """A new tensor, reduced over the processes along some axes of the mesh. Parameters that are kept on the host meet on the devices."""
    from torch import distributed

    there = torch.empty_like(tensor, device=mesh.device_type, memory_format=torch.contiguous_format).copy_(tensor)
    for axis in axes:
        distributed.all_reduce(there, getattr(distributed.ReduceOp, by), group=mesh.get_group(axis))
    return there.to(tensor.device)
