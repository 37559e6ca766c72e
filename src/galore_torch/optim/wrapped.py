"""torch's DistributedDataParallel with some weights left to others. Its private parts are used here alone.

Its reducer is built from the parameters that are not among those to ignore. It is built anew as unpickling the wrapper does it.
"""

from __future__ import annotations

import gc
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


def wrappers() -> list[DistributedDataParallel]:
    """All that there are, of subclasses too."""
    return [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]


def holds(wrapper: DistributedDataParallel, weights: Iterable[Tensor]) -> bool:
    """Whether the wrapper averages the gradients of one of these weights at least, or is about to do so again."""
    _settle(wrapper)
    names, wanted = set(wrapper.parameters_to_ignore), set(weights)
    named = wrapper.module.named_parameters(remove_duplicate=False)
    return any(p in wanted and name not in names for name, p in named)


def is_joining(wrapper: DistributedDataParallel) -> bool:
    """Whether it is inside of ``wrapper.join()``, where processes may run out of batches before others."""
    return bool(wrapper._join_config.enable)


def check_join(wrapper: DistributedDataParallel) -> None:
    """Raise ValueError for what does not work inside of ``wrapper.join()``."""
    if not is_joining(wrapper):
        return
    if not wrapper.require_backward_grad_sync:
        raise ValueError(
            "fused_backward does not work under no_sync() inside of join(): a process without batches is not told of such passes, in which "
            "bases may be renewed. Leave no_sync out, or give all processes as many batches, which needs no join()"
        )
    if not wrapper._divide_by_initial_world_size:
        raise ValueError(
            "join(divide_by_initial_world_size=False) does not work with fused_backward, which averages low-rank gradients over all "
            "processes, those without batches too: leave it True"
        )
    if not wrapper._build_params_for_reducer()[0]:
        raise ValueError(
            "join() does not work where fused_backward averages all gradients, and the wrapper none: it would wait for them in a process "
            "without batches. Give all processes as many batches, or train a parameter that is not projected too, such as a norm"
        )


def refuse_join(wrapper: DistributedDataParallel, what: str) -> None:
    """Raise ValueError inside of ``wrapper.join()``."""
    if is_joining(wrapper):
        raise ValueError(
            f"{what} does not work inside of join(): give all processes as many batches, or call fused_backward on the wrapper first"
        )


def joins(wrapper: DistributedDataParallel, shadow: Callable[[], None], ended: Callable[[int], None]) -> Callable[[], None]:
    """Inside of ``wrapper.join()`` call ``shadow()`` in a process without batches, in each backward pass of the others, and in the end
    ``ended(rank)`` in all, with the process that is to hand on what it has. The answer undoes it.

    It lies between what the wrapper says before a backward pass and in one, as it does where there are batches.
    """
    found = weakref.ref(wrapper)
    own = {"_match_all_reduce_for_bwd_pass": _Shadow(found, shadow), "_sync_final_model": _Ended(found, ended)}
    vars(wrapper).update(own)

    def undo() -> None:
        if (wrapper := found()) is not None:
            for name in own:
                vars(wrapper).pop(name, None)

    return undo


class _Around:
    """In the place of a method of the wrapper."""

    def __init__(self, wrapper: Callable[[], Any], call: Callable[..., None]) -> None:
        self.wrapper, self.call = wrapper, call

    def __reduce__(self) -> Any:
        return _of_a_copy, ()


def _of_a_copy() -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise RuntimeError("join() of a copy of a wrapper that fused_backward knows: wrap the model of the copy anew")

    return refuse


class _Shadow(_Around):
    def __call__(self) -> None:
        self.call()
        DistributedDataParallel._match_all_reduce_for_bwd_pass(self.wrapper())


class _Ended(_Around):
    def __call__(self, is_last: bool) -> None:
        wrapper = self.wrapper()
        DistributedDataParallel._sync_final_model(wrapper, is_last)
        self.call(wrapper._authoritative_rank)


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
