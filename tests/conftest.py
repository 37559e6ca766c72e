"""What every test shares: one seed, one thread, the device it needs, and the folder of real data where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.forked import Forked
from support.world import World

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """One thread, here and in processes that tests start: the matrices are too small to share, and sums then have one order.

    No network: the hub is read at import. Triton, too, asks at its import whether it interprets its kernels.
    """
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (mark := item.get_closest_marker("gpu")) is not None:
        needed, found = (*mark.args, 1)[0], torch.cuda.device_count()
        if found < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}, {found} found")


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of this session, the same for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


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


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    with Forked(tmp_path_factory.mktemp("forked")) as server:
        yield server


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, World]]:
    """Groups of 2 and of 4 processes on gloo, started when a test first uses them."""
    with World(2, tmp_path_factory.mktemp("two")) as two, World(4, tmp_path_factory.mktemp("four")) as four:
        yield {2: two, 4: four}
