"""Means over the processes of a group: the one place where data-parallel training says something to the other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

_GROUPS: dict[tuple[int, ...], tuple[Any, Any]] = {}  # by ranks: the default group that it was made under, and the group


def _group_of(ranks: Sequence[int]) -> Any:
    """One group of these ranks for as long as the default group lasts.

    torch names groups by how many there are: one that is made after another has ended has its name, finds what that has left in the store,
    and waits for ever.
    """
    world, held = distributed.group.WORLD, _GROUPS.get(tuple(ranks))
    if held is None or held[0] is not world:
        held = _GROUPS[tuple(ranks)] = world, distributed.new_group(list(ranks), use_local_synchronization=True)
    return held[1]


class Processes:
    """The processes that average their gradients, in a group beside the model's, so that no other's collectives come between theirs.

    Made by all of them together. All of them call its methods in the same order.
    """

    def __init__(self, like: Any) -> None:
        """``like``: the process group whose members they are, or their ranks."""
        ranks = like if isinstance(like, list) else distributed.get_process_group_ranks(like)
        self.group = _group_of(ranks)
        self.size = len(ranks)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor of one shape, the same bits in each process."""
        tensor = (tensor / self.size).contiguous()  # processes may have made it with strides of their own
        distributed.all_reduce(tensor, group=self.group)
        return tensor

    def start_sum(self, tensor: Tensor) -> Any:
        """Begin to sum up, in place; ``wait()`` on the answer ends it."""
        return distributed.all_reduce(tensor, group=self.group, async_op=True)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest of the processes' values, in place."""
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.group)
        return tensor

    def from_one(self, tensors: Sequence[Tensor], rank: int = 0, device: torch.device | None = None) -> None:
        """The values of one process of the group, in place; ``device``: where the tensors travel, if some are kept elsewhere."""
        for tensor in tensors:
            sent = tensor.to(device or tensor.device).contiguous()
            distributed.broadcast(sent, group=self.group, group_src=rank)
            if sent is not tensor:
                tensor.copy_(sent)


class MeanBucket:
    """Real tensors of several processes that are averaged together, in one all-reduce that computation goes on beside.

    Beside each tensor stands whether this process has used it: a process that has not can ask whether another one has.
    """

    def __init__(self, tensors: Sequence[Tensor], used: Sequence[bool], processes: Processes, dtype: torch.dtype) -> None:
        one = tensors[0]
        flags = one.new_ones(len(used)) if all(used) else one.new_tensor(used)
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), flags])
        self.flat = flat.div_(processes.size).to(dtype)
        self.used, self.sizes = used, [tensor.numel() for tensor in tensors]
        self.work = processes.start_sum(self.flat)

    def means(self) -> list[Tensor | None]:
        """The mean of each tensor, flat and in the dtype it travelled in; None for one that no process has used."""
        self.work.wait()
        *parts, flags = self.flat.split([*self.sizes, len(self.sizes)])
        # The host looks at a flag only where it cannot know: where the tensor is of no use here.
        return [part if mine or bool(flag) else None for part, mine, flag in zip(parts, self.used, flags, strict=True)]
