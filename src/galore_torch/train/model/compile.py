"""--compile: torch.compile for the layers of a model, each on its own: gradients arrive layer by layer, as per-layer updates need."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from galore_torch.train.errors import UserError
from galore_torch.train.model.layers import layers_of

if TYPE_CHECKING:
    from torch import nn

_NEEDS = {"cpu": "a C++ compiler (install g++ or clang)", "cuda": "Triton (pip install triton)"}


def check_compiler(device: str) -> None:
    """UserError where torch.compile cannot write code for `device`."""
    from galore_torch.engine.inductor import has_compiler

    if not has_compiler(device):
        raise UserError(f"--compile needs {_NEEDS[device]}, which torch does not find here; install it, or leave --compile out")


def compiled_so_far() -> int:
    """How many programs this process has compiled: of steps, and of --compile's layers."""
    import sys

    from galore_torch.engine.inductor import programs

    dynamo = sys.modules.get("torch._dynamo.utils")
    return len(programs) + (dynamo.counters["stats"]["unique_graphs"] if dynamo else 0)


def compile_layers(model: nn.Module) -> None:
    """Compile each member of the longest list of modules in `model`, in place: all of them share one graph a shape and a mode.

    What surrounds them stays as it is: embedding, head, loss, recomputation of activations, hooks on gradients.
    """
    layers = layers_of(model)
    if not layers:
        raise UserError(f"--compile finds no list of layers in {type(model).__name__}; leave it out")
    # Dynamo asks every input for a gradient and hears this of those that have none.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in layers:
        layer.compile()
