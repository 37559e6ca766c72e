"""`join()`: a process that has run out of batches goes through the others' backward passes without gradients of its own.

torch's context shadows what the wrapper says to the other processes. What we say depends on which bases are due, so in each pass the
processes that have a batch tell the others how far they are; and at the end the last of them hands weights and state to all, for the
others have missed its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from galore_torch.engine.processes import Processes
from galore_torch.ops import write
from galore_torch.optim.base import LowRankOptimizer


def agree(optimizer: LowRankOptimizer, weights: Sequence[Tensor], begins: Sequence[bool], processes: Processes, away: bool) -> list[bool]:
    """Whether each weight's gradient of this pass begins a step, as the processes that are not ``away`` know, and say by ``begins``.

    One that is away counts the weight's steps as they do.
    """
    views = [optimizer.view_of(p) for p in weights]
    steps = [-1 if away else view.state["step"] for view in views]
    goes_on = [not away and not first for first in begins]
    facts = torch.tensor([steps, goes_on], dtype=torch.float64, device=weights[0].device)
    steps, goes_on = (row.tolist() for row in processes.largest(facts))
    for view, step in zip(views, steps, strict=True):
        view.state["step"] = int(step)
    return [not more for more in goes_on]


def hand_on(optimizer: LowRankOptimizer, weights: Iterable[Tensor], processes: Processes, source: int) -> None:
    """Give all processes the ``source`` process's weights, of those that the wrapper leaves to us, and the whole of its optimizer state."""
    for p in weights:
        processes.from_one(write.storages(p), source)
        write.mark_written(p)
    for p, state in optimizer.state.items():
        held = [value for value in state.values() if isinstance(value, Tensor)]
        processes.from_one(held, source, p.device)
        keys = [key for key, value in state.items() if isinstance(value, int | float)]
        numbers = torch.tensor([state[key] for key in keys], dtype=torch.float64, device=p.device)
        processes.from_one([numbers], source)
        state.update({key: type(state[key])(number) for key, number in zip(keys, numbers.tolist(), strict=True)})
