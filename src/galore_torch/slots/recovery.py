"""Slot 4: how does the update reach the weights? A table of `Recovery` rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from galore_torch.ops import linalg, write
from galore_torch.ops.codecs import TensorSpec
from galore_torch.ops.native import SIGNS
from galore_torch.ops.orthogonal import unit_steps
from galore_torch.ops.write import WeightUpdate

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What a recovery may look at.

    ``project_back(change, X)``: W <- decay_factor W - scale (X in full size) for an X of R's shape. ``axes``: the projected ones.
    ``shape``: the whole matrix, or the batch of them. ``low`` (R) and ``grad`` (G, of the weight's view) are there when the row reads
    them, else None. ``lr``: the step size that the update carries, with a late decay in it but for rows that remake the update.
    ``state``: the row's own. ``sign``: -1 where the group climbs, else 1. ``moments`` of this step, decoded when they are looked up and
    stored when they are set, are there when the row reads them. ``numbers``: the rule's. ``is_finite``: whether R is, a bool or 0-d on the
    device. ``total`` and ``along``: the sum over the processes that hold parts of the matrix (None where it is whole), and over those that
    share its projected axis. ``of_whole(f, X)``: f of the whole matrix, of which X is this process' part, as this process' part.
    """

    project_back: Callable[[WeightUpdate, Tensor], None]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    low: Tensor | None
    grad: Tensor | None
    lr: Any
    state: State
    sign: float = 1.0
    moments: MutableMapping[str, Tensor] = field(default_factory=dict)
    numbers: tuple[Any, ...] = ()
    is_finite: Tensor | bool = True
    total: Callable[[Tensor], Tensor] | None = None
    of_whole: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda function, part: function(part)
    along: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Recovery:
    """``apply(change, N, seen)`` makes the change of the weight with an update N that has R's shape and carries the learning rate.

    ``state_spec(view, axes, compute_dtype)``: the state of a parameter seen as ``view`` ((E x) m x n) whose ``axes`` are projected.
    ``reads``: which of "low" (R), "grad" (the full gradient) and "moments" it looks at. ``native``: whether it needs a rule of this
    package, whose step size it knows. ``one_sided``: whether one axis alone may be projected. ``only``: the one rule, and the one
    projector or None for any, that it is written for; ``about`` says in words what it is then. ``remakes``: whether it makes an update of
    its own, not of N's size. ``whole``: whether it looks at whole matrices: one that is not smaller than its rank still takes it, and the
    parts of one that processes share are skipped together. ``elementwise``: whether each element of the residual moves by itself, so that
    one that is not finite is left out alone. ``residual``: which of those of `ops.native.AdamStep` does the same in one pass; None: none.
    """

    apply: Callable[[WeightUpdate, Tensor, Seen], None]
    state_spec: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], dict[str, TensorSpec]]
    reads: frozenset[str] = frozenset()
    native: bool = False
    one_sided: bool = False
    only: tuple[str, str | None] | None = None
    about: str = ""
    remakes: bool = False
    whole: bool = False
    elementwise: bool = False
    residual: int | None = None


def stateless(view: tuple[int, ...], axes: tuple[int, ...], compute_dtype: torch.dtype) -> dict[str, TensorSpec]:
    return {}


def project_back(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale (N in full size) (GaLore, arXiv 2403.03507, Alg. 2)."""
    seen.project_back(change, N)


# --- what several rows do -------------------------------------------------------------------------------------------------

BOTH = (-2, -1)
GROWTH = 1.01  # the most the norm may grow from step to step (Fira, section 4.3; APOLLO, section 4; Alice, Alg. 4)
NOISE = 1e-4  # a residual that is shorter than this share of the update is one of rounding errors


def one_norm(key: str, view: tuple[int, ...], axes: tuple[int, ...], compute_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The norm of each matrix at the last step; 0 before the first."""
    return {key: TensorSpec(view[:-2], compute_dtype)}


def residual_of(seen: Seen) -> Tensor:
    """G - P R, what the subspace leaves: (m, n), a new tensor."""
    assert seen.low is not None
    assert seen.grad is not None
    residual = seen.grad.to(seen.low.dtype, copy=True)
    seen.project_back(WeightUpdate(residual), seen.low)
    return residual


def norm_of(tensor: Tensor, seen: Seen, axes: tuple[int, ...]) -> Tensor:
    """The 2-norm over ``axes``, which stay with a length of 1; over both, that of the whole matrix, on whatever processes its parts are."""
    length = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
    return length if len(axes) == 1 or seen.total is None else seen.total(length.square()).sqrt()


def scale_as_rule(full: Tensor, N: Tensor, seen: Seen, axes: tuple[int, ...]) -> None:
    """full <- phi full, in place: phi = ||N|| / ||R|| over ``axes`` says how much the rule scaled there; 0 where R says nothing."""
    assert seen.low is not None
    length = norm_of(seen.low, seen, axes)
    full.mul_(torch.where(length > 0, norm_of(N, seen, axes) / length, 0.0))


def limit_growth(full: Tensor, seen: Seen, key: str, least: Tensor | float = 0.0) -> None:
    """full <- sign full, in place, at most 1 % longer than at the last step; zero where it is not finite. It carries the step size.

    What is not longer than ``least`` (in the size of ``full``) is left out, and is not the last step.
    """
    last = seen.state[key]
    length = norm_of(full, seen, BOTH)[..., 0, 0]
    norm = length / seen.lr
    counts = norm.isfinite() & (length > least) & seen.is_finite  # no step is 0 long but one that was skipped
    shortened = torch.where((last > 0) & (norm > GROWTH * last), GROWTH * last / norm, 1.0)
    last.copy_(torch.where(counts, norm * shortened, last))
    factor = torch.where(counts, shortened, 0.0)
    full.nan_to_num_(0.0, 0.0, 0.0).mul_(seen.sign * factor[..., None, None])


def take(change: WeightUpdate, full: Tensor, scale: Any) -> None:
    """W <- decay_factor W - scale full, a few rows at a time; ``full`` is used up."""
    write.subtract_parts(replace(change, scale=scale), full, lambda full, rows: full[rows])


def add_both(change: WeightUpdate, full: Tensor, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale P N - full; ``full`` is used up."""
    seen.project_back(WeightUpdate(full, scale=-change.scale), N)
    take(change, full, 1.0)


# --- the rows -------------------------------------------------------------------------------------------------------------


def fira(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale P N - lr S, with the residual S = phi (G - P R) (Fira, arXiv 2410.01623, Alg. 1).

    phi_j = ||psi(R)_j|| / ||R_j|| for column j (for row j, where the basis is on the right): how the rule scaled that column. N is
    lr psi(R), so lr phi comes from N. S may grow by 1 % a step, else it is shortened to that. A residual that is not finite is left out.
    So is one of rounding errors alone, as in a step of fewer samples than the rank: nothing would grow from it.
    """
    residual = residual_of(seen)  # (m, n): G - P R
    scale_as_rule(residual, N, seen, seen.axes)  # lr S
    limit_growth(residual, seen, "residual_norm", NOISE * norm_of(N, seen, BOTH)[..., 0, 0])
    add_both(change, residual, N, seen)


def apollo(change: WeightUpdate, N: Tensor, seen: Seen, axes: tuple[int, ...] | None = None) -> None:
    """W <- decay_factor W - scale lr S, with S = phi G (APOLLO, arXiv 2412.05270, Alg. 1).

    phi_j = ||psi(R)_j|| / ||R_j|| for column j (row j, where the projection is on the right); over ``axes`` of the whole matrix one phi, as
    APOLLO-Mini. The subspace serves to measure phi alone. S may grow by 1 % a step, else it is shortened to that.
    """
    assert seen.low is not None
    assert seen.grad is not None
    full = seen.grad.to(seen.low.dtype, copy=True)
    scale_as_rule(full, N, seen, axes or seen.axes)  # lr S
    limit_growth(full, seen, "update_norm")
    take(change, full, change.scale)


def signs(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale P N - lr sign(G - P R) (FRUGAL, arXiv 2411.07837, Alg. 1, with signSGD for what keeps no state).

    With rows for a subspace those in turn have Adam, and all others the sign of their gradient. Of what is not finite in R nothing moves;
    beside the rows it is left out, element by element: a sign says nothing of its neighbours.
    """
    residual = residual_of(seen).nan_to_num_(0.0, 0.0, 0.0).sign_()
    residual.mul_(torch.as_tensor(seen.is_finite, device=residual.device)).mul_(seen.lr * seen.sign)
    add_both(change, residual, N, seen)


def unit_rms(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale P N - lr S / rms(S), with S = G - P R: as `signs`, with the gradient itself, of a sign's size."""
    residual = residual_of(seen)
    norm = norm_of(residual, seen, BOTH)
    factor = math.sqrt(math.prod(seen.shape[-2:])) / norm * seen.lr * seen.sign
    residual.nan_to_num_(0.0, 0.0, 0.0).mul_(torch.where(norm.isfinite() & (norm > 0) & seen.is_finite, factor, 0.0))
    add_both(change, residual, N, seen)


COMPENSATION = 0.4  # alpha_c of Alice's 60M to 350M runs (arXiv 2502.07752, table 11)


def alice_spec(view: tuple[int, ...], axes: tuple[int, ...], compute_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The norm of the last residual, and one average of squares for each column (row, where the basis is on the right)."""
    (axis,) = axes
    squares = TensorSpec((*view[:-2], view[-3 - axis]), compute_dtype)
    return {"residual_sq": squares, **one_norm("residual_norm", view, axes, compute_dtype)}


def alice(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale (P N + lr alpha_c C), with C = sqrt(m - r) (G - P R) p^(-1/2) (Alice, arXiv 2502.07752, Alg. 3 and 4).

    p (n) averages, at the rate of the first moment, what the subspace leaves of each column's energy; m and r are the side that is
    projected and its rank. C may grow by 1 % a step, else it is shortened to that. A residual that is not finite is left out.
    """
    assert seen.low is not None
    (axis,) = seen.axes
    residual = residual_of(seen)
    energy = seen.along(torch.linalg.vector_norm(residual, dim=axis).square())  # 1^T G^2 - 1^T (P^T G)^2, for P is orthonormal
    p = seen.state["residual_sq"]
    moved = torch.lerp(p, energy, seen.numbers[1])  # 1 - beta1
    p.copy_(torch.where(moved.isfinite().all(-1, keepdim=True) & seen.is_finite, moved, p))
    left = math.sqrt(seen.shape[axis] - seen.low.shape[axis])
    residual.mul_(left * seen.lr * p.clamp_min(torch.finfo(p.dtype).tiny).rsqrt().unsqueeze(axis))  # lr C
    limit_growth(residual, seen, "residual_norm")
    add_both(change, residual.mul_(change.scale * COMPENSATION), N, seen)


# --- of block means alone -------------------------------------------------------------------------------------------------


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


def fold(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale lr (E m + S) / (sqrt(E v) + eps), with S = G - E R: FOAM's step with one denominator a block.

    As `foam`, but v averages the mean square of the block, not the square of its mean: a block's elements share it, so it must not be small
    where their mean happens to be. The rule has added R^2; what the mean square has more, the mean of S^2, is added here.
    """
    if seen.is_finite is False:
        seen.project_back(change, N)  # N = 0: only the decay
        return
    lr, _, new2, eps = seen.numbers
    S, v, m = residual_of(seen), seen.moments["exp_avg_sq"], seen.moments["exp_avg"]
    blocks = S.unflatten(-1, (m.shape[-1], -1)).unflatten(-3, (m.shape[-2], -1))  # (..., r, tall, c, wide)
    spread = torch.linalg.vector_norm(blocks, dim=(-3, -1)).square() / (blocks.shape[-3] * blocks.shape[-1])
    if seen.is_finite is not True:
        holds = torch.as_tensor(seen.is_finite, device=S.device)
        spread = torch.where(holds, spread, 0.0)
        S.nan_to_num_(0.0, 0.0, 0.0).mul_(holds)
        lr = torch.where(holds, lr, 0.0)
    v = v + spread * new2
    seen.moments["exp_avg_sq"] = v
    seen.project_back(WeightUpdate(S.mul_(seen.sign), scale=-1.0), m)  # + E m
    blocks.mul_((lr / v.sqrt().add_(eps))[..., :, None, :, None])
    take(change, S, change.scale)


# --- Muon -----------------------------------------------------------------------------------------------------------------


def orthogonal(change: WeightUpdate, N: Tensor, seen: Seen) -> None:
    """W <- decay_factor W - scale lr sqrt(max(m, n)) NS5(P N / lr + (G - P R)): Muon (Jordan et al., 2024) on the momentum of the subspace
    and on the gradient outside of it.

    N / lr = R + mu M is the rule's update. Without a projection P is the identity. Of a gradient that is not finite nothing but the decay
    is left. NS5: `ops.orthogonal`.
    """
    assert seen.low is not None
    assert seen.grad is not None
    if seen.is_finite is False:
        seen.project_back(change, N)  # N = 0
        return
    lr = torch.as_tensor(seen.lr, dtype=N.dtype, device=N.device)
    inside = N.div_(torch.where(lr == 0, 1.0, lr)).sub_(seen.low, alpha=seen.sign)
    X = seen.grad.to(N.dtype, copy=True).mul_(seen.sign)
    seen.project_back(WeightUpdate(X, scale=-1.0), inside)  # (m, n): G + P (N / lr - R)
    update = seen.of_whole(unit_steps, X)
    is_finite = linalg.all_finite(update) & seen.is_finite  # what is not finite may be outside of the subspace
    if is_finite is not True:
        update = torch.where(torch.as_tensor(is_finite, device=update.device), update, 0.0)
    take(change, update, change.scale * seen.lr)


WHOLE = frozenset({"low", "grad"})
_MEANS: dict[str, Any] = {"only": ("adam", "block_mean"), "about": "Adam's step with the residual of block means", "remakes": True}

RECOVERIES = {
    "project_back": Recovery(project_back, stateless, residual=0),
    "fira": Recovery(fira, partial(one_norm, "residual_norm"), WHOLE, native=True, one_sided=True),
    "apollo": Recovery(apollo, partial(one_norm, "update_norm"), WHOLE, native=True, one_sided=True),
    "apollo_mini": Recovery(partial(apollo, axes=BOTH), partial(one_norm, "update_norm"), WHOLE, native=True),
    "sign": Recovery(signs, stateless, WHOLE, native=True, elementwise=True, residual=SIGNS),
    "rms": Recovery(unit_rms, stateless, WHOLE, native=True),
    "alice": Recovery(
        alice, alice_spec, WHOLE, native=True, one_sided=True, only=("adam", None), about="Adam's step with a residual over its energies"
    ),
    "foam": Recovery(foam, stateless, WHOLE | {"moments"}, native=True, residual=1, **_MEANS),
    "fold": Recovery(fold, stateless, WHOLE | {"moments"}, native=True, residual=2, **_MEANS),
    "orthogonal": Recovery(orthogonal, stateless, WHOLE, native=True, one_sided=True, remakes=True, whole=True),
}
