"""Ops: the steps of `ops.native` on a GPU, in Triton, which is imported when the first of them is asked for."""

from __future__ import annotations

from typing import Any

import torch

from galore_torch.ops.native import OnePass, warn_of

_without: set[str] = set()  # steps that Triton could not build


def in_triton(step: str) -> OnePass:
    """A step of `ops.triton_steps` by its name: it returns None where there is no Triton. A build that fails warns, once."""

    def take(*arguments: Any) -> bool | None:
        if step in _without:
            return None
        try:
            from galore_torch.ops import triton_steps

            done: bool | None = getattr(triton_steps, step)(*arguments)
            return done
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # whatever a compiler may complain of: it has run nothing
            _without.add(step)
            if not isinstance(failure, ModuleNotFoundError):
                warn_of(f"the Triton kernel of {step}", failure)
            return None

    return take
