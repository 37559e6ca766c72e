"""GPUs by name: memory and peak speed, in one table. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """``gb``: memory it is sold with, in GB of 10**9 bytes; ``mib``: what its driver reports, in MiB, which is more in all of them.

    Peaks in TFLOP/s from NVIDIA's data sheets and architecture papers: dense bfloat16 with float32 sums (None: no such units), and
    float32 without TF32, torch's default.
    """

    name: str
    gb: int
    mib: int
    bfloat16: float | None
    float32: float

    @property
    def bytes(self) -> int:
        """What a plan may count on: the same as for --memory with the size on the box; displays and drivers take of the rest."""
        return self.gb * 10**9

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s in products of `dtype`, "bfloat16" or "float32"."""
        peak = self.bfloat16 if dtype == "bfloat16" else self.float32
        return None if peak is None else peak * 1e12


# Where a name was sold in two sizes, the bare name is the smaller one.
GPUS = (
    Gpu("RTX 3060", 12, 12288, 25.4, 12.7),
    Gpu("RTX 3080", 10, 10240, 59.5, 29.8),
    Gpu("RTX 3090", 24, 24576, 71.0, 35.6),
    Gpu("RTX 4070", 12, 12282, 58.3, 29.1),
    Gpu("RTX 4080", 16, 16376, 97.5, 48.7),
    Gpu("RTX 4090", 24, 24564, 165.2, 82.6),
    Gpu("RTX 5080", 16, 16303, 112.6, 56.3),
    Gpu("RTX 5090", 32, 32607, 209.5, 104.8),
    Gpu("RTX A6000", 48, 49140, 154.8, 38.7),
    Gpu("RTX 6000 Ada", 48, 49140, 364.2, 91.1),
    Gpu("T4", 16, 15360, None, 8.1),
    Gpu("V100 16GB", 16, 16384, None, 15.7),
    Gpu("V100 32GB", 32, 32768, None, 15.7),
    Gpu("A10", 24, 23028, 125.0, 31.2),
    Gpu("A40", 48, 46068, 149.7, 37.4),
    Gpu("L4", 24, 23034, 121.0, 30.3),
    Gpu("L40S", 48, 46068, 362.0, 91.6),
    Gpu("A100 40GB", 40, 40960, 312.0, 19.5),
    Gpu("A100 80GB", 80, 81920, 312.0, 19.5),
    Gpu("H100 80GB", 80, 81559, 989.4, 66.9),
    Gpu("H100 PCIe", 80, 81559, 756.0, 51.2),
    Gpu("H200", 141, 143771, 989.4, 66.9),
    Gpu("B200", 180, 183359, 2250.0, 75.0),
)


def find_gpu(name: str) -> Gpu | None:
    """The GPU of that whole name in any spelling: "4090", "NVIDIA GeForce RTX 4090", "a100", "A100-SXM4-80GB", "H100 80GB HBM3".

    Another chip is not found under a part of its name: an A10G is no A10, a 3090 Ti no 3090, a laptop's 4090 no 4090.
    """
    key = re.sub(r"nvidia|geforce|tesla|sxm\d?|hbm\d?e?|[^a-z0-9]", "", name.lower())
    for candidate in (key, key.replace("pcie", "")):
        if found := [gpu for gpu in GPUS if candidate in _spellings(gpu.name)]:
            return min(found, key=lambda gpu: gpu.mib)
    return None


def _spellings(name: str) -> set[str]:
    """With and without the maker's RTX, the size, and the size's unit."""
    family = re.sub(r" \d+GB$", "", name)
    keys = {re.sub(r"[^a-z0-9]", "", text.lower()) for text in (name, name.removesuffix("GB"), family)}
    return keys | {key.removeprefix("rtx") for key in keys}
