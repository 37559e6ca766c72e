"""How much more memory does a process hold while a sharded model and optimizer are saved? By the system's count and by tensors.

    python benchmarks/checkpoint_memory/run.py              # LLaMA-60M on 2 processes: dcp.save and dcp.async_save

The system's count is the peak of resident memory during the call, over what was resident before it (Linux). Tensors are those that the
process's own thread makes: `async_save` writes in another one. Each is measured on a save of its own, after a first that warms up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes
from report import heading, table

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.model.llama import build_model, model_shape
from galore_torch.train.optimizers.registry import build_optimizer

OPTIMIZERS = ("adamw", "galore_adamw", "galore_adamw8bit")
WAYS = ("dcp.save", "dcp.async_save")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def over_resident(call: Callable[[], Any]) -> int:
    """The peak of resident memory during the call, beyond what was resident before, without what earlier calls have freed (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def sharded(config: PretrainConfig, optimizer: str) -> tuple[Any, torch.optim.Optimizer]:
    """A model and its optimizer after one step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = build_model(
        model_shape(config.model_config), seed=0, dtype="float32", bos_token_id=None, eos_token_id=None, activation_checkpointing=False
    )
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    made = build_optimizer(optimizer, model, lr=1e-3, settings=config.optimizer_settings)
    text = torch.arange(32).view(2, 16)
    model(input_ids=text, labels=text).loss.backward()
    made.step()
    made.zero_grad()
    return model, made


def saved(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def local_bytes(state: Any) -> list[int]:
    """Of each tensor that this process holds of a state."""
    if isinstance(state, dict):
        return [size for value in state.values() for size in local_bytes(value)]
    if isinstance(state, list | tuple):
        return [size for value in state for size in local_bytes(value)]
    return [state.to_local().nbytes if hasattr(state, "to_local") else state.nbytes] if isinstance(state, Tensor) else []


def saved_by(way: str, model: Any, optimizer: torch.optim.Optimizer, folder: str, group: Any) -> None:
    import torch.distributed.checkpoint as dcp

    state = saved(model, optimizer)
    if way == "dcp.save":
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.async_save(state, checkpoint_id=folder, process_group=group).result()  # type: ignore[union-attr]


def process(rank: int, size: int, port: int, optimizers: list[str], folder: str, config: PretrainConfig, out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    group = distributed.new_group(backend="gloo")
    for optimizer in optimizers:
        model, made = sharded(config, optimizer)
        for way in WAYS:
            calls = [partial(saved_by, way, model, made, f"{folder}/{optimizer}-{way}-{place}", group) for place in range(3)]
            sizes = local_bytes(saved(model, made))
            calls[0]()
            row = [optimizer, way, sum(sizes), max(sizes), over_resident(calls[1]), peak_bytes(calls[2])]
            if rank == 0:
                out.put(row)
    distributed.destroy_process_group()


def measured(size: int, optimizers: list[str], config: PretrainConfig) -> list[list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        group = [context.Process(target=process, args=(rank, size, port, optimizers, folder, config, out)) for rank in range(size)]
        for each in group:
            each.start()
        rows = [out.get() for _ in optimizers for _ in WAYS]
        for each in group:
            each.join()
    return [[*row[:2], *(f"{number / 1e6:,.1f}" for number in row[2:])] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    config = PretrainConfig(model_config=arguments.model_config, rank=arguments.rank, dtype="float32")
    rows = measured(arguments.processes, arguments.optimizers, config)
    print(
        heading(f"LLaMA {arguments.model_config}, fp32, rank {arguments.rank}, fully_shard on {arguments.processes} processes; MB of one")
    )
    print(table(["optimizer", "", "saved by it", "its largest tensor", "more, by the system's count", "more, by tensors"], rows))


if __name__ == "__main__":
    main()
