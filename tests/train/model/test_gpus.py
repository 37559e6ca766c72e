"""The table of GPUs: found by any spelling of a whole name, and by no other."""

from __future__ import annotations

import pytest

from galore_torch.train.model.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("RTX 4090", 24564),
        ("rtx4090", 24564),
        ("4090", 24564),
        ("NVIDIA GeForce RTX 4090", 24564),
        ("a100", 40960),
        ("A100-SXM4-80GB", 81920),
        ("NVIDIA A100-PCIE-40GB", 40960),
    ],
)
def test_gpus_go_by_many_names(name: str, mib: int) -> None:
    gpu = find_gpu(name)
    assert gpu is not None
    assert gpu.mib == mib


def test_every_gpu_is_found_by_its_own_name_and_no_other_is() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)
    assert find_gpu("") is None


def test_what_a_gpu_is_sold_with_is_there() -> None:
    """A plan for the size on the box never counts on more than the driver reports, nor on much less."""
    for gpu in GPUS:
        assert 0.9 * gpu.mib * 2**20 <= gpu.bytes <= gpu.mib * 2**20
