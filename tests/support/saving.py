"""What a process holds more of while a sharded model and its optimizer are saved."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp

from support.memory import peak_bytes, tensors_in
from support.sharded import Run, _local, as_saved, model_of, optimizer_of, shard, train


def more_to_save(run: Run, folder: str, how: str) -> tuple[int, int, int]:
    """(the most bytes of tensors at once beyond those that were there, bytes of all that this process saves, of its largest tensor)."""
    model = shard(model_of(run), run)
    optimizer = optimizer_of(model, run)
    train(model, optimizer, run)
    optimizer.zero_grad()
    sizes = [_local(tensor).nbytes for tensor in tensors_in(as_saved(model, optimizer))]
    group = torch.distributed.new_group(backend="gloo")

    def save() -> None:
        state = as_saved(model, optimizer)
        if how == "async":
            dcp.async_save(state, checkpoint_id=folder, process_group=group).result()
        else:
            dcp.save(state, checkpoint_id=folder)

    return peak_bytes(save), sum(sizes), max(sizes)
