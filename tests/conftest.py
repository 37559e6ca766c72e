"""What every test shares: one seed, one thread, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """One thread: the matrices here are too small to share, and sums then have one order. No network: the hub is read at import."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and tasks: GALORE_TEST_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("GALORE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set GALORE_TEST_DATA to its folder")
    return folder
