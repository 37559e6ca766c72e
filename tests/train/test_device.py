"""The memory that the system says is free, on trees of files as systems have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from galore_torch.train.device import memory_at_hand

_MEMINFO = "MemTotal:       24684084 kB\nMemFree:        1000 kB\nMemAvailable:   8000000 kB\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/box/job\n", "sys/fs/cgroup/box/job/memory.max": "max\n", "sys/fs/cgroup/box/job/memory.current": "1\n"}
V1 = {"proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/job\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),  # a system without /proc
        ({"proc/meminfo": _MEMINFO}, 8000000 * 1024),
        ({"proc/meminfo": _MEMINFO, **V2}, 8000000 * 1024),  # no limit
        (
            {"proc/meminfo": _MEMINFO, **V2, "sys/fs/cgroup/box/memory.max": "5000", "sys/fs/cgroup/box/memory.current": "3000"},
            2000,
        ),  # of the group around it
        (
            {
                **V2,
                "sys/fs/cgroup/box/job/memory.max": "5000",
                "sys/fs/cgroup/box/job/memory.current": "4000",
                "sys/fs/cgroup/box/job/memory.stat": "anon 3300\ninactive_file 700\n",
            },
            1700,
        ),  # cached files give way
        (
            {
                "proc/meminfo": _MEMINFO,
                **V1,
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "6000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "7000",
            },
            0,
        ),
    ],
)
def test_free_memory_is_the_tightest_bound(files: dict[str, str], free: int | None, tmp_path: Path) -> None:
    assert memory_at_hand("cpu", tree(tmp_path, files)) == free


def test_this_system_says_something() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc here")
    free = memory_at_hand("cpu")
    assert free is not None
    assert 10**7 < free < 10**14
