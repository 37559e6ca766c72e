"""A checkpoint into an optimizer, exactly: checked as a whole before anything changes, and restored without a cast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.engine import step as engine
from galore_torch.engine.layout import AnyRule, Layout
from galore_torch.engine.sharding import place_of, unwrap
from galore_torch.engine.stored import state_cuts, state_spec, stored_moments
from galore_torch.ops.codecs import CODED
from galore_torch.optim.published_state import convert_published
from galore_torch.slots.torch_rule import BaseRule

COUNTERS = {"step", "index"}  # Python numbers beside the tensors of a parameter's state


class _Sealed:
    """A state tensor hidden from Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, value: Tensor):
        self.value = value


def whole_state(p: Tensor, state: dict[str, Any], group: Mapping[str, Any], rule: AnyRule) -> dict[str, Any]:
    """The state of one parameter as a checkpoint holds it: around what is cut as a DTensor is, DTensors that share its memory.

    What every process holds whole stays a plain tensor. Tools such as torch.distributed.checkpoint then save each part once.
    """
    place = place_of(p)
    if place is None or not state:
        return state
    cuts = state_cuts(engine.layout_of(p, group), group, rule)
    return {key: place.wrap(value, *cuts[key]) if key in cuts and cuts[key][1] else value for key, value in state.items()}


def seal(
    optimizer: torch.optim.Optimizer, rule: AnyRule, check_group: Callable[[Mapping[str, Any]], None], state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Check a checkpoint against the parameters and ``check_group``, and hide its tensors from torch's cast."""
    saved_groups, saved_state = state_dict["param_groups"], dict(state_dict["state"])
    sealed: dict[Any, Any] = {}
    groups = []
    strict = any(saved_state.values()) and all("index" in state for state in saved_state.values() if state)  # those of 2.0.0 are whole
    for number, (given, group) in enumerate(zip(saved_groups, optimizer.param_groups, strict=False)):
        saved = _by_name(given, group, number)
        # Keys the checkpoint does not know, such as one of galore-torch 1.0, stay as this optimizer has them; but before there was
        # batch_dims every tensor was one matrix.
        merged = {**{k: v for k, v in group.items() if k not in ("params", "param_names")}, "batch_dims": 0, **saved}
        groups.append(merged)
        check_group(merged)
        for index, p in zip(saved["params"], group["params"], strict=False):
            if index in saved_state:
                sealed[index] = _seal_one(optimizer, rule, index, saved_state.pop(index), p, merged)
            elif strict and p.requires_grad:
                raise ValueError(
                    f"the checkpoint has no state of parameter {index} (shape {tuple(p.shape)}), which is trained here: it is not a whole "
                    "checkpoint. Load one with the state of every parameter, or freeze this one first"
                )
    sealed.update(saved_state)
    return {**state_dict, "param_groups": groups if len(groups) == len(saved_groups) else saved_groups, "state": sealed}


def _by_name(saved: dict[str, Any], group: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A saved group in the order of this optimizer's names, where both have names."""
    theirs, ours = ([_bare(name) for name in each.get("param_names") or ()] for each in (saved, group))
    if not theirs or not ours or theirs == ours:
        return saved
    if different := sorted(set(theirs) ^ set(ours)):
        raise ValueError(
            f"the checkpoint's group {number} holds other parameters than this optimizer's: {len(different)} names are on one side only, "
            f"such as {different[:3]}. Make the groups as they were when it was saved"
        )
    where = dict(zip(theirs, saved["params"], strict=True))
    return {**saved, "params": [where[name] for name in ours], "param_names": list(group["param_names"])}


def _bare(name: str) -> str:
    """A name without what DistributedDataParallel and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _seal_one(
    optimizer: torch.optim.Optimizer, rule: AnyRule, index: Any, saved: dict[str, Any], p: Tensor, group: dict[str, Any]
) -> dict[str, Any]:
    layout = engine.layout_of(p, group)
    ours = whole_state(p, optimizer.state[p], group, rule) if place_of(p) else {}
    saved = _with_blocks(saved, layout, group, rule)
    saved = {key: unwrap(value, ours.get(key)) if isinstance(value, Tensor) else value for key, value in saved.items()}
    saved = convert_published(saved, layout, group, rule)
    if "turn" in saved:  # as this package called it before 2.0.0
        saved["index"] = saved.pop("turn")
    spec = state_spec(layout, group, rule)
    if not saved:
        return {}
    if saved.keys() - COUNTERS != spec.keys():
        raise ValueError(
            f"the checkpoint's state of parameter {index} (shape {tuple(p.shape)}) has {sorted(saved.keys() - COUNTERS)}, but "
            f"{type(optimizer).__name__} with this group needs {sorted(spec)}: load it into the optimizer class and groups that wrote it"
        )
    for key, tensor in spec.items():
        if saved[key].is_complex() != tensor.dtype.is_complex:
            raise ValueError(
                f"the checkpoint's {key} of parameter {index} is {saved[key].dtype}, but a parameter of {p.dtype} needs {tensor.dtype}: it "
                "belongs to another model"
            )
        if tuple(saved[key].shape) != tensor.shape:
            raise ValueError(
                f"the checkpoint's {key} of parameter {index} has shape {tuple(saved[key].shape)}, but a parameter of shape "
                f"{tuple(p.shape)} with rank={group['rank']} needs {tensor.shape}: it belongs to another model or rank"
            )
    if "step" not in saved:
        raise ValueError(f"the checkpoint's state of parameter {index} has no step: it is not a whole checkpoint")
    out: dict[str, Any] = {"step": int(saved["step"]), "index": int(saved.get("index", optimizer.state[p].get("index", 0)))}
    for key, tensor in spec.items():
        device = torch.device("cpu") if tensor.host else p.device
        # A copy of its own: nothing is shared with the checkpoint, and no view keeps a larger storage alive.
        out[key] = _Sealed(torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(saved[key]))
    return out


def _with_blocks(saved: Mapping[str, Any], layout: Layout, group: Mapping[str, Any], rule: AnyRule) -> dict[str, Any]:
    """A checkpoint's moments in codes, in the blocks of this world: how a matrix is cut decides how long they are."""
    out = dict(saved)
    if isinstance(rule, BaseRule):
        return out
    for stored, _ in stored_moments(layout.entire, group, rule):
        codes, scale = (saved.get(f"{stored.name}_{part}") for part in ("codes", "scale"))
        if stored.codec not in CODED or codes is None or scale is None or not stored.fits(codes):
            continue
        if tuple(scale.shape) != stored.spec()[f"{stored.name}_scale"].shape:
            out |= stored.in_own_blocks(unwrap(codes, None), unwrap(scale, None))
    return out


def unseal(optimizer: torch.optim.Optimizer) -> None:
    """The tensors that `seal` hid, after Optimizer.load_state_dict."""
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, _Sealed):
                entry[key] = value.value
