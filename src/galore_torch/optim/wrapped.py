"""torch's DistributedDataParallel with some weights left to others. Its private parts are used here alone.

Its reducer is built from the parameters that are not among those to ignore. It is built anew as unpickling the wrapper does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def active_wrapper() -> DistributedDataParallel | None:
    """The wrapper whose forward pass is under way."""
    found: DistributedDataParallel | None = DistributedDataParallel._get_active_ddp_module()
    return found


def holds(wrapper: DistributedDataParallel, weights: Iterable[Tensor]) -> bool:
    """Whether the wrapper averages the gradients of one of these weights at least, or is about to do so again."""
    _settle(wrapper)
    names, wanted = set(wrapper.parameters_to_ignore), set(weights)
    named = wrapper.module.named_parameters(remove_duplicate=False)
    return any(p in wanted and name not in names for name, p in named)


def refuse_join(wrapper: DistributedDataParallel) -> None:
    """Raise ValueError inside of ``wrapper.join()``: a process that is out of batches would have to know which bases the others renew."""
    if wrapper._join_config.enable:
        raise ValueError(
            "fused_backward does not work inside of join(): a process without batches makes no steps, so it does not know which bases the "
            "others renew, and they would wait for it. Give all processes as many batches (DistributedSampler does, of any sizes), or "
            "call remove() on what fused_backward returned"
        )


def leave_out(wrapper: DistributedDataParallel, weights: Iterable[Tensor]) -> set[str]:
    """From now on the wrapper neither averages these weights' gradients nor waits for them; the names by which it forgot them."""
    wanted = set(weights)
    names = set()
    for prefix, module in wrapper.module.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p in wanted:
                names |= {f"{prefix}.{name}", f"{prefix}.{name}".lstrip(".")}  # it looks for both
    names -= set(wrapper.parameters_to_ignore)
    wrapper.parameters_to_ignore |= names
    _rebuild(wrapper)
    return names


def give_back(found: Callable[[], DistributedDataParallel | None], names: set[str]) -> None:
    """Undo `leave_out`, with the wrapper's next forward pass: its buckets are as large as the gradients, and maybe never needed."""
    wrapper = found()
    if wrapper is not None and distributed.is_initialized():
        if wrapper not in _RETURNING:
            wrapper.register_forward_pre_hook(lambda owner, _: _settle(owner))
        _RETURNING.setdefault(wrapper, set()).update(names)


_RETURNING: weakref.WeakKeyDictionary[DistributedDataParallel, set[str]] = weakref.WeakKeyDictionary()


def _settle(wrapper: Any) -> None:
    if names := set(_RETURNING.get(wrapper, ())):
        _RETURNING[wrapper].clear()
        wrapper.parameters_to_ignore -= names
        _rebuild(wrapper)


def _rebuild(wrapper: Any) -> None:
    parameters, are_sparse = wrapper._build_params_for_reducer()
    if parameters:
        names = wrapper._build_debug_param_to_name_mapping(parameters)
    else:  # a reducer needs one: this has never a gradient, so nothing is ever sent
        parameters, are_sparse = [nn.Parameter(torch.zeros(1, device=wrapper.device))], [False]
        names = {0: "none"}
    wrapper._ddp_init_helper(parameters, are_sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    for hook, state in wrapper._comm_hooks:
        distributed._register_comm_hook(wrapper.reducer, state, hook)
