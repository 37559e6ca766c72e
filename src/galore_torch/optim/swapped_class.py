"""A module with another forward pass, by way of its class: what a compiler sees is a class and tensors, alike for all layers of a kind."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

PREFIX = "_direct_"  # of attributes that a plain module does not have


class SwappedClass(nn.Module):
    """Goes before the class that a module had, which is ``_plain``. Copied or pickled, the module is the plain one."""

    _plain: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _new, (self._plain,), {key: value for key, value in state.items() if not key.startswith(PREFIX)}


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


@cache
def _swapped(kind: Any, first: Any) -> Any:
    return type(kind.__name__, (first, kind), {"_plain": kind, "__module__": kind.__module__, "__doc__": kind.__doc__})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had."""
    return module._plain if isinstance(module, SwappedClass) else type(module)


def swap_class(module: nn.Module, first: type[SwappedClass], **attributes: Any) -> None:
    """Put ``first`` before the module's class, and its attributes, named with `PREFIX`, into the module."""
    kind: Any = type(module)
    above: Any = first
    module.__class__ = _swapped(kind, above)
    vars(module).update({PREFIX + key: value for key, value in attributes.items()})


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`; nothing where it was not called, nor where the class was changed again, as by a parametrization."""
    if "_plain" in vars(type(module)):
        module.__class__ = module._plain  # type: ignore[assignment]
        for key in [key for key in vars(module) if key.startswith(PREFIX)]:
            del vars(module)[key]
