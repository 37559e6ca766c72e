"""Who is trained: the names and learning rates in --optimizer and --compare. Plain data; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from galore_torch.train.errors import UserError
from galore_torch.train.optimizers.registry import OPTIMIZERS, optimizer_spec, unused_flags

Contender = tuple[str, float]  # name in lower case, peak learning rate


FINE_TUNING = 0.1  # of an optimizer's default lr, for weights that are trained already: the whole of it undoes part of their training


def contenders(items: Iterable[str], lr: float | None, pretrained: bool = False, own: Mapping[str, float] | None = None) -> list[Contender]:
    """Each `name` or `name:lr` with its own lr, else the shared one, else that in `own`, else the optimizer's, a tenth of it for a
    trained model."""
    result = []
    for item in items:
        name, _, own_lr = item.partition(":")
        spec = optimizer_spec(name)
        default = round(spec.default_lr * FINE_TUNING, 12) if pretrained else spec.default_lr
        default = (own or {}).get(name.lower(), default)
        settled = default if lr is None else lr
        if own_lr:
            try:
                settled = float(own_lr)
            except ValueError:
                settled = -1.0
            if not (math.isfinite(settled) and settled > 0):
                raise UserError(
                    f"--compare {item!r}: {own_lr!r} is no learning rate; write name:lr with lr greater than 0, as in {name}:{default}"
                )
        result.append((name.lower(), settled))
    return result


def run_names(pairs: Sequence[Contender]) -> list[str]:
    """A folder name for each: the optimizer's, with the lr where that alone tells two apart."""
    names = [name for name, _ in pairs]
    return [name_with_lr(name, lr) if names.count(name) > 1 else name for name, lr in pairs]


def name_with_lr(name: str, lr: float) -> str:
    """Another one for every other lr: six digits of it, or as many more as read back as the same number."""
    return f"{name}-lr" + next(text for digits in range(6, 18) if float(text := f"{lr:.{digits}g}") == lr)


def check_contenders(compare: Sequence[str], pairs: Sequence[Contender], given: frozenset[str]) -> None:
    """Refuse a contender named twice, and a flag that none of them can use."""
    if compare and "optimizer" in given:
        raise UserError("--optimizer and --compare are both given; name every one in --compare")
    names = [name for name, _ in pairs]
    if len(set(pairs)) < len(names):
        raise UserError(f"--compare names one optimizer twice with one lr: {', '.join(compare)}; write name:lr")
    for flag in sorted(given):
        if all(flag in unused_flags(name, given) for name in names):
            user = next(name for name in ("galore_adamw", *OPTIMIZERS) if flag not in unused_flags(name, {flag}))
            raise UserError(
                f"--{flag} has no effect on {', '.join(names)}; leave it out, or choose an optimizer that uses it, such as {user}"
            )
