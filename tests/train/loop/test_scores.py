"""Scores against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_torch.train.loop.scores import scores_of


def classes(seed: int, kinds: int) -> tuple[Tensor, Tensor]:
    """(predicted, answers)"""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, kinds, (50,), generator=generator)
    noise = torch.rand(50, generator=generator) < 0.3
    return torch.where(noise, torch.randint(0, kinds, (50,), generator=generator), answers), answers


def f1(predicted: Tensor, answers: Tensor, kind: int) -> float:
    hit = int(((predicted == kind) & (answers == kind)).sum())
    return 2 * hit / int((predicted == kind).sum() + (answers == kind).sum())


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_two_classes(seed: int) -> None:
    p, a = classes(seed, 2)
    tp, tn, fp, fn = (int(((p == i) & (a == j)).sum()) for i, j in ((1, 1), (0, 0), (1, 0), (0, 1)))
    matthews = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert scores_of(("accuracy", "f1", "matthews"), p, a) == pytest.approx(
        {"accuracy": (tp + tn) / 50, "f1": f1(p, a, 1), "matthews": matthews}
    )


def test_scores_of_more_classes() -> None:
    p, a = classes(0, 4)
    assert scores_of(("macro_f1",), p, a)["macro_f1"] == pytest.approx(sum(f1(p, a, kind) for kind in range(4)) / 4)


def test_scores_of_numbers() -> None:
    """Spearman is Pearson of the ranks."""
    p, a = torch.randn(50), torch.randn(50)
    a += p

    def pearson(x: Tensor, y: Tensor) -> float:
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / (x.norm() * y.norm()))

    ranks = [values.argsort().argsort().double() for values in (p, a)]
    expected = {"pearson": pearson(p.double(), a.double()), "spearman": pearson(*ranks)}
    assert scores_of(("pearson", "spearman"), p, a) == pytest.approx(expected, rel=1e-6)


def test_constant_answer_scores_nothing() -> None:
    """And warns of nothing."""
    found = scores_of(("pearson", "spearman"), torch.ones(5), torch.arange(5.0))
    assert found == {"pearson": 0.0, "spearman": 0.0}
    zeros = torch.zeros(4, dtype=torch.int64)
    assert scores_of(("f1", "matthews"), zeros, torch.tensor([0, 1, 1, 0])) == {"f1": 0.0, "matthews": 0.0}
