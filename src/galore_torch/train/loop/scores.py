"""Scores of answers, by scikit-learn and scipy: GLUE's own metrics, a number from -1 or 0 to 1, higher is better."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def scores_of(names: Sequence[str], predicted: Tensor, answers: Tensor) -> dict[str, float]:
    """name -> score of `predicted` (N,) against `answers` (N,): classes, or numbers for pearson and spearman."""
    return {name: float(_SCORES[name](answers.numpy(), predicted.numpy())) for name in names}


def _accuracy(answers: Any, predicted: Any) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(answers, predicted)


def _f1(answers: Any, predicted: Any) -> float:
    """Of class 1."""
    from sklearn.metrics import f1_score

    return f1_score(answers, predicted, zero_division=0.0)


def _macro_f1(answers: Any, predicted: Any) -> float:
    """The mean over the classes."""
    from sklearn.metrics import f1_score

    return f1_score(answers, predicted, average="macro", zero_division=0.0)


def _matthews(answers: Any, predicted: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(answers, predicted)


def _correlation(kind: str) -> Callable[[Any, Any], float]:
    def correlation(answers: Any, predicted: Any) -> float:
        """A constant answer orders nothing: 0, as Matthews' has it."""
        from scipy import stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            found = float(getattr(stats, kind)(answers, predicted).statistic)
        return 0.0 if found != found else found

    return correlation


_SCORES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
