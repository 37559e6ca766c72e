"""Whether a run fits into the memory at hand, before anything of it is built."""

from __future__ import annotations

import os
import shlex

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.device import memory_at_hand
from galore_torch.train.errors import UserError
from galore_torch.train.plan.answer import plan_request, planned
from galore_torch.train.plan.units import gb


def check_memory(config: PretrainConfig, device: str) -> None:
    """UserError where a run of `config` needs more than the device, or the host that its weights are made on, has free.

    Tensors alone are compared, without the plan's reserve. Of a model whose activations the formulas do not know: weights and state.
    """
    if config.force:
        return
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine, which torchrun tells
    for name in dict(config.contenders):
        try:
            request = plan_request(config, device=device, optimizer=name)
            plan = planned(request, traced=False)
        except UserError:  # what cannot be planned is refused by what builds it, or trains
            continue
        lasting = plan.weights + plan.basis + plan.moments
        tensors = plan.peak if request.sizes.like_llama else lasting
        _compare(config, name, device, tensors * (sharing if device == "cpu" else 1), "the GPU" if device == "cuda" else "this machine")
        if device == "cuda":
            _compare(config, name, "cpu", request.sizes.parameters * request.itemsize * sharing, "the host, where the weights are made,")


def _compare(config: PretrainConfig, name: str, device: str, needed: int, where: str) -> None:
    free = memory_at_hand(device)
    if free is not None and needed > free:
        raise UserError(
            f"{name} on {config.model_name} needs {gb(needed)} GB by the plan, and {where} has {gb(free)} GB free: "
            f"`galore plan --model {shlex.quote(config.model_name)} --device {device} --memory {gb(free)}GB` names a run that fits, "
            "--force starts this one all the same"
        )
