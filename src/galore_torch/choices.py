"""Names that settings choose from, written once. Imports no torch, so that the command line can read them at once."""

from __future__ import annotations

from collections.abc import Iterable

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")  # which side is projected
STATE_CODECS = ("fp32", "bf16", "int8", "mulaw4")  # how moments are stored; the last is for GaLoreMuon's momentum
BASIS_CODECS = ("fp32", "bf16", "int4")  # how a basis is stored; "weight", the default: bf16 where the weight has 16 bits, else fp32
CARRY_CODECS = ("fp32", "bf16", "int8", "int4")  # how a carry is stored; "weight", the default, as of a basis


FULL = "full"  # the rank of a matrix that is not projected, for recoveries that look at whole matrices


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")
