"""Of direct backward passes: what one has made so far, whether it names a weight, when it ends, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from galore_torch.ops.outer import OuterProduct

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Pass:
    """What one backward pass has made of R so far."""

    step: int
    terms: list[OuterProduct] = field(default_factory=list)  # the factors whose basis is due
    reduced: bool = False  # whether a part has been made in the basis as it is
    low: Tensor | None = None  # that part, where the pass does not add it up in the probe


def end_pass(passes: dict[int, Pass], number: int | None = None) -> Pass:
    """What a pass has made, by default the one under way: it is taken out, with those of other steps, which have failed."""
    this = passes.pop(torch._C._current_graph_task_id() if number is None else number, Pass(-1))
    for other in [other for other, found in passes.items() if found.step != this.step]:
        del passes[other]
    return this


def changed_basis(name: str) -> RuntimeError:
    """What a backward pass raises whose basis is not that of its forward pass."""
    return RuntimeError(
        f"the basis of layer {name} has changed between its forward and its backward pass: call backward() before "
        "optimizer.load_state_dict(), zero_grad() and another backward pass of the same step that refreshes it"
    )


class Named(Protocol):
    """A weight whose gradient is not made, and whether its hooks have been spoken of."""

    name: str
    weight: Tensor
    has_warned: bool


def in_graph(layer: Named) -> Tensor:
    """The weight with its place in the graph, where `backward(inputs=[weight])` looks for it; without it where it has hooks.

    In the graph it gets no gradient, and yet its hooks would be called. Hooks that are not this package's are warned of, once.
    """
    weight: Any = layer.weight
    hooks = [*(weight._backward_hooks or {}).values(), *(weight._post_accumulate_grad_hooks or {}).values()]
    if len(hooks) == 1:  # the attachment's
        return cast(Tensor, weight)
    if not layer.has_warned and any(not str(hook.__module__).startswith("galore_torch.") for hook in hooks):
        layer.has_warned = True
        warnings.warn(
            f"{layer.name} has hooks on its gradient: they do not fire, for it is not made, and backward(inputs=[...]) does not find the "
            "weight. Remove the hooks, or use mode='project' or 'update'",
            stacklevel=2,
        )
    return cast(Tensor, weight.detach())


def is_named(weight: Tensor) -> bool:
    """Whether the backward pass under way, which leaves out the weight's probe, is one of `backward(inputs=[weight, ...])`."""
    if not weight.requires_grad:
        return False
    torch_C: Any = torch._C
    with torch_C._ForceDispatchKeyGuard(torch_C._dispatch_tls_local_include_set(), torch_C.DispatchKeySet.from_raw_repr(0)):
        node = get_gradient_edge(weight).node  # asked with autograd on, which custom operators turn off
    return runs(node)


def runs(node: Any) -> bool:
    """Whether the backward pass under way comes to a leaf, to add to its gradient. `torch.autograd.grad` does not."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what torch says of a leaf that is asked for by `torch.autograd.grad`
        return False


def at_end(call: Callable[[], None]) -> None:
    """Call it when the backward pass under way ends."""
    engine_of_autograd: Any = torch.autograd.Variable._execution_engine
    engine_of_autograd.queue_callback(call)


def differentiable_once(backward: F) -> F:
    """torch's `once_differentiable`, with an error that names the layer and the cure."""

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled() or not any(grad.requires_grad for grad in grads):
            return made
        text = (
            f"cannot differentiate twice through {ctx.layer.name}, whose gradient is made in its own backward pass: for second derivatives "
            "use fused_backward(mode='project') or 'update'"
        )
        refuse: Any = torch._C._functions.DelayedError(text, len(made))
        return refuse(*(None if each is None else each.detach().requires_grad_() for each in made))

    return cast(F, call)
