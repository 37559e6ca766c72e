"""Processes that train one model together, each on its share of every batch. All they say to each other is said here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from galore_torch.train.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; `local`: its number on this machine, which is its device's. One process says nothing.

    `machine`: how many are on this machine; `sharded`: each holds a part of every weight, so all have to make the same forward passes.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    device: str = "cpu"
    machine: int = 1
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def wrap(self, loss: nn.Module) -> nn.Module:
        """`loss` with gradients averaged over all processes at the end of each backward pass."""
        if self.size == 1 or self.sharded:
            return loss
        from torch.nn.parallel import DistributedDataParallel

        from galore_torch.ops.int8_weight import Int8Weight

        devices = [self.local] if self.device == "cuda" else None
        # Handing the first process's weights on rounds INT8 ones anew. They are the same in all: of one seed, file or checkpoint.
        is_int8 = any(isinstance(p, Int8Weight) for p in loss.parameters())
        # Buckets that are the gradients: no second copy of them.
        return DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True, init_sync=not is_int8)

    def averaging(self, wrapped: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward pass: whether they end in the average; the last of a step's do. Sharded all do: whole gradients,
        which would wait for it, take the memory that is shared."""
        return contextlib.nullcontext() if now or self.size == 1 or self.sharded else wrapped.no_sync()  # type: ignore[operator]

    def total(self, *values: float) -> list[float]:
        """The sums over all processes of float64 values, the same bits in each."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def any(self, mine: bool) -> bool:
        """Whether any process says yes."""
        return self.total(float(mine))[0] > 0

    def mean(self, found: tuple[float, int] | None) -> tuple[float, int] | None:
        """(mean, number) over all processes of each one's (mean, number); None where one has none."""
        if self.size == 1:
            return found
        mean, number = found or (0.0, 0)
        total, numbers, missing = self.total(mean * number, number, found is None)
        return None if missing else (total / numbers, int(numbers))

    def every(self, mine: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
        """The small mapping of each process, by rank."""
        if self.size == 1:
            return [mine]
        from torch import distributed

        gathered: list[Any] = [None] * self.size
        distributed.all_gather_object(gathered, mine)
        return gathered

    def from_first(self, text: str = "") -> str:
        """What the first process says."""
        return str(self.every({"said": text})[0]["said"])

    def in_step(self, batches: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """(inputs, targets) of this process, and its last ones again, without a target that counts, while another process has some."""
        from galore_torch.train.model.chunked_loss import IGNORED

        last: Any = None
        while True:
            mine = next(batches, None)
            if not self.any(mine is not None):
                return
            last = mine or (last[0], last[1].new_full(last[1].shape, IGNORED))
            yield last

    def together(self, ask: Callable[[], bool]) -> Callable[[], bool]:
        """Whether to stop between forward passes: where those need all processes, any that says so stops all."""
        return (lambda: self.any(ask())) if self.sharded else ask

    def wait(self) -> None:
        """Until all processes are here."""
        self.total(0.0)


ALONE = Ranks()


def launched() -> Ranks:
    """What a launcher such as torchrun says in the environment; one process where there was none."""
    try:
        rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise UserError(
            f"the launcher's RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is no whole number ({error}); start with torchrun"
        ) from None
    if not 0 <= rank < size:
        raise UserError(f"the launcher's RANK {rank} is not below its WORLD_SIZE {size}; start with torchrun")
    return Ranks(rank, size, local, machine=machine)


@contextlib.contextmanager
def joined(ranks: Ranks, device: str, sharded: bool) -> Iterator[Ranks]:
    """Meet the other processes on `device`, cpu or cuda; part at the end."""
    import torch
    from torch import distributed

    if ranks.size == 1:
        yield ranks
        return
    if device == "cuda":
        if ranks.local >= torch.cuda.device_count():
            raise UserError(
                f"process {ranks.local} of this machine has no CUDA device of its own, there are {torch.cuda.device_count()}; "
                f"give torchrun --nproc_per_node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    yield replace(ranks, device=device, sharded=sharded)
    distributed.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def is_loss(error: Exception) -> bool:
    """Whether it says that another process has gone: it was killed, its machine or the network failed."""
    from torch import distributed

    text = str(error)
    return isinstance(error, distributed.DistError) or ("gloo" in text and ("Connection" in text or "imed out" in text))


def reason(error: Exception) -> str:
    """What a lost exchange says, without the place in torch's source and its advice: `Connection closed by peer [127.0.0.1]:4321`."""
    return re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". This is")[0]
