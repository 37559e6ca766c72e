"""How processes share one training: what each of them holds, and how they stand on a device mesh. Imports no torch."""

from __future__ import annotations

from galore_torch.train.errors import UserError

PARALLEL = ("ddp", "fsdp", "hsdp")


def mesh_shape(parallel: str, processes: int, machine: int) -> tuple[int, ...]:
    """Sizes of the device mesh of `processes`, `machine` of them on each machine: () of ddp, (shards,) of fsdp, (replicas, shards) of hsdp.

    hsdp cuts the model between the processes of a machine, whose links are the fastest, and machines are replicas; a single machine has two
    replicas, of half of its processes each. UserError where a replica would be one process, or replicas would not be alike.
    """
    if parallel == "ddp":
        return ()
    if parallel == "fsdp":
        return (processes,)
    replicas = processes / machine if processes > machine else 2.0
    shards = processes / replicas
    if not replicas.is_integer() or not shards.is_integer() or shards < 2:
        raise UserError(
            f"--parallel hsdp makes each machine a replica of the model, cut between its processes, and of a single machine two: "
            f"{processes} processes, {machine} on this machine, are no equal replicas of two or more; give --parallel fsdp, or an even "
            "number from 4 on"
        )
    return (int(replicas), int(shards))
