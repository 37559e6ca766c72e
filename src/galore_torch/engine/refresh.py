"""When a basis is due, how it is found, and how the moments cross the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine.fused import only_if
from galore_torch.engine.layout import AnyRule, Layout, state_spec, stored_bases, stored_moments
from galore_torch.ops.codecs import StoredTensor
from galore_torch.ops.linalg import finite, readable, usable
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.rules import Moment, Rule
from galore_torch.slots.transport import TRANSPORTS

State = dict[str, Any]
Group = Mapping[str, Any]
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many there are
STREAMS = 1 << 20  # random streams a step: the step counts them up from the first, a refresh takes the last 64


def refresh_is_due(state: State, group: Group) -> bool:
    """Whether this step refreshes the basis: once in every gap, and whenever there is none that a usable gradient made.

    Parameters take turns over the gap, spread by the golden ratio, so that no step carries all refreshes; only the first
    does. ``projector="svd"`` keeps the published schedule, where all refresh at steps 0, T, 2T, ... With ``gap_range`` the
    length of the gap, and the step where it began, are state of the parameter.
    """
    if not state["basis_ready"]:
        return True
    if group["gap_range"] is not None:
        return bool(state["step"] - state["gap_start"] >= state["gap"])
    return (state["step"] - _shift(state, group)) % group["update_proj_gap"] == 0


def _shift(state: State, group: Group) -> int:
    """The step of the first gap on which this parameter's turn comes."""
    return 0 if group["projector"] == "svd" else int(group["update_proj_gap"] * (state["index"] * GOLDEN % 1.0))


def refresh(grad_MN: Tensor, state: State, layout: Layout, group: Group, rule: AnyRule) -> None:
    """New bases from this gradient, moments carried over; nothing changes, on the device, when the gradient is not usable."""
    assert layout.rank is not None
    is_finite: Tensor | bool = usable(grad_MN)
    if readable(grad_MN):
        is_finite = bool(is_finite)
        if not is_finite:
            state["basis_ready"].fill_(False)
            return
    else:
        grad_MN = torch.where(torch.as_tensor(is_finite), grad_MN, 0.0)  # a decomposition must not meet NaN
    stored_in = stored_bases(layout, group["basis_codec"])
    ready = bool(state["basis_ready"])
    previous = {mode: stored.decode(state) if ready else None for mode, stored in stored_in.items()}
    seed = state["step"] if ready else 0  # the first basis does not depend on how long its gradient was awaited
    found = PROJECTORS[group["projector"]](grad_MN.to(layout.compute_dtype), layout.rank, previous, seed)
    for basis in found.values():  # a decomposition of a usable gradient may still overflow: the old basis is the better one
        is_finite = is_finite & finite(basis)
    if readable(grad_MN):
        is_finite = bool(is_finite)
        if not is_finite:
            state["basis_ready"].fill_(False)
            return
    with only_if(is_finite, [state[key] for key, spec in state_spec(layout, group, rule).items() if key in state and not spec.host]):
        C = {}
        for mode, stored in stored_in.items():
            C[mode] = found[mode].mT @ stored.decode(state)  # (r, m) @ (m, r)
            stored.encode(state, found[mode], None)
        if state["step"] and group["transport"] != "keep":
            seed = state["step"] * STREAMS + STREAMS - 64
            for i, (moment_stored, moment) in enumerate(_moments(layout, group, rule)):
                value = moment_stored.decode(state)
                moved = TRANSPORTS[group["transport"]](C, value, moment.kind, moment.mean_over)
                moment_stored.encode(state, moved, seed + i)
    if group["gap_range"] is not None:
        if ready:
            gap = adapted_gap(C, int(state["gap"]), group["gap_range"], group["overlap_range"])
            state["gap"].copy_(
                torch.where(torch.as_tensor(is_finite, device=gap.device), gap, state["gap"].to(gap.device)), non_blocking=True
            )
        state["gap_start"].fill_(state["step"] + (0 if ready else (_shift(state, group) or state["gap"]) - state["gap"]))
    state["basis_ready"].copy_(torch.as_tensor(is_finite, device=grad_MN.device), non_blocking=True)


def adapted_gap(C: Mapping[int, Tensor], gap: int, gap_range: Sequence[int], overlap_range: Sequence[float]) -> Tensor:
    """Steps to the next refresh, a 0-d int64 on the device of C = new basis^T old basis (r x r), one for each projected mode.

    The overlap ||C||_F^2 / r, the share of the old subspace that the new one kept (the mean over modes), doubles the gap from the
    upper end of ``overlap_range`` on and halves it below the lower end. It is blind to signs and to rotations within the
    subspace, which Q-GaLore's cosine of one singular vector (arXiv 2407.08296, section 3.2) is not.
    """
    overlap = torch.stack([matrix.square().sum() / matrix.shape[-1] for matrix in C.values()]).mean()
    low, high = overlap_range
    longer, shorter = min(2 * gap, gap_range[1]), max(gap // 2, gap_range[0])
    return torch.where(overlap >= high, longer, torch.where(overlap < low, shorter, gap))


def _moments(layout: Layout, group: Group, rule: AnyRule) -> Sequence[tuple[StoredTensor, Moment]]:
    if isinstance(rule, Rule):
        return stored_moments(layout, group, rule)
    moments = rule.moments(layout.low_shape, group).items()
    return [
        (StoredTensor(key, layout.low_shape, compute_dtype=layout.compute_dtype), moment)
        for key, moment in moments
        if moment.kind != "other"
    ]
