"""Graphics cards by name. Memory in MiB as the driver reports it, which on a card sold as 24 GB is near 24 GiB, less with ECC."""

from __future__ import annotations

import re
from dataclasses import dataclass

from galore_torch.train.errors import UserError


@dataclass(frozen=True)
class Card:
    name: str
    mib: int

    @property
    def bytes(self) -> int:
        return self.mib * 2**20


# Where a name was sold in two sizes, the bare name is the smaller one.
CARDS = (
    Card("RTX 3060", 12288),
    Card("RTX 3080", 10240),
    Card("RTX 3090", 24576),
    Card("RTX 4070", 12282),
    Card("RTX 4080", 16376),
    Card("RTX 4090", 24564),
    Card("RTX 5080", 16303),
    Card("RTX 5090", 32607),
    Card("RTX A6000", 49140),
    Card("RTX 6000 Ada", 49140),
    Card("T4", 15360),
    Card("V100 16GB", 16384),
    Card("V100 32GB", 32768),
    Card("A10", 23028),
    Card("A40", 46068),
    Card("L4", 23034),
    Card("L40S", 46068),
    Card("A100 40GB", 40960),
    Card("A100 80GB", 81920),
    Card("H100 80GB", 81559),
    Card("H200", 143771),
    Card("B200", 183359),
)


def card(name: str) -> Card:
    """The card of that name in any spelling: "RTX 4090", "4090", "NVIDIA GeForce RTX 4090", "a100", "A100-SXM4-80GB"."""
    found = [item for item in CARDS if _key(name) in _spellings(item.name)]
    if not found:
        raise UserError(f"--card {name!r} is not known; give --memory, or one of: {', '.join(item.name for item in CARDS)}")
    return min(found, key=lambda item: item.mib)


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|sxm\d?|pcie|[^a-z0-9]", "", name.lower())


def _spellings(name: str) -> set[str]:
    """With and without the maker's RTX, the size, and the size's unit."""
    family = re.sub(r" \d+GB$", "", name)
    keys = {_key(name), _key(name).removesuffix("gb"), _key(family)}
    return keys | {key.removeprefix("rtx") for key in keys}
