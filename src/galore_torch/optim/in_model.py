"""Where a model has its parameters, and whether it still has those that an optimizer trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from galore_torch.engine.sharding import place_of


def places_of(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """parameter -> the name and the module of every place it has in the model."""
    places: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(p, []).append((f"{prefix}.{name}" if prefix else name, module))
    return places


class Held:
    """Some parameters of a model, and one place where it has each. Shards are left out: FSDP2 exchanges them for the time of a pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._first: list[tuple[Tensor, str, weakref.ref[nn.Module]]] = []

    def add(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        """More of them."""
        places = places_of(model)
        self._first += [(p, places[p][0][0], weakref.ref(places[p][0][1])) for p in params if place_of(p) is None]

    def check(self) -> None:
        """Raise ValueError where another parameter has come into the place of one: no gradient reaches that one any more.

        One that was taken out of the model, or has another place there, is as it was meant.
        """
        for p, name, owner in self._first:
            module = owner()
            held = None if module is None else module._parameters.get(name.rpartition(".")[2])
            if held is None or held is p:
                continue
            model = self._model()
            if model is not None and not any(p is other for other in model.parameters()):
                raise ValueError(
                    f"{name} is another parameter now than the one that the optimizer trains, so a step would not train it and not say so: "
                    "fully_shard, load_state_dict(assign=True), to_empty() and the like exchange parameters. Call them first, then make "
                    "the optimizer, then call fused_backward"
                )
