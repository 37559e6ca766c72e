"""Ops: the levels that codes stand for, and tables that find the nearest one. Normalised values in [-1, 1] in, uint8 codes out."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic map, ascending, in [-1, 1] (signed) or [0, 1].

    Seven decades below 1; decade k (10^(k-7) to 10^(k-6), k = 0..6) holds the midpoints of 2^k equal cells (twice as many
    when no sign is stored): most levels where values are large, and still seven orders of magnitude of range.
    """
    positive = []
    for k in range(7):
        cells = 2**k if signed else 2 ** (k + 1)
        positive += [10.0 ** (k - 6) * (0.1 + 0.9 * (i + 0.5) / cells) for i in range(cells)]
    negative = [-x for x in positive] if signed else []
    return torch.tensor(sorted([*negative, 0.0, *positive, 1.0]), dtype=torch.float32, device=device)


@cache
def zero_code(signed: bool) -> int:
    """The code whose value is 0."""
    return int((levels(signed, torch.device("cpu")) == 0).nonzero())


@cache
def code_table(signed: bool, device: torch.device) -> Tensor:
    """uint8 (65536,): the nearest level for each upper half of an fp32 number, taken at the middle of its cell.

    A table look-up replaces a binary search. It is the nearest level but for values within 2^-8 of a midpoint. A positive
    second moment is never stored as zero: dividing by its root would explode.
    """
    table = levels(signed, torch.device("cpu"))
    codes = _codes_of(table, -1.0 if signed else 0.0)
    if not signed:
        codes[1:0x7F80].clamp_(min=zero_code(signed) + 1)  # of what is above 0 and finite
    return codes.to(device)


def _codes_of(table: Tensor, least: float) -> Tensor:
    """uint8 (65536,): the nearest of ascending levels for each upper half of an fp32 number, cut off below ``least`` and above 1."""
    bits = (torch.arange(65536, dtype=torch.int64, device="cpu") << 16) | 0x8000
    value = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32).nan_to_num(0.0).clamp(least, 1.0)
    return torch.bucketize(value, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def nearest_codes(normed: Tensor, table: Tensor) -> Tensor:
    """Codes (uint8) of fp32 values in [-1, 1]. ``table``: their codes by the upper halves of their bits, such as `code_table`."""
    return look_up(table, (normed.contiguous().view(torch.int32) >> 16).bitwise_and_(0xFFFF))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for indices that are in bounds: compiled code does not check them, which costs as much as the rest."""
    return torch.ops.aten._unsafe_index(table, [index])


# --- mulaw4: sixteen levels of a momentum ----------------------------------------------------------------------------------


# Error of a real momentum, ||M' - M|| / ||M||, in blocks of 64 and of 256 (LLaMA of 0.9 M, 60 steps, 2026-11-27): mu 15 .111 and .122;
# mu 5 .102 and .117; NF4 .108 and .130; 16 even levels .143 and .188; dynamic map .145 and .162; mu 255 .189 and .200.
MU = 15.0


@cache
def mulaw_levels(device: torch.device) -> Tensor:
    """Sixteen levels in [-1, 1], the more the nearer to 0, and none that is 0: sign(x) ((1 + mu)^|x| - 1) / mu of even x."""
    even = torch.linspace(-1, 1, 16, dtype=torch.float64, device="cpu")
    return (even.sign() * ((1 + MU) ** even.abs() - 1) / MU).float().to(device)


@cache
def mulaw_codes(device: torch.device) -> Tensor:
    return _codes_of(mulaw_levels(torch.device("cpu")), -1.0).to(device)
