"""Weights and optimizer state that lie in parts in several processes: into a checkpoint, and back on any number of processes.

torch.distributed.checkpoint writes each part once, into distributed/, and cuts anew what it reads. All processes of a run call these
functions together. The files are safetensors: its other format keeps an index that is a pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_torch.engine.sharding import local, place_of, unwrap
from galore_torch.train.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PARTS = "distributed"
_MODEL, _OPTIMIZER = "model.", "optimizer."


def formats() -> tuple[type[Any], type[Any]]:
    """The writer and the reader of torch.distributed.checkpoint that write and read safetensors.

    Raises:
        UserError: this torch has none.
    """
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
    except ImportError as error:
        import torch

        raise UserError(
            f"--parallel fsdp and hsdp need a newer torch than {torch.__version__}: update it, or use --parallel ddp"
        ) from error
    return HuggingFaceStorageWriter, HuggingFaceStorageReader


def has_parts(checkpoint: Path) -> bool:
    return (checkpoint / PARTS).is_dir()


def is_cut(model: nn.Module) -> bool:
    """Whether the processes hold parts of its weights."""
    return any(place_of(p) is not None for p in model.parameters())


def save_parts(folder: Path, model: nn.Module, state: dict[str, Any]) -> None:
    """Write this process' part of weights, buffers and an optimizer's `state`, its state_dict, into `folder`, which all processes reach."""
    from torch.distributed import checkpoint as dcp

    tensors = {_MODEL + name: tensor for name, tensor in _weights(model).items()}
    for index, entry in state["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in entry.items() if _is_tensor(value)}
    writer = formats()[0](str(folder / PARTS), save_distributed=True)
    _as_it_was(lambda: dcp.save(tensors, storage_writer=writer, no_dist=not _has_processes()))


def without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """What `save_parts` leaves of a state_dict: plain values."""
    plain = {index: {key: value for key, value in entry.items() if not _is_tensor(value)} for index, entry in state["state"].items()}
    return {**state, "state": plain}


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fill a model, whole or cut in any way."""
    _load(checkpoint, {_MODEL + name: tensor for name, tensor in _weights(model).items()})


def load_state(checkpoint: Path, plain: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state_dict that `plain` was left of, cut as the parameters of `optimizer`; tensors that it holds already are filled in place."""
    known: dict[str, Any] = formats()[1](str(checkpoint / PARTS)).read_metadata().state_dict_metadata
    held: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    targets: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name in known:
        if name.startswith(_OPTIMIZER):
            index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
            saved = known[name]
            own = held.get(int(index), {}).get(key)
            targets[name] = _room(tuple(saved.size), saved.properties.dtype, own, parameters[int(index)])
            plain["state"].setdefault(int(index), {})[key] = targets[name]
    _load(checkpoint, targets)
    return plain


def cut_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state_dict of whole tensors, those of their parameter's shape cut as that is; this package's optimizers cut the others."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(index: int, value: Any) -> Any:
        p = parameters[index]
        place = place_of(p)
        if place is None or not _is_tensor(value) or value.shape != p.shape:
            return value
        return place.wrap(unwrap(value, p).to(local(p).device), place.shape, {dim: dim for dim in range(p.dim())})

    return {**state, "state": {index: {key: cut(index, value) for key, value in entry.items()} for index, entry in state["state"].items()}}


def cut_weights(file: Path, model: nn.Module) -> None:
    """Fill a model that is cut from one safetensors file with whole weights; each process takes its part, one weight after the other."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as whole:
        for name, tensor in _weights(model).items():
            local(tensor).copy_(unwrap(whole.get_tensor(name), tensor))


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state_dict of a model that is cut, put together one weight after the other: on the host where `keep`, else nothing is kept."""
    found: dict[str, Tensor] = {}
    for name, tensor in _weights(model).items():
        whole = unwrap(tensor, None)
        if keep:
            found[name] = whole.cpu()
    return found


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and lasting buffers by name; what has two names has the first alone."""
    named = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(named.items())}
    return {name: value.detach() for name, value in named.items() if first[id(value)] == name}


def _room(shape: tuple[int, ...], dtype: torch.dtype, own: Any, p: Tensor) -> Any:
    """A tensor to read into: the optimizer's own where it fits, else a new one, cut as its parameter where that has its shape."""
    import torch

    if _is_tensor(own) and tuple(own.shape) == shape and own.dtype == dtype:
        return own
    return torch.empty_like(p, dtype=dtype) if shape == tuple(p.shape) else torch.empty(shape, dtype=dtype)


def _load(checkpoint: Path, targets: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    reader = formats()[1](str(checkpoint / PARTS))
    _as_it_was(lambda: dcp.load(targets, storage_reader=reader, no_dist=not _has_processes()))


def _as_it_was(act: Callable[[], Any]) -> None:
    """Raise the first failure of any process, in place of the exception around those of all."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of one process, which is meant
            act()
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _has_processes() -> bool:
    from torch import distributed

    return distributed.is_initialized()


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
