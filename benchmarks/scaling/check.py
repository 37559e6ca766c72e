"""What 2 and 4 processes of a small model really hand to collectives, beside what `wire.py` says: the same bytes, or an error."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from report import table
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from wire import FP32, Traffic, low_rank, matrices, plain, refresh, sharded

from galore_torch import fused_backward
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.model.llama import build_model, model_shape
from galore_torch.train.optimizers.registry import build_optimizer
from galore_torch.train.plan.analytic import PlanRequest
from galore_torch.train.plan.answer import plan_request

SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
STEPS, GAP = 16, 32  # so that steps without a refresh are among them
Steps = list[tuple[dict[str, int], list[tuple[int, ...]]]]  # bytes by collective, and (m, n) of each matrix whose turn it was
WAYS = ("DDP", "DDP, R in fp32", "DDP, R in bf16", "FSDP")


class Counted:
    """Counts the bytes of the collectives that are called by their names in torch.distributed: the larger of what goes in and comes out."""

    NAMES: ClassVar = {  # releases of torch name them differently
        "all_reduce": "reduced",
        **dict.fromkeys(("all_gather_into_tensor", "all_gather_single"), "gathered"),
        **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), "scattered"),
    }

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        for name, kind in self.NAMES.items():
            if hasattr(distributed, name):
                setattr(distributed, name, self._counting(kind, getattr(distributed, name)))

    def _counting(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.bytes[kind] += max(given.nbytes for given in (*args, *kwargs.values()) if isinstance(given, Tensor))
            return call(*args, **kwargs)

        return counting


def reduced(_, bucket):  # type: ignore[no-untyped-def]  # the wrapper refuses annotations that are strings
    """What DistributedDataParallel does with a bucket, by the call that is counted."""
    buffer = bucket.buffer().div_(distributed.get_world_size())
    return distributed.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])  # type: ignore[union-attr]


def wrapped(way: str, model: Any, optimizer: Callable[[], Any]) -> tuple[nn.Module, Any]:
    """(what is called, the optimizer) as users build them."""
    if way == "FSDP":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh)
        return model, optimizer()
    outer, made = DistributedDataParallel(model), optimizer()
    if way != "DDP":
        fused_backward(outer, made, "direct", reduce_dtype=torch.bfloat16 if "bf16" in way else None)
    outer.register_comm_hook(None, reduced)
    return outer, made


def process(rank: int, size: int, port: int, config: PretrainConfig, out: multiprocessing.SimpleQueue) -> None:
    """Train each way; the first process tells what was counted."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    counted = Counted()
    found = {way: steps(way, counted, config) for way in WAYS}
    if rank == 0:
        out.put(found)
    distributed.destroy_process_group()


def steps(way: str, counted: Counted, config: PretrainConfig) -> Steps:
    names = {"bos_token_id": None, "eos_token_id": None}
    model = build_model(model_shape(config.model_config), seed=0, dtype="float32", activation_checkpointing=False, **names)
    outer, optimizer = wrapped(way, model, lambda: build_optimizer("galore_adamw", model, lr=1e-3, settings=config.optimizer_settings))
    found = []
    for step in range(STEPS):
        views = [optimizer.view_of(p) for group in optimizer.param_groups for p in group["params"]]
        due = [view.layout.whole for view in views if view.layout.ranks and refresh_is_due(view.state, view.group)]
        counted.bytes.clear()
        text = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(step + 1000 * distributed.get_rank()))
        outer(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((dict(counted.bytes), due))
    return found


def together(size: int, config: PretrainConfig) -> dict[str, Steps]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    group = [context.Process(target=process, args=(rank, size, port, config, out)) for rank in range(size)]
    for each in group:
        each.start()
    for each in group:
        each.join()
    assert not any(each.exitcode for each in group), f"{size} processes have failed"
    found: dict[str, Steps] = out.get()
    return found


def said(way: str, whole: PlanRequest, cut: PlanRequest, due: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """What `wire.py` says of a step in which these matrices have their turn, by the fields of `Traffic`; without those that are zero."""
    request = cut if way == "FSDP" else whole
    parts = {part.shape: part for _, part, _ in matrices(request)}
    if way == "FSDP":
        traffic = sharded(whole)
    elif way == "DDP":
        return vars_of(plain(whole))
    else:
        traffic = low_rank(whole, FP32 // 2 if "bf16" in way else FP32)
    return vars_of(replace(traffic, reduced=traffic.reduced + sum(refresh(request, parts[shape]) for shape in due)))


def vars_of(traffic: Traffic) -> dict[str, float]:
    return {kind: number for kind, number in asdict(traffic).items() if number}


def checked(sizes: Sequence[int]) -> str:
    """A table; AssertionError where a step after the first, which makes every basis, differs by one byte."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.json"
        path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 128, **SHAPE}), encoding="utf-8")
        config = PretrainConfig(
            model_config=str(path), optimizer="galore_adamw", rank=16, update_proj_gap=GAP, dtype="float32", max_length=32, batch_size=2
        )
        rows = []
        for size in sizes:
            whole = plan_request(config, device="cpu")
            cut = plan_request(config, device="cpu", shards=size)
            for way, (_, *later) in together(size, config).items():
                for counted, due in later:
                    assert counted == said(way, whole, cut, due), (way, size, counted, said(way, whole, cut, due), due)
                quiet = next(sum(counted.values()) for counted, due in later if not due)
                busy = max(later, key=lambda step: len(step[1]))
                rows.append([way, str(size), f"{quiet:,}", f"{sum(busy[0].values()):,} ({len(busy[1])})", f"{len(later)} of {len(later)}"])
        header = ["", "processes", "bytes of a step without a refresh", "of one with (so many)", "steps equal to the count by sizes"]
        return table(header, rows) + "\n"
