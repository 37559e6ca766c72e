"""Optim: the family by name. A method is nothing but settings of one of the classes; `--optimizer` takes the same names.

The table is plain data, so that the command line reads it without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from galore_torch.choices import one_of

if TYPE_CHECKING:
    from galore_torch.optim.base import LowRankOptimizer


@dataclass(frozen=True)
class Method:
    """``settings``: the keys of the groups with a rank, as the paper ``source`` has them; all others train by the class's own AdamW.

    ``lr``: the paper's rate. ``rank``: the one it is made for; None: a quarter of the short side. ``needs``: the key that the caller has to
    give, for it depends on the run.
    """

    about: str
    source: str
    lr: float
    settings: Mapping[str, Any]
    rank: int | None = None
    needs: str | None = None
    class_name: str = "GaLoreAdamW"


_SKETCH = {"projector": "gaussian", "transport": "keep", "update_proj_gap": 200}  # a new one every 200 steps, moments untouched
_MEANS = {"projector": "block_mean", "scale": 0.25, "eps": 1e-8}

METHODS: dict[str, Method] = {
    "fira": Method(
        "GaLore, and what lies outside of the subspace, scaled as Adam scaled each column",
        "2410.01623",
        1e-2,
        {"recovery": "fira", "scale": 0.25, "update_proj_gap": 200},
    ),
    "apollo": Method(
        "the whole gradient, each column scaled as Adam scales its random projection",
        "2412.05270",
        1e-2,
        {**_SKETCH, "recovery": "apollo", "scale": 1.0},
    ),
    "apollo_mini": Method(
        "the whole gradient, scaled by one number from a projection of rank 1",
        "2412.05270",
        1e-2,
        {**_SKETCH, "recovery": "apollo_mini", "scale": math.sqrt(128)},
        rank=1,
    ),
    "foam": Method(
        "Adam on means of neighbours, and what they leave in both moments",
        "2512.07112",
        1e-2,
        {**_MEANS, "recovery": "foam"},
    ),
    "fold": Method(
        "Adam on means of neighbours, and what they leave over one denominator a block",
        "2512.07112",
        1e-2,
        {**_MEANS, "recovery": "fold"},
    ),
    "frugal": Method(
        "Adam on some rows, other ones after each gap, and the gradient's sign elsewhere",
        "2411.07837",
        1e-3,
        {"projector": "rows", "recovery": "sign", "scale": 1.0, "update_proj_gap": 200},
    ),
    "golore": Method(
        "GaLore, with random bases from a stated step on",
        "2410.11289",
        1e-2,
        {"scale": 0.25, "update_proj_gap": 200},
        needs="random_after",
    ),
    "ldadam": Method(
        "a basis that follows the momentum at every step, and error feedback",
        "2410.16103",
        1e-3,
        {
            "projector": "momentum",
            "transport": "predict",
            "carry": "momentum_feedback",
            "scale": 1.0,
            "update_proj_gap": 1,
            "betas": (0.908, 0.99),
            "eps": 1e-8,
        },
    ),
    "alice0": Method(
        "Adam in a basis of strong and of random directions, and what lies outside over its energies",
        "2502.07752",
        2e-2,
        {
            "projector": "switch",
            "transport": "keep",
            "recovery": "alice",
            "scale": 0.3,
            "update_proj_gap": 200,
            "betas": (0.9, 0.9),
            "eps": 1e-8,
            "correct_bias": False,
        },
    ),
}


def low_rank_optimizer(params: Any, recipe: str, lr: float | None = None, **settings: Any) -> LowRankOptimizer:
    """One of the family by its name: ``low_rank_optimizer(galore_param_groups(model, rank=128), "apollo", lr=1e-2)``.

    The answer is a GaLoreAdamW whose groups with a rank have the settings of the method's paper. What a group or ``settings`` say comes
    first, so ``low_rank_optimizer(groups, "apollo", state_codec="int8")`` is APOLLO with 8-bit moments.

    Args:
        params: as of every optimizer here: parameters, pairs of name and parameter, or groups such as `galore_param_groups` builds.
        recipe: "fira", "apollo", "apollo_mini", "foam", "fold", "frugal", "golore", "ldadam" or "alice0", the names of ``--optimizer``.
        lr: the step size, of all groups without one of their own. Default: the paper's.
        settings: further arguments of GaLoreAdamW. "golore" needs ``random_after``.

    Raises ValueError for a name that is not known, where no group has a rank, and for settings that do not go together, with the cure.
    """
    from galore_torch.optim import galore

    if recipe in ("muon", "galore_muon"):
        raise ValueError(f"recipe={recipe!r} has a class of its own: GaLoreMuon(groups), for Muon itself with rank='full'")
    one_of("recipe", recipe, METHODS)
    method = METHODS[recipe]
    groups = _as_groups(params)
    rank = settings.get("rank")
    ranked = [group for group in groups if group.get("rank", rank) is not None]
    if method.needs and any(group.get(method.needs, settings.get(method.needs)) is None for group in ranked):
        raise ValueError(
            f"recipe={recipe!r} needs {method.needs}: the step from which on bases are random, such as half the steps of the run"
        )
    own = {key: value for key, value in method.settings.items() if key not in settings}
    common = {key: value for key, value in settings.items() if key not in ("random_after", "carry_codec")}
    alone = {key: settings[key] for key in settings.keys() - common.keys()}  # what groups without a rank would refuse
    if not ranked:
        raise ValueError(
            f"recipe={recipe!r} is what groups with a rank do, and none has one: give galore_param_groups(model, rank=128), or rank=128"
        )
    groups = [{**own, **alone, **group} if group.get("rank", rank) is not None else group for group in groups]
    optimizer: LowRankOptimizer = getattr(galore, method.class_name)(groups, lr=method.lr if lr is None else lr, **common)
    optimizer.of_ranked_groups = {**own, **alone}
    return optimizer


def _as_groups(params: Any) -> list[dict[str, Any]]:
    """Groups, or one group of all parameters."""
    from torch import Tensor  # the command line reads this module, and loads no torch for its help

    if isinstance(params, Tensor):
        raise TypeError("params is one tensor: give an iterable of parameters, or groups such as galore_param_groups builds")
    params = list(params)
    if not params:
        raise ValueError("low_rank_optimizer got an empty parameter list: a generator such as model.parameters() can be read once")
    return params if params and isinstance(params[0], dict) else [{"params": params}]
