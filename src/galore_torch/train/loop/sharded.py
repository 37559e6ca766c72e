"""`fully_shard` around a model's layers and its loss: every process holds a part of each weight, and gathers a layer when it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galore_torch.train.checkpoint.parts import formats
from galore_torch.train.model.layers import layers_of

if TYPE_CHECKING:
    from torch import nn


def shard(loss: nn.Module, model: nn.Module, mesh: tuple[int, ...], device: str) -> None:
    """Cut the weights of `model` in place, as `mesh` says (`mesh_shape`), and move each part to its device.

    Each layer is gathered alone; what is outside of them (embedding, head, last norm) belongs to `loss`, whose forward pass is the whole
    of what needs them: a loss in chunks reads the head's weight itself. An optimizer is built after this.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    formats()  # refused here, hours before the first checkpoint
    devices = init_device_mesh(device, mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    for layer in layers_of(model):
        fully_shard(layer, mesh=devices)
    fully_shard(loss, mesh=devices)


def as_parts(loss: Any) -> None:
    """Let go of whole weights: those outside of the layers stay after a forward pass that no backward pass has followed."""
    if hasattr(loss, "reshard"):
        loss.reshard()
