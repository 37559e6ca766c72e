"""A small model that trains as one process or on several, sharded: what tests of FSDP2 and tensor parallelism compare."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import galore_torch

BATCH, WIDTH = 8, 12


@dataclass(frozen=True)
class Run:
    """How a model trains. ``mesh``: sizes of the device mesh, () for one process; ``plan``: tensor parallelism on the last of them.

    ``keys``: group keys of the matrices; ``micro``: backward passes a step, each of which shares its gradients out, or with ``once`` the
    last alone; ``clip``: largest norm of the gradient; ``mode``: of `fused_backward`.
    """

    optimizer: str = "GaLoreAdamW"
    settings: dict[str, Any] = field(default_factory=lambda: {"lr": 0.01, "weight_decay": 0.1})
    keys: dict[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] = ()
    steps: range = range(50)
    sizes: tuple[int, ...] = (WIDTH, 16, 9, 20, 3)  # 9 rows are uneven on two processes, 3 leave one of four without any
    dtype: torch.dtype = torch.float32
    micro: int = 1
    once: bool = False
    clip: float | None = None
    plan: bool = False
    options: tuple[str, ...] = ()  # "offload", "mixed", "checkpointing", "compile"
    mode: str = ""


class Body(nn.Module):
    """Linear layers, with a norm after every second one: between those of a pair tensor parallelism cuts activations."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        pairs = list(pairwise(sizes))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(b) for _, b in pairs[1:-1:2])
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers[:-1]):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
            x = torch.tanh(self.norms[i // 2](x) if i % 2 else x)
        return self.layers[-1](x)  # type: ignore[no-any-return]


def model_of(run: Run) -> nn.Module:
    torch.manual_seed(1)
    return Body(run.sizes).to(run.dtype)


def shard(model: nn.Module, run: Run) -> nn.Module:
    """As users do it: tensor parallelism on the mesh's last axis, `fully_shard` on the others; two of those are HSDP."""
    if not run.mesh:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    names = ("replicate", "shard", "tensor")[-len(run.mesh) :] if run.plan else ("replicate", "shard")[-len(run.mesh) :]
    mesh = init_device_mesh("cpu", run.mesh, mesh_dim_names=names)
    if run.plan:
        plans = [ColwiseParallel(), RowwiseParallel()]
        parallelize_module(model, mesh["tensor"], {f"layers.{i}": plans[i % 2] for i in range(2)})
        if len(run.mesh) == 1:
            return model
        mesh = mesh[names[:-1]]
    kinds: dict[str, Any] = {"mesh": mesh}
    if "offload" in run.options:
        kinds["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if "mixed" in run.options:
        kinds["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.checkpointing = "checkpointing" in run.options  # type: ignore[assignment]
    fully_shard(model.layers[0], **kinds)  # type: ignore[index]
    fully_shard(model, **kinds)
    if "compile" in run.options:
        model.compile(backend="aot_eager")
    return model


def optimizer_of(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    keys = {"rank": 2, "update_proj_gap": 12, **run.keys}
    groups = [{"params": vectors}, {"params": matrices, **keys}]
    maker: Any = getattr(galore_torch, run.optimizer)
    return maker(groups, **run.settings)  # type: ignore[no-any-return]


def batch_of(step: int, micro: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + micro)
    x, noise = torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, 32, generator=generator)
    return x, noise[:, :outputs]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> None:
    """Each data-parallel rank takes its share of every batch; gradients are averages over the whole."""
    ways, rank = 1, 0
    if run.mesh:
        ways, rank = _data_parallel(run)
    share = BATCH // ways
    for step in run.steps:
        for micro in range(run.micro):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(not run.once or micro == run.micro - 1)  # type: ignore[operator]
            x, y = (tensor[rank * share : (rank + 1) * share].to(run.dtype) for tensor in batch_of(step, micro, run.sizes[-1]))
            ((model(x).float() - y.float()).square().mean() / run.micro).backward()
        if run.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()


def _data_parallel(run: Run) -> tuple[int, int]:
    """(how many shares a batch has, which is this process')."""
    tensor = run.mesh[-1] if run.plan else 1
    size = torch.distributed.get_world_size()
    return size // tensor, torch.distributed.get_rank() // tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of it, a new tensor."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach().clone()  # type: ignore[no-any-return]


def common(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The state that every process holds whole: the same bits on each."""
    states = optimizer.state_dict()["state"].values()
    return [{key: value for key, value in state.items() if not hasattr(value, "full_tensor")} for state in states]


def weights(run: Run) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Train: all weights whole, and what is `common`."""
    model = shard(model_of(run), run)
    optimizer = optimizer_of(model, run)
    if run.mode:
        galore_torch.fused_backward(model, optimizer, run.mode)  # type: ignore[arg-type]
    train(model, optimizer, run)
    return [full(p).cpu() for p in model.parameters()], common(optimizer)


def kept_gradients(run: Run) -> list[tuple[int, ...]]:
    """The shapes of R that this process holds of the matrices after a backward pass; the gradients' own are those of the matrices."""
    model = shard(model_of(run), run)
    optimizer: Any = optimizer_of(model, run)
    galore_torch.fused_backward(model, optimizer, run.mode)
    x, y = batch_of(0, 0, run.sizes[-1])
    (model(x) - y).square().mean().backward()
    grads: list[Any] = [p.grad for p in model.parameters() if p.dim() > 1]
    assert all(grad.shape == p.shape for grad, p in zip(grads, (p for p in model.parameters() if p.dim() > 1), strict=True))
    return [tuple(grad.to_local().low.shape) for grad in grads]


class Scattered(TorchDispatchMode):
    """Counts the elements that go into reduce-scatters of DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.reduce_scatter_tensor.default:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def on_the_wire(run: Run) -> tuple[int, int, int]:
    """Elements of one step's gradients in FSDP2's reduce-scatters, in those of R, and in all-reduces; no basis is due in the step."""
    from torch import distributed

    model = shard(model_of(run), run)
    optimizer = optimizer_of(model, replace(run, keys={"update_proj_gap": 10**6, **run.keys}))
    if run.mode:
        galore_torch.fused_backward(model, optimizer, run.mode)  # type: ignore[arg-type]
    train(model, optimizer, replace(run, steps=range(2)))
    names = [name for name in ("reduce_scatter_tensor", "reduce_scatter_single", "all_reduce") if hasattr(distributed, name)]
    calls, sent = {name: getattr(distributed, name) for name in names}, [0, 0]

    def counted(name: str, *arguments: Any, **kwargs: Any) -> Any:
        given = [each for each in (*arguments, *kwargs.values()) if isinstance(each, Tensor)]
        sent[name == "all_reduce"] += max(each.numel() for each in given)
        return calls[name](*arguments, **kwargs)

    try:
        for name in names:
            setattr(distributed, name, partial(counted, name))
        with Scattered() as scattered:
            train(model, optimizer, replace(run, steps=range(2, 3)))
    finally:
        for name, call in calls.items():
            setattr(distributed, name, call)
    return sent[0], scattered.elements, sent[1]


def stepped_in_between() -> None:
    """A backward pass of a loss that was made before a step."""
    run = Run(mesh=(torch.distributed.get_world_size(),), keys={"proj_type": "right"})
    model = shard(model_of(run), run)
    optimizer: Any = optimizer_of(model, run)
    galore_torch.fused_backward(model, optimizer, "direct")
    x, y = batch_of(0, 0, run.sizes[-1])
    (model(x) - y).square().mean().backward()
    late = (model(x) - y).square().mean()
    optimizer.step()
    late.backward()


def reduced_in_bf16() -> None:
    run = Run(mesh=(2,), keys={"proj_type": "right"})
    model = shard(model_of(run), run)
    optimizer: Any = optimizer_of(model, run)
    galore_torch.fused_backward(model, optimizer, "direct", reduce_dtype=torch.bfloat16)


# --- parameters without a model: any shape, cut any way ---------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A parameter of ``shape``; ``dims``: for each axis of the mesh the dimension that it cuts, or None where it is a replica."""

    shape: tuple[int, ...]
    dims: tuple[int | None, ...] = (0,)


def sharded_late(mode: str) -> None:
    """`fully_shard` on a model that its optimizer and `fused_backward` know already, and one step."""
    run = Run(mesh=(torch.distributed.get_world_size(),), steps=range(1), keys={"proj_type": "right"})
    model = model_of(run)
    optimizer: Any = optimizer_of(model, run)
    galore_torch.fused_backward(model, optimizer, mode)
    train(shard(model, run), optimizer, run)


def flattened(keeps_originals: bool) -> None:
    """An optimizer of a model that FSDP1 has cut."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    run = Run(steps=range(1))
    model = FullyShardedDataParallel(model_of(run), use_orig_params=keeps_originals, device_id=torch.device("cpu"))
    galore_torch.GaLoreAdamW(model.parameters(), rank=2)


def placed(tensor: Tensor, cut: Cut, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if mesh is None:
        return tensor
    return distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim) for dim in cut.dims])


def parameters(run: Run, cuts: tuple[Cut, ...]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Step by step on gradients that come from the step alone: parameters whole, and what is `common`."""
    params, optimizer, mesh = made(run, cuts)
    stepped(params, optimizer, run, cuts, mesh)
    return [full(p) for p in params], common(optimizer)


def made(run: Run, cuts: tuple[Cut, ...]) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Any]:
    mesh = None
    if run.mesh:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", run.mesh)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(placed(torch.randn(cut.shape, generator=generator).to(run.dtype), cut, mesh)) for cut in cuts]
    keys = {"rank": 2, "update_proj_gap": 6, **run.keys}
    maker: Any = getattr(galore_torch, run.optimizer, None) or partial(galore_torch.GaLore, getattr(torch.optim, run.optimizer))
    return params, maker([{"params": params, **keys}], **run.settings), mesh


def stepped(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, run: Run, cuts: tuple[Cut, ...], mesh: Any) -> None:
    for step in run.steps:
        for i, (p, cut) in enumerate(zip(params, cuts, strict=True)):
            grad = torch.randn(cut.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(run.dtype)
            p.grad = placed(grad, cut, mesh)
        optimizer.step()


# --- checkpoints ------------------------------------------------------------------------------------------------------------


def as_saved(model: nn.Module, optimizer: torch.optim.Optimizer, flat: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def whole_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The state of every parameter as one process would hold it."""
    states = optimizer.state_dict()["state"].values()
    return [{key: full(value) if isinstance(value, Tensor) else value for key, value in state.items()} for state in states]


Trained = tuple[list[dict[str, Any]], list[Tensor]]


def save(run: Run, later: range, folder: str, how: str) -> Trained:
    """Train, save, and go on: the state that was saved, and the weights at the end."""
    model = shard(model_of(run), run)
    optimizer = optimizer_of(model, run)
    train(model, optimizer, run)
    saved = whole_state(optimizer)
    if how == "async":
        group = torch.distributed.new_group(backend="gloo")  # its own: training talks at the same time
        future = dcp.async_save(as_saved(model, optimizer), checkpoint_id=folder, process_group=group)
        train(model, optimizer, replace(run, steps=later))  # what is saved is what was
        future.result()
    elif how == "whole":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save(whole, folder + "/whole.pt")
        train(model, optimizer, replace(run, steps=later))
    else:
        dcp.save(as_saved(model, optimizer, how == "flat"), checkpoint_id=folder, no_dist=not run.mesh)
        train(model, optimizer, replace(run, steps=later))
    return saved, [full(p) for p in model.parameters()]


def load(run: Run, later: range, folder: str, how: str) -> Trained:
    """Load into a model and an optimizer that were made for something else, and go on: what was loaded, and the weights at the end."""
    other = model_of(run)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    model = shard(other, run)
    optimizer = optimizer_of(model, run)
    if how == "whole":
        options = StateDictOptions(full_state_dict=True)
        weights_, state = torch.load(folder + "/whole.pt")
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        loaded = as_saved(model, optimizer, how == "flat")
        dcp.load(loaded, checkpoint_id=folder, no_dist=not run.mesh)
        weights_, state = loaded["model"], loaded["optimizer"]
    set_model_state_dict(model, weights_, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    found = whole_state(optimizer)
    train(model, optimizer, replace(run, steps=later))
    return found, [full(p) for p in model.parameters()]


def held(model_config: str, optimizer: str, settings: dict[str, Any], mode: str = "") -> tuple[int, int, int]:
    """Bytes of weights, gradients and state that this process holds of a LLaMA after two steps, in a mode of `fused_backward`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from galore_torch.train.model.llama import build_model, model_shape
    from galore_torch.train.optimizers.registry import build_optimizer

    shape, tokens = model_shape(model_config), {"bos_token_id": None, "eos_token_id": None}
    model: Any = build_model(shape, seed=0, dtype="float32", **tokens, activation_checkpointing=False)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    made_: Any = build_optimizer(optimizer, model, lr=1e-3, settings=settings)
    if mode:
        galore_torch.fused_backward(model, made_, mode)
    for _ in range(2):
        made_.zero_grad()
        text = torch.arange(32).view(2, 16)
        model(input_ids=text, labels=text).loss.backward()
        made_.step()
    params = list(model.parameters())
    states = [value for p in params for value in made_.state[p].values() if isinstance(value, Tensor)]
    grads = [getattr(_local(p.grad), "low", p.grad) for p in params]  # type: ignore[arg-type]
    sizes = [sum(_local(tensor).nbytes for tensor in tensors) for tensors in (params, grads, states)]
    return sizes[0], sizes[1], sizes[2]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def redundancy_free(run: Run, ways: int) -> list[Tensor]:
    """The weights of ZeroRedundancyOptimizer on ``ways`` processes, or of its optimizer on one; every process has the whole batch."""
    model = model_of(run)
    keys = {"update_proj_gap": 5, "targets": "all-linear"}
    named = galore_torch.galore_param_groups(model, 2, **keys)  # type: ignore[arg-type]
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in named]
    made_: Any
    if ways > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        made_ = ZeroRedundancyOptimizer(groups, galore_torch.GaLoreAdamW, lr=0.01)
    else:
        made_ = galore_torch.GaLoreAdamW(groups, lr=0.01)
    train(model, made_, run)
    return [p.detach().clone() for p in model.parameters()]


def copied_to_save(run: Run) -> tuple[int, int]:
    """(tensors of a state_dict, those among them that are not the optimizer's own memory) after training."""
    model = shard(model_of(run), run)
    optimizer = optimizer_of(model, run)
    train(model, optimizer, run)
    own = {value.data_ptr() for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)}
    saved = [_local(value) for state in optimizer.state_dict()["state"].values() for value in state.values() if isinstance(value, Tensor)]
    return len(saved), sum(tensor.data_ptr() not in own for tensor in saved if tensor.numel())


def adafactor_rate(run: Run) -> list[float]:
    """What transformers' AdafactorSchedule reads."""
    model = shard(model_of(run), run)
    optimizer: Any = optimizer_of(model, run)
    train(model, optimizer, run)
    return [optimizer._get_lr(group, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
