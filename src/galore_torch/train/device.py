"""Where a run computes, and the memory of its process as the system counts it."""

from __future__ import annotations

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
    import sys

    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB


def pick_device(name: str) -> str:
    """'cpu' or 'cuda' for auto, cpu or cuda."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
