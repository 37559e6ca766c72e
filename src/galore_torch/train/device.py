"""Where a run computes, and the memory of its process as the system counts it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from galore_torch.train.errors import UserError

_MB = 1e6


def memory_mb(device: str) -> dict[str, float]:
    """Memory of this process in MB (10**6 bytes) as the system counts it; CUDA's peak beside it."""
    peak = _peak_rss_mb()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        import resource

        now = pages * resource.getpagesize() / _MB
    except OSError:  # no /proc: the peak is the best that is known
        now = peak
    row = {"rss_mb": round(now, 1), "peak_rss_mb": round(max(now, peak), 1)}  # the system's peak may lag behind
    if device == "cuda":
        import torch

        row["cuda_mb"] = round(torch.cuda.memory_allocated() / _MB, 1)
        row["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / _MB, 1)
    return row


def _peak_rss_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB


def memory_at_hand(device: str, root: Path = Path("/")) -> int | None:
    """Bytes that a run can still take: a GPU's free memory; on a CPU what the system has available, within the process's cgroup.

    None where the system does not say. Swap does not count: a step that swaps does not end.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    known = [_available_ram(root), *_cgroup_rooms(root)]
    return min((number for number in known if number is not None), default=None)


def _available_ram(root: Path) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What the limits of the process's cgroup and of those around it leave: v2 and v1 beside each other, as systems have them."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers not in ("", "memory"):
            continue
        base, limit, used, reclaimable = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        )
        folder = root / base / path.lstrip("/")
        for place in (folder, *folder.parents):
            most, now = _text(place / limit).strip(), _text(place / used).strip()
            if most.isdigit() and now.isdigit():
                cached = re.search(rf"^{reclaimable} (\d+)", _text(place / "memory.stat"), re.MULTILINE)
                yield max(0, int(most) - int(now) + (int(cached[1]) if cached else 0))
            if place == root / base:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def check_device(name: str) -> None:
    """Refuse cuda where the system shows no GPU at all. Imports no torch; `pick_device` asks torch itself."""
    nodes = ("nvidiactl", "nvidia0", "nvmap", "kfd", "dxg")  # NVIDIA's driver, its Jetson, AMD's, Windows' for Linux
    if name == "cuda" and sys.platform == "linux" and not any(Path("/dev", node).exists() for node in nodes):
        raise UserError("--device cuda: this machine shows no GPU; give --device cpu")


def pick_device(name: str) -> str:
    """'cpu' or 'cuda' for auto, cpu or cuda."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
