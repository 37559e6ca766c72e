"""Slot 4: how does the update reach the weights? A table of `Recovery` rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops import write
from galore_torch.ops.codecs import TensorSpec
from galore_torch.ops.write import WeightUpdate

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What a recovery may look at.

    ``project_back(change, X)``: W <- decay_factor W - scale (X in full size) for an X of R's shape. ``axes``: the projected ones.
    ``low`` (R) and ``grad`` (G, of the weight's view) are there when the row reads them, else None. ``lr``: the step size that the update
    carries. ``state``: the row's own state. ``sign``: -1 where the group climbs, else 1. ``moments`` of this step, decoded when they are
    looked up, and ``numbers`` of the rule are there when the row reads "moments". ``is_finite``: whether R is, a bool or 0-d on the device.
    ``total``: the sum over the processes that hold parts of the matrix; None where it is whole.
    """

    project_back: Callable[[WeightUpdate, Tensor], None]
    axes: tuple[int, ...]
    low: Tensor | None
    grad: Tensor | None
    lr: Any
    state: State
    sign: float = 1.0
    moments: State = field(default_factory=dict)
    numbers: tuple[Any, ...] = ()
    is_finite: Tensor | bool = True
    total: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Recovery:
    """``apply(change, N, seen)`` makes the change of the weight with an update N that has R's shape and carries the learning rate.

    ``state_spec(batch, compute_dtype)``: the state of a parameter that is a batch of matrices, () where it is one.
    ``reads``: which of "low" (R), "grad" (the full gradient) and "moments" it looks at. ``native``: whether it needs a rule of this
    package, whose step size it knows. ``one_sided``: whether one axis alone may be projected. ``only``: the one rule and projector that
    it is written for, or None.
    """

    apply: Callable[[WeightUpdate, Tensor, Seen], None]
    state_spec: Callable[[tuple[int, ...], torch.dtype], dict[str, TensorSpec]]
    reads: frozenset[str] = frozenset()
    native: bool = False
    one_sided: bool = False
    only: tuple[str, str] | None = None


def stateless(batch: tuple[int, ...], compute_dtype: torch.dtype) -> dict[str, TensorSpec]:
    return {}


def project_back(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale P N (GaLore, arXiv 2403.03507, Alg. 2)."""
    seen.project_back(change, N)


GROWTH = 1.01  # the most the residual's norm may grow from step to step (Fira, section 4.3)


def residual_norm(batch: tuple[int, ...], compute_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The norm of each matrix's last residual; 0 before the first."""
    return {"residual_norm": TensorSpec(batch, compute_dtype)}


def fira(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale P N - lr S, with the residual S = phi (G - P R) (Fira, arXiv 2410.01623, Alg. 1).

    phi_j = ||psi(R)_j|| / ||R_j|| for column j (for row j, where the basis is on the right): how the rule scaled that column. N is
    lr psi(R), so lr phi comes from N. S may grow by 1 % a step, else it is shortened to that. A residual that is not finite is left out.
    """
    assert seen.low is not None
    assert seen.grad is not None
    dtype = seen.low.dtype
    residual = seen.grad.to(dtype, copy=True)
    seen.project_back(WeightUpdate(residual), seen.low)  # (m, n): G - P R
    (axis,) = seen.axes
    lengths = torch.linalg.vector_norm(seen.low, dim=axis, keepdim=True)  # (1, n), or (m, 1)
    residual.mul_(torch.linalg.vector_norm(N, dim=axis, keepdim=True) / lengths.clamp_min(torch.finfo(dtype).tiny))  # lr S
    length, last = torch.linalg.vector_norm(residual, dim=(-2, -1)), seen.state["residual_norm"]
    norm = (length if seen.total is None else seen.total(length.square()).sqrt()) / seen.lr
    counts = norm.isfinite() & (norm > 0)  # no step is 0 long but one that was skipped
    shortened = torch.where((last > 0) & (norm > GROWTH * last), GROWTH * last / norm, 1.0)
    factor = torch.where(counts, shortened, 0.0)
    last.copy_(torch.where(counts, norm * shortened, last))
    residual.nan_to_num_(0.0, 0.0, 0.0).mul_(seen.sign * factor[..., None, None])
    seen.project_back(WeightUpdate(residual, scale=-change.scale), N)  # + scale P N
    change.subtract(change.weight, residual, 1.0, change.decay_factor, change.seed)


def foam(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale lr (E m + S) / (sqrt(E v + S^2) + eps), with the residual S = G - E R (FOAM, arXiv 2512.07112).

    R is the mean of each block, m and v are Adam's moments of it, and E gives each element the value of its block. lr carries the bias
    corrections. N is not used: what Adam would do to the means alone. A gradient that is not finite moves nothing.
    """
    assert seen.low is not None
    assert seen.grad is not None
    if seen.is_finite is False:
        seen.project_back(change, N)  # N = 0: only the decay
        return
    lr, _, _, eps = seen.numbers
    shape = change.weight.shape[-2:]

    def update(tensors: tuple[Tensor, ...], rows: slice) -> Tensor:
        grad, *low = tensors
        R, m, v = (write.spread(each, shape, rows) for each in low)
        S = grad[rows].to(R.dtype).sub(R).mul_(seen.sign)
        denominator = v.addcmul_(S, S).sqrt_().add_(eps)
        found = S.add_(m).div_(denominator).mul_(lr)
        return found if seen.is_finite is True else torch.where(torch.as_tensor(seen.is_finite, device=found.device), found, 0.0)

    write.subtract_parts(change, (seen.grad, seen.low, seen.moments["exp_avg"], seen.moments["exp_avg_sq"]), update)


RECOVERIES = {
    "project_back": Recovery(project_back, stateless),
    "fira": Recovery(fira, residual_norm, frozenset({"low", "grad"}), native=True, one_sided=True),
    "foam": Recovery(foam, stateless, frozenset({"low", "grad", "moments"}), native=True, only=("adam", "block_mean")),
}
