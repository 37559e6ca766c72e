"""The contenders of the frontier: how each trains the matrices, and where the search for its learning rate begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contest import Task
from peers import PEERS, load
from stateless import Stateless, scale, sinkgd
from torch import nn

from galore_torch import GaLoreAdamW, GaLoreAdamW8bit, GaLoreMuon, galore_param_groups, low_rank_optimizer
from galore_torch.optim.methods import METHODS as FAMILY

BASE_TOKENS = 1024  # the batch that beta2 0.999 stands for; others have the same half-life in tokens (arXiv 2507.07101)
LLAMA_FACTORS = {"q_proj|k_proj": 0.5, "down_proj": 2.0}
Build = Callable[[nn.Module, Task, float], torch.optim.Optimizer]  # (model, task, lr): an optimizer of the matrices alone


@dataclass(frozen=True)
class Method:
    """`ours`: whether it is of this package's family. `start`: a rate of the grid."""

    label: str
    build: Build
    start: float
    ours: bool = True


def beta2(task: Task, value: float = 0.999) -> float:
    return float(value ** (task.batch * task.length / BASE_TOKENS))


def groups(model: nn.Module, rank: int | str, factors: Mapping[str, float] | None = None, **keys: Any) -> list[dict[str, Any]]:
    """Those of the matrices of attention and MLP."""
    return [group for group in galore_param_groups(model, rank, rank_factors=factors, **keys) if "rank" in group]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in groups(model, "full")[0]["params"]]


def full(cls: Callable[..., Any], adam: bool = True, second: float = 0.999, **settings: Any) -> Build:
    """`second`: Adam's beta2 at `BASE_TOKENS`."""

    def build(model: nn.Module, task: Task, lr: float) -> torch.optim.Optimizer:
        own = {"betas": (0.9, beta2(task, second))} if adam else {}
        optimizer: torch.optim.Optimizer = cls(matrices(model), lr=lr, **own, **{"weight_decay": 0.0, **settings})
        return optimizer

    return build


def low_rank(cls: Callable[..., Any], share: float, factors: Mapping[str, float] | None = None, **keys: Any) -> Build:
    """`share` of n/4, which is the task's rank."""

    def build(model: nn.Module, task: Task, lr: float) -> torch.optim.Optimizer:
        gap = {} if keys.get("projector") == "block_mean" else {"update_proj_gap": task.gap}
        own = groups(model, round(share * task.rank), factors, scale=task.scale, **gap)
        optimizer: torch.optim.Optimizer = cls(own, lr=lr, betas=(0.9, beta2(task)), **keys)
        return optimizer

    return build


def muon(rank: float | str, gap: int | None = None, **keys: Any) -> Build:
    def build(model: nn.Module, task: Task, lr: float) -> torch.optim.Optimizer:
        own = {} if gap is None else {"update_proj_gap": gap}
        return GaLoreMuon(groups(model, rank if isinstance(rank, str) else round(rank * task.rank), **own), lr=lr, **keys)

    return build


def named(name: str, share: float = 1.0, **settings: Any) -> Build:
    """One of the family by name, with the task's gap in place of its paper's, which is for longer runs; `share` of n/4 as its rank."""

    def build(model: nn.Module, task: Task, lr: float) -> torch.optim.Optimizer:
        method = FAMILY[name]
        gap = {"update_proj_gap": task.gap} if method.settings.get("update_proj_gap", 1) > 1 else {}
        first, second = method.settings.get("betas", (0.9, 0.999))
        late = {"random_after": task.steps // 2} if method.needs else {}
        own = {"betas": (first, beta2(task, second)), **gap, **late, **settings}
        return low_rank_optimizer(groups(model, method.rank or round(share * task.rank)), name, lr=lr, **own)

    return build


def published(model: nn.Module, task: Task, lr: float) -> torch.optim.Optimizer:
    own = groups(model, task.rank, update_proj_gap=task.gap, scale=task.scale)
    return PEERS["galore-torch 1.0 AdamW"].build([{**group, "params": [p for _, p in group["params"]]} for group in own], lr)


def adamw4bit(params: Any, **settings: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = load("torchao", "torchao.optim").AdamW4bit(params, **settings)
    return optimizer


def _stateless(direction: Any, relative: bool = False) -> Build:
    return lambda model, task, lr: Stateless(matrices(model), lr, direction, relative)


Q = {"state_codec": "int8", "basis_codec": "int4"}
# Moments of the small task's rank n/8 have 2,048 elements, below the usual bound, and a wider model's have not.
HALF = {"state_codec": "int8", "carry_codec": "int4", "basis_codec": "bf16", "min_8bit_size": 1024}

RELATIVE = {"scale_parameter": True}

METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", full(partial(torch.optim.AdamW, fused=True)), 0.0025, ours=False),
    "adamw_99": Method("AdamW, β2 0.99", full(partial(torch.optim.AdamW, fused=True), second=0.99), 0.0025, ours=False),
    "muon_int8": Method("Muon, int8", muon("full"), 0.005),
    "galore_muon": Method("GaLoreMuon, n/4", muon(1.0), 0.005),
    "adamw8bit": Method("AdamW, 8-bit", full(GaLoreAdamW8bit), 0.0025),
    "galore": Method("GaLore, n/4", low_rank(GaLoreAdamW, 1), 0.01),
    "muon_mulaw4": Method("Muon, 4-bit", muon("full", state_codec="mulaw4"), 0.005),
    "galore_muon_half": Method("GaLoreMuon, n/8", muon(0.5), 0.005),
    "galore8bit": Method("GaLore 8-bit, n/4", low_rank(GaLoreAdamW8bit, 1), 0.01),
    "galore8bit_2": Method("GaLore 8-bit, INT4 basis, n/2", low_rank(GaLoreAdamW, 2, **Q), 0.01),
    "apollo": Method("APOLLO, n/4, 8-bit", named("apollo", state_codec="int8"), 0.01),
    "apollo_mini": Method("APOLLO-Mini", named("apollo_mini"), 0.00125),
    "fira": Method("Fira, n/4, 8-bit", named("fira", state_codec="int8"), 0.01),
    "fold": Method("fold, n/4, 8-bit", named("fold", state_codec="int8"), 0.01),
    "foam": Method("FOAM, n/4, 8-bit", named("foam", state_codec="int8"), 0.01),
    "frugal": Method("FRUGAL, n/4, 8-bit", named("frugal", state_codec="int8"), 0.00063),
    "ldadam": Method("LDAdam, n/4, int8 error", named("ldadam", state_codec="int8", carry_codec="int8"), 0.0025),
    "ldadam_half": Method("LDAdam, n/8, 4-bit error, bf16 basis", named("ldadam", 0.5, **HALF), 0.00354),
    "alice0": Method("Alice-0, n/4, 8-bit", named("alice0", state_codec="int8"), 0.01),
    "alice0_bf16": Method("Alice-0, n/4, 8-bit, bf16 basis", named("alice0", state_codec="int8", basis_codec="bf16"), 0.02),
    "muon_fp32": Method("Muon, fp32", muon("full", state_codec="fp32"), 0.005),
    "sinkgd": Method("SinkGD", _stateless(sinkgd), 0.00125, ours=False),
    "scale": Method("SCALE", _stateless(scale), 0.00125, ours=False),
    "adamw4bit": Method("AdamW, 4-bit (torchao)", full(adamw4bit), 0.0025, ours=False),
    "adafactor": Method("Adafactor (torch)", full(torch.optim.Adafactor, adam=False), 0.005, ours=False),
    "galore_muon_4bit": Method("GaLoreMuon, n/4, 4-bit, INT4 basis", muon(1.0, state_codec="mulaw4", basis_codec="int4"), 0.005),
    "galore_muon_gap5": Method("GaLoreMuon, n/4, every 5", muon(1.0, gap=5), 0.005),
    "galore8bit_modules": Method("GaLore 8-bit, n/4; q, k half, down double", low_rank(GaLoreAdamW8bit, 1, LLAMA_FACTORS), 0.01),
    "golore": Method("GoLore, n/4", named("golore"), 0.01),
    "galore1": Method("galore-torch 1.0, n/4", published, 0.01, ours=False),
    "galore_half": Method("GaLore, n/8", low_rank(GaLoreAdamW, 0.5), 0.01),
    "galore_2": Method("GaLore, n/2", low_rank(GaLoreAdamW, 2), 0.01),
    "galore8bit_q": Method("GaLore 8-bit, INT4 basis, n/4", low_rank(GaLoreAdamW, 1, **Q), 0.01),
    "galore8bit_half": Method("GaLore 8-bit, n/8", low_rank(GaLoreAdamW8bit, 0.5), 0.01),
    "fold_fp32": Method("fold, n/4", named("fold"), 0.01),
    "foam_fp32": Method("FOAM, n/4", named("foam"), 0.01),
    "frugal_fp32": Method("FRUGAL, n/4", named("frugal"), 0.00063),
    "rows": Method("rows by turns, n/4", low_rank(GaLoreAdamW, 1, projector="rows"), 0.01),
    "means": Method("block means, n/4", low_rank(GaLoreAdamW, 1, projector="block_mean"), 0.01),
    "ldadam_fp32": Method("LDAdam, n/4, fp32", named("ldadam"), 0.0025),
    # Steps relative to the weights, as Adafactor's are.
    "adamw_rel": Method("AdamW, relative step", full(GaLoreAdamW, eps=1e-8, **RELATIVE), 0.08, ours=False),
    "ldadam_half_rel": Method("LDAdam, n/8, 4-bit error, bf16 basis, relative step", named("ldadam", 0.5, **HALF, **RELATIVE), 0.16),
    "alice0_bf16_rel": Method(
        "Alice-0, n/4, 8-bit, bf16 basis, relative step", named("alice0", state_codec="int8", basis_codec="bf16", **RELATIVE), 0.90510
    ),
    "fold_half_rel": Method(
        "fold, n/8, 8-bit, relative step", named("fold", 0.5, state_codec="int8", min_8bit_size=1024, **RELATIVE), 0.22627
    ),
    "frugal_rel": Method("FRUGAL, n/4, 8-bit, relative step", named("frugal", state_codec="int8", **RELATIVE), 0.08),
    "apollo_half_rel": Method(
        "APOLLO, n/8, 8-bit, relative step", named("apollo", 0.5, state_codec="int8", min_8bit_size=1024, **RELATIVE), 0.64
    ),
    "sinkgd_rel": Method("SinkGD, relative step", _stateless(sinkgd, relative=True), 0.05657, ours=False),
}
