"""Ops: how a state tensor is stored. fp32 inside, storage dtype outside; no optimizer, no configuration.

A codec turns one tensor ("value", fp32 or fp64) into named storage tensors and back; of a complex one, but for fp32, the real and the
imaginary parts, as two tensors side by side:
    fp32   the value itself (fp64 for fp64 parameters)
    bf16   2 bytes an element, stochastically rounded so that small changes survive on average
    int8   1 byte an element and one fp32 scale a block: the dynamic map of 8-bit optimizers (Dettmers et al., arXiv 2110.02861)
    mulaw4 half a byte an element and one fp32 scale a shorter block: 16 levels of a mu-law, for a momentum
    int4   half a byte an element, and a bf16 scale and offset a block: 16 even steps (Q-GaLore, arXiv 2407.08296), for bases
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from galore_torch.ops import affine
from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.levels import code_table, levels, look_up, mulaw_codes, mulaw_levels, nearest_codes, zero_code
from galore_torch.ops.linalg import as_real

Seed = int | tuple[Tensor, Tensor]  # of stochastic rounding: a number, or the `noise` that it makes
BLOCK = 256  # elements that share one scale (arXiv 2110.02861 used 2048; bitsandbytes and Q-GaLore use 256)
CODED = ("int8", "mulaw4")  # codecs of moments that are codes of levels, with a scale for each block


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and first value of one state tensor. ``host`` tensors live on the CPU whatever the parameter's device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    host: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def allocate(self, device: torch.device) -> Tensor:
        """A new tensor with a storage of exactly ``nbytes``."""
        if self.host:  # "cpu" by name: the default device may be another, as under torch.set_default_device or torch.device("meta")
            return torch.full(self.shape, self.fill, dtype=self.dtype, device="cpu", pin_memory=device.type == "cuda")
        return torch.full(self.shape, self.fill, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class StoredTensor:
    """How one value of ``shape`` is stored: the state key, the codec, and the axis (from 0) that blocks of codes run along.

    The axis is the long one, so that a block stays inside one singular direction. ``signed`` is False for second moments;
    ``compute_dtype`` is the arithmetic dtype (fp32 or fp64, or complex); ``fill`` >= 0 is the first value. ``unit``: elements that share
    one scale, where the axis is cut between processes; 0: as `block_length` says.
    """

    name: str
    shape: tuple[int, ...]
    codec: str = "fp32"
    axis: int = 0
    signed: bool = True
    compute_dtype: torch.dtype = torch.float32
    fill: float = 0.0
    unit: int = 0

    @property
    def block(self) -> int:
        """Elements of ``axis`` that share one scale."""
        return self.unit or (short_block if self.codec == "mulaw4" else block_length)(self.shape[self.axis])

    @cached_property
    def pair(self) -> StoredTensor | None:
        """How the parts (..., 2) of a complex value are stored; None where it is stored as it is."""
        if not self.compute_dtype.is_complex or self.codec == "fp32":
            return None
        return replace(self, shape=(*self.shape, 2), compute_dtype=self.compute_dtype.to_real())

    @property
    def keys(self) -> tuple[str, ...]:
        """The state keys of the storage tensors."""
        suffixes = {**dict.fromkeys(CODED, ("_codes", "_scale")), "int4": ("_codes", "_scale", "_offset")}.get(self.codec, ("",))
        return tuple(self.name + suffix for suffix in suffixes)

    def spec(self) -> dict[str, TensorSpec]:
        """The storage tensors: the one place where their sizes are written."""
        if self.pair:
            return self.pair.spec()
        if self.codec not in (*CODED, "int4"):
            return {self.name: TensorSpec(self.shape, self.compute_dtype if self.codec == "fp32" else torch.bfloat16, self.fill)}
        blocks = -(-self.shape[self.axis] // self.block)
        scale_shape = (*self.shape[: self.axis], blocks, *self.shape[self.axis + 1 :])
        if self.codec == "int4":
            assert not self.fill, "a basis starts at zero"
            packed = (*self.shape[: self.axis], -(-self.shape[self.axis] // 2), *self.shape[self.axis + 1 :])
            return {
                f"{self.name}_codes": TensorSpec(packed, torch.uint8),
                f"{self.name}_scale": TensorSpec(scale_shape, torch.bfloat16),
                f"{self.name}_offset": TensorSpec(scale_shape, torch.bfloat16),
            }
        code = 0 if self.codec == "mulaw4" else 255 if self.fill else zero_code(self.signed)
        return {
            f"{self.name}_codes": TensorSpec(self._packed(blocks), torch.uint8, float(code)),
            f"{self.name}_scale": TensorSpec(scale_shape, torch.float32, self.fill),
        }

    def _packed(self, blocks: int) -> tuple[int, ...]:
        """Shape of the codes: in four bits, two to a byte within each block."""
        if self.codec != "mulaw4":
            return self.shape
        assert self.signed
        assert not self.fill
        return (*self.shape[: self.axis], blocks * -(-self.block // 2), *self.shape[self.axis + 1 :])

    def fits(self, codes: Tensor) -> bool:
        """Whether these may be codes of this value, in blocks of some length."""
        others = [axis for axis in range(len(self.shape)) if axis != self.axis or self.codec == "int8"]
        return codes.dim() == len(self.shape) and all(codes.shape[axis] == self.shape[axis] for axis in others)

    @property
    def has_rows(self) -> bool:
        """Whether `rows` works: not where pairs of codes run along the first axis and the last block is not full."""
        return self.codec != "int4" and not (self.codec == "mulaw4" and self.axis == 0 and bool(self.shape[0] % self.block))

    def rows(self, state: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """Views of the storage tensors at some indices of the first axis; blocks of codes along it must not be cut."""
        assert self.has_rows
        if self.codec not in CODED:
            return {self.name: state[self.name][rows]}
        codes, scale = state[f"{self.name}_codes"], state[f"{self.name}_scale"]
        if self.axis > 0:
            return {f"{self.name}_codes": codes[rows], f"{self.name}_scale": scale[rows]}
        assert rows.start % self.block == 0
        blocks = slice(rows.start // self.block, -(-rows.stop // self.block))
        if self.codec == "mulaw4":
            half = -(-self.block // 2)
            rows = slice(blocks.start * half, blocks.stop * half)
        return {f"{self.name}_codes": codes[rows], f"{self.name}_scale": scale[blocks]}

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """What `decode` and `encode` look up, on ``device``: for codes the levels and a table of their codes, else nothing."""
        if self.codec == "mulaw4":
            return mulaw_levels(device), mulaw_codes(device)
        return (levels(self.signed, device), code_table(self.signed, device)) if self.codec == "int8" else ()

    def decode(self, state: Mapping[str, Tensor], tables: tuple[Tensor, ...] | None = None) -> Tensor:
        """The real value. For fp32 it is the stored tensor itself; every change ends with `encode`.

        ``tables``: those of `tables`, for a caller that a compiler follows and that must therefore hand them in.
        """
        if self.pair:
            return torch.view_as_complex(self.pair.decode(state, tables).contiguous())
        if self.codec == "int4":
            return self._decode4(*(state[key] for key in self.keys))
        if self.codec not in CODED:
            return state[self.name].to(self.compute_dtype)
        if not prod(self.shape):  # an empty shard
            return state[f"{self.name}_codes"].to(self.compute_dtype)
        codes, scale = state[f"{self.name}_codes"], state[f"{self.name}_scale"]
        table, length = (self.tables(codes.device) if tables is None else tables)[0], codes.shape[self.axis]
        if self.codec == "mulaw4":  # maybe of some `rows`, of whole blocks
            codes, length = self._unpacked(codes), min(self.shape[self.axis], scale.shape[self.axis] * self.block)
        blocks = _blocked(look_up(table, codes.int()), self.axis, self.block)
        blocks = blocks.mul_(scale.unsqueeze(self.axis + 1))
        return blocks.flatten(self.axis, self.axis + 1).narrow(self.axis, 0, length).to(self.compute_dtype)

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value for one product, which converts it anyway: as `decode`, but bf16 stays what it is."""
        return state[self.name] if self.codec == "bf16" and self.pair is None else self.decode(state)

    def encode(self, state: Mapping[str, Tensor], value: Tensor, seed: Seed | None, tables: tuple[Tensor, ...] | None = None) -> None:
        """Store ``value``, in place. ``seed`` drives the stochastic rounding of bf16 (same seed, same bits); None: to nearest."""
        if not prod(self.shape):  # an empty shard
            return
        if self.pair:
            self.pair.encode(state, as_real(value), seed, tables)
            return
        if self.codec in CODED:
            blocks = _blocked(value.float(), self.axis, self.block)
            scale = blocks.abs().amax(self.axis + 1)
            normed = blocks / torch.where(scale > 0, scale, 1.0).unsqueeze(self.axis + 1)
            codes = nearest_codes(normed, (self.tables(value.device) if tables is None else tables)[1])
            if self.codec == "mulaw4":
                codes = self._pairs(codes)
            codes = codes.flatten(self.axis, self.axis + 1)
            state[f"{self.name}_codes"].copy_(codes if self.codec == "mulaw4" else codes.narrow(self.axis, 0, value.shape[self.axis]))
            state[f"{self.name}_scale"].copy_(scale)
        elif self.codec == "int4":
            for key, tensor in zip(self.keys, self._encode4(value.float()), strict=True):
                state[key].copy_(tensor)
        elif self.codec == "bf16" and seed is not None:
            state[self.name].copy_(stochastic_round(value.float(), seed))
        elif value is not state[self.name]:
            state[self.name].copy_(value)

    def _pairs(self, codes: Tensor) -> Tensor:
        """Codes of four bits (..., blocks, block, ...) as bytes: the first half of a block in the low bits, the second in the high ones."""
        axis = self.axis + 1
        halves = _blocked(codes, axis, -(-codes.shape[axis] // 2))  # (..., blocks, 2, half, ...)
        return halves.select(axis, 0) | (halves.select(axis, halves.shape[axis] - 1) << 4)

    def _unpacked(self, packed: Tensor) -> Tensor:
        """Codes of whole blocks along the axis, from bytes."""
        pairs = packed.unflatten(self.axis, (-1, -(-self.block // 2)))
        codes = torch.cat([pairs & 15, pairs >> 4], dim=self.axis + 1).narrow(self.axis + 1, 0, self.block)
        return codes.flatten(self.axis, self.axis + 1)

    def in_own_blocks(self, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Codes and scales of the same value in blocks of another length: exact where those hold a whole number of ours.

        Raises ValueError for a number of blocks that no world makes.
        """
        length, axis, blocks = self.shape[self.axis], self.axis, scale.shape[self.axis]
        lengths = (replace(self, unit=0).block, *(shard_block(length, ways) for ways in range(1, 1 + WORLDS)))
        there = next((size for size in lengths if -(-length // size) == blocks), None)
        if there is None:
            raise ValueError(
                f"the checkpoint's {self.name}_scale has {blocks} blocks along an axis of {length}, which no number of processes makes: it "
                "belongs to another model"
            )
        keys = f"{self.name}_codes", f"{self.name}_scale"
        if there % self.block == 0:
            finer = scale.repeat_interleave(there // self.block, axis).narrow(axis, 0, -(-length // self.block))
            if self.codec == "mulaw4":
                plain = replace(self, unit=there)._unpacked(codes).narrow(axis, 0, length)
                codes = self._pairs(_blocked(plain, axis, self.block)).flatten(axis, axis + 1)
            return dict(zip(keys, (codes, finer), strict=True))
        out = {key: spec.allocate(codes.device) for key, spec in self.spec().items()}
        self.encode(out, replace(self, unit=there).decode(dict(zip(keys, (codes, scale), strict=True))), None)
        return out

    def _encode4(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, two to a byte, scale and offset. The first half of the axis lies in the low four bits, the second in the high ones."""
        length, axis = self.shape[self.axis], self.axis
        blocks = _blocked(value, axis, self.block)  # zeros in the padding of a block lie within it or widen it a little
        low, high = blocks.amin(axis + 1), blocks.amax(axis + 1)
        scale, offset = affine.grid(low, high, 15)
        codes = affine.encode(blocks - offset.unsqueeze(axis + 1), scale.unsqueeze(axis + 1), 15)
        codes = _blocked(codes.flatten(axis, axis + 1).narrow(axis, 0, length), axis, -(-length // 2))  # (..., 2, half, ...)
        return codes.select(axis, 0) | (codes.select(axis, codes.shape[axis] - 1) << 4), scale, offset

    def _decode4(self, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        length, axis = self.shape[self.axis], self.axis
        codes = torch.cat([packed & 15, packed >> 4], dim=axis).narrow(axis, 0, length)
        blocks = affine.decode(_blocked(codes, axis, self.block), scale.float().unsqueeze(axis + 1), offset.float().unsqueeze(axis + 1))
        return blocks.flatten(axis, axis + 1).narrow(axis, 0, length).to(self.compute_dtype)


# --- blocks of codes -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def block_length(length: int) -> int:
    """Elements a block: the largest divisor of ``length`` up to 256, so that nothing is padded; 256 where that is under 64."""
    if length <= BLOCK:
        return max(length, 1)
    best = max(d for d in range(1, BLOCK + 1) if length % d == 0)
    return best if best >= 64 else BLOCK


@lru_cache(maxsize=4096)
def short_block(length: int) -> int:
    """Elements a block of four bits: the largest divisor of ``length`` from 32 to 64, an even one first; 64 where there is none.

    64 is what `shard_block` makes of most axes that are cut, so that worlds read each other's codes.
    """
    if length <= SHARED:
        return max(length, 1)
    divisors = [size for size in range(32, SHARED + 1) if length % size == 0]
    return max(divisors, key=lambda size: (size % 2 == 0, size), default=SHARED)


WORLD, SHARED, WORLDS = 8, 64, 1024  # processes whose blocks are one's own; the most elements a block; processes that are looked for


def shard_block(length: int, ways: int) -> int:
    """Elements a block of an axis that is cut between ``ways`` processes: no block is cut, in this world and, where it can be, in others.

    The largest power of two from 16 to 64 that divides the shard of 8 processes, so that worlds of 1, 2, 4 and 8 have the same blocks and
    read each other's; else that of these processes, else any divisor of theirs from 16 to 256, else the shard.
    """
    shard = -(-length // ways)
    for size in (-(-length // max(ways, WORLD)), shard):
        power = min(size & -size, SHARED)
        if power >= 16 and shard % power == 0:
            return power
    return max((d for d in range(16, BLOCK + 1) if shard % d == 0), default=shard)


def _blocked(value: Tensor, axis: int, block: int) -> Tensor:
    """Split ``axis`` into (blocks, block), padding the last block with zeros where the length does not divide."""
    missing = -value.shape[axis] % block
    if missing:
        shape = list(value.shape)
        shape[axis] = missing
        value = torch.cat([value, value.new_zeros(shape)], dim=axis)
    return value.unflatten(axis, (-1, block))


# --- bf16: stochastic rounding --------------------------------------------------------------------------------------------


LARGEST = torch.finfo(torch.bfloat16).max
KEPT = 1 << 15  # numbers of noise that are kept for the next matrix of the shape: 64 times 128 KiB, 8 MiB at most


def noise(rows: int, columns: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """a (rows x 1) and b (columns) of `stochastic_round`, int32. All matrices of one shape share them in a step.

    Those of large tensors are made when they are asked for: kept, the noise of a flat parameter would outweigh it many times.
    """
    make = _kept_noise if rows + columns <= KEPT else _new_noise
    return make(rows, columns, seed, device)


def _new_noise(rows: int, columns: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if rows + columns > min(KEPT, chunk_elements(device)):
        return _hash16(rows, 2 * seed, device).unsqueeze(1), _hash16(columns, 2 * seed + 1, device)
    counted = _counters(max(rows, columns), device)  # both in one go: of so few numbers the calls cost more than the numbers
    a_b = hashed16(torch.cat([counted[:rows] + _start(2 * seed), counted[:columns] + _start(2 * seed + 1)])).to(torch.int32)
    return a_b[:rows].unsqueeze(1), a_b[rows:]


@lru_cache(maxsize=64)
def _kept_noise(rows: int, columns: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _new_noise(rows, columns, seed, device)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor flattened to a matrix before its last axis."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def stochastic_round(value: Tensor, seed: Seed) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact. Same seed, same bits, on every device.

    Sixteen random bits are added below bf16's last bit and the rest is cut off. The noise at (i, j) is (a_i + b_j) mod 2^16
    with a and b hashed from the seed: uniform, pairwise independent, and m + n random numbers instead of m x n.
    Numbers from bf16's largest on are rounded to nearest, as torch does, so that only those that are out of range become Inf; Inf stays
    Inf and NaN stays NaN.
    """
    if not value.numel():
        return value.to(torch.bfloat16)
    shape = matrix_shape(value.shape)
    rows = value.reshape(shape)
    a, b = noise(*shape, seed, value.device) if isinstance(seed, int) else seed
    bits = rows.contiguous().view(torch.int32) + (a + b).bitwise_and_(0xFFFF)
    rounded = bits.bitwise_and_(-65536).view(torch.float32)
    rounded = torch.where(rows.abs() < LARGEST, rounded, rows)  # the carry would turn the largest into Inf, and some NaNs into numbers
    return rounded.view(value.shape).to(torch.bfloat16)


MASK = 0xFFFFFFFF  # the arithmetic is that of 32-bit integers without a sign, in int64: torch has no shift for those


def _hash16(count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` uniform 16-bit numbers (int32): a multiply-xorshift finaliser over a counter, as in counter-based generators."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    for some in parts(count, chunk_elements(device)):  # int64 inside: four times the size, and more than once
        out[some] = hashed16(torch.arange(some.start, some.stop, device=device).mul_(0x9E3779B1).add_(_start(seed)))
    return out


@lru_cache(maxsize=16)
def _counters(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device).mul_(0x9E3779B1)


def _start(seed: int) -> int:
    return (seed * 0x85EBCA6B) % MASK


def hashed16(x: Tensor) -> Tensor:
    """Sixteen well mixed bits of each int64, in place: a multiply-xorshift finaliser, as in counter-based generators."""
    x.bitwise_and_(MASK)
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(MASK)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16).bitwise_and_(0xFFFF)
