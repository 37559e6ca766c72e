"""Ops: INT8 codes of a weight (Q-GaLore, arXiv 2407.08296): 256 elements of it, flattened, share a scale and an offset in bf16."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops import affine
from galore_torch.ops.codecs import BLOCK, Seed, TensorSpec, noise

LEVELS = 255
# A step keeps a block's grid while its values fit and a new one would not be finer than this, and else makes one with such a share free
# at each end. A grid that followed every change of the extremes would round all 256 values anew each time, and that noise has nothing
# to do with the step.
HEADROOM, FINER = 1 / 32, 0.75


def int8_spec(shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """What an INT8 weight of ``shape`` holds: the one place where its sizes are written."""
    blocks = (-(-prod(shape) // BLOCK),)
    return {
        "codes": TensorSpec(shape, torch.uint8),
        "scale": TensorSpec(blocks, torch.bfloat16),
        "offset": TensorSpec(blocks, torch.bfloat16),
    }


def blocks_of(matrix: Tensor) -> Tensor:
    """(blocks, 256) of the flattened matrix; the last value fills the last block, and so changes neither end of its range."""
    flat = matrix.reshape(-1)
    missing = -flat.numel() % BLOCK
    return (torch.cat([flat, flat[-1:].expand(missing)]) if missing else flat).view(-1, BLOCK)


def decode(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """fp32 values of some rows."""
    values = affine.decode(blocks_of(codes), scale.float().unsqueeze(1), offset.float().unsqueeze(1))
    return values.view(-1)[: codes.numel()].view(codes.shape)


def move(codes: Tensor, scale: Tensor, offset: Tensor, update: Tensor, factor: Any, decay_factor: Any, seed: Seed | None) -> None:
    """W <- decay_factor W - factor update on some rows, in place, rounded at random from ``seed``, or to nearest where that is None.

    update: the rows' shape, any float dtype, used up. The mean over seeds is exact, and a zero update changes no code: values are
    counted from their block's offset, where code * scale has no rounding error. ``factor`` and ``decay_factor``: floats or 0-d tensors.
    """
    if not codes.numel():
        return
    old_scale, old_offset = scale.float(), offset.float()
    above = blocks_of(codes).float().mul_(old_scale.unsqueeze(1))
    if isinstance(decay_factor, Tensor) or decay_factor != 1.0:
        above.mul_(decay_factor).add_((old_offset * (decay_factor - 1)).unsqueeze(1))
    above.sub_(blocks_of(update.float().mul_(factor)))
    low, high = above.amin(1), above.amax(1)
    new_scale, new_offset = affine.grid(low + old_offset, high + old_offset, LEVELS, HEADROOM)
    kept = (low >= 0) & (high <= old_scale * LEVELS) & (FINER * old_scale <= new_scale)
    new_scale, new_offset = torch.where(kept, old_scale, new_scale), torch.where(kept, old_offset, new_offset)
    above.add_((old_offset - new_offset).unsqueeze(1))
    store((codes, scale, offset), above, new_scale, new_offset, 0.5 if seed is None else blocks_of(_uniform(codes, seed)))


def _uniform(like: Tensor, seed: Seed) -> Tensor:
    """Random numbers in (0, 1), fp32: the middles of 2^14 cells. At 255 fp32 resolves no more, and of a block's range a cell is 2^-22."""
    a, b = noise(like.shape[0], like.shape[1], seed, like.device) if isinstance(seed, int) else seed
    return ((a + b).bitwise_and_(0xFFFC) + 2).float().mul_(2.0**-16)


def store(stored: tuple[Tensor, Tensor, Tensor], above: Tensor, scale: Tensor, offset: Tensor, noise: Tensor | float) -> None:
    """Write values, given from their offsets (blocks x 256, fp32), on this grid: `affine.encode`."""
    codes = affine.encode(above, scale.unsqueeze(1), LEVELS, noise)
    stored[0].copy_(codes.view(-1)[: stored[0].numel()].view(stored[0].shape))
    stored[1].copy_(scale)
    stored[2].copy_(offset)
