"""Ops: affine block quantisation. A block is stored as codes 0 .. levels, and decodes to offset + code * scale.

Shapes broadcast: callers hand over blocks along one axis, scale and offset with size 1 there. Arithmetic is fp32; scale and offset
are numbers that bf16 holds exactly, so that they are stored in two bytes each.

The published quantiser (Q-GaLore, arXiv 2407.08296, section 3.3, and its code) has an integer zero point clamped to the codes, which
cuts off blocks of one sign. The offset here is the block's own lower end: no block is clipped, whatever its signs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid(low: Tensor, high: Tensor, levels: int, headroom: float = 0.0) -> tuple[Tensor, Tensor]:
    """(scale, offset) of blocks whose values lie in [low, high]: offset <= low and offset + levels * scale >= high, exactly.

    ``headroom``: the share of the range that stays free at each end. A block of equal values decodes to them within a part in 2^8.
    """
    free = (high - low) * headroom
    offset = _floor_bf16(low - free)
    top = high + free
    # To bf16 by its bits: a compiler leaves out a conversion there and back. Not below zero, so that one unit of bits is the next number.
    bits = (((top - offset) / levels).contiguous().view(torch.int32) + 0x8000).bitwise_and_(-65536)
    scale = bits.view(torch.float32)
    return torch.where(offset + scale * levels < top, (bits + 0x10000).view(torch.float32), scale), offset


def encode(above: Tensor, scale: Tensor, levels: int, noise: Tensor | float = 0.5) -> Tensor:
    """Codes (uint8) of values given by how far they lie above their offset: floor(above / scale + noise). ``above`` is used up.

    0.5 rounds to nearest, uniform noise makes the mean exact.
    """
    codes = above.div_(torch.where(scale > 0, scale, 1.0))
    return codes.add_(noise).floor_().clamp_(0, levels).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """fp32 values of codes (uint8)."""
    return codes.float().mul_(scale).add_(offset)


def _floor_bf16(value: Tensor) -> Tensor:
    """The largest bf16 number that is not above an fp32 one, in fp32."""
    bits = value.contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits + 0xFFFF, bits)  # of a negative number, cutting bits off goes up
    return bits.bitwise_and_(-65536).view(torch.float32)
