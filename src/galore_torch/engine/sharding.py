"""The only door to DTensor and process groups."""

from __future__ import annotations

import sys

from torch import Tensor


def refuse_sharded(p: Tensor) -> None:
    """Raise ValueError for a DTensor, of which each process holds a part. Nothing is imported: the code that made one has done that."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(p, module.DTensor):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is a DTensor, as FSDP2 (fully_shard) and tensor parallelism make them: sharded "
            "parameters are not supported yet. Train under DistributedDataParallel, where each process holds whole parameters"
        )
