"""The answers of examples, as classes or as numbers; and what is said where one is neither."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_torch.train.data.tables import Row
from galore_torch.train.errors import UserError

_LARGEST = torch.finfo(torch.float32).max


def targets_of(rows: list[Row], column: str, labels: tuple[str, ...], *, numbered: bool = False) -> Tensor:
    """(n,): the numbers of the classes among `labels` as int64, or numbers as float32 where there are no labels.

    `numbered`: a class may be given by its number, too.
    """
    answers = [answer(row, column) for row in rows]
    if not labels:
        return torch.tensor([_number(where, value) for where, value in answers], dtype=torch.float32)
    numbers = {label: index for index, label in enumerate(labels)}
    numbers |= {str(index): index for index in numbers.values()} if numbered else {}
    return torch.tensor([_class(where, value, numbers) for where, value in answers])


def label_names(answers: Iterable[tuple[str, Any]], classes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The classes among (where, label) of training examples, numbers by size and words by alphabet.

    `classes`: those of the task in its order, where it has its own; labels are these names, or all of them are their numbers.
    """
    seen: dict[str, str] = {}
    examples = 0
    for where, value in answers:
        seen.setdefault(class_name(where, value), where)
        examples += 1
    if classes:
        numbers = tuple(map(str, range(len(classes))))
        if any(seen.keys() <= set(known) for known in (numbers, classes)):
            return classes
        strange = next((name for name in seen if name not in (*numbers, *classes)), next(iter(seen)))
        raise UserError(
            f"{seen[strange]}: the label {strange!r} is no class of the task, of {some(tuple(seen))} in all; give {some(classes)}, or 0 to "
            f"{len(classes) - 1} in place of all; is it the task's own file?"
        )
    try:
        names = tuple(sorted(seen, key=int))
    except ValueError:
        names = tuple(sorted(seen))
    if len(names) < 2:
        raise UserError(f"{seen[names[0]]}: every example has the label {names[0]!r}; a classification needs two classes")
    if len(names) > max(20, examples // 2):
        raise UserError(
            f"the {examples} examples have {len(names)} different labels ({some(names)}); if these are numbers give "
            "--task_name regression, else name the column of classes with --label_column"
        )
    return names


def answer(row: Row, column: str) -> tuple[str, Any]:
    """(where it stands, the answer in `column`); UserError where there is none."""
    where, cells = row
    if column not in cells:
        raise UserError(f"{where} has no column {column!r}, it has {some(tuple(cells))}; name the right one with --label_column")
    if cells[column] is None or cells[column] == "":
        raise UserError(f"{where} has no answer in {column!r}; every example needs one")
    return where, cells[column]


def class_name(where: str, value: Any) -> str:
    """The class that a cell names, a whole number without its decimals; UserError where it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise UserError(f"{where}: the label {value} is no class; for numbers give --task_name regression")
    if not isinstance(value, (str, int)):
        raise UserError(f"{where}: the label is {type(value).__name__}, not a class; name the right column with --label_column")
    return str(int(value) if isinstance(value, bool) else value).strip()


def _class(where: str, value: Any, numbers: dict[str, int]) -> int:
    name = class_name(where, value)
    if name not in numbers:
        raise UserError(f"{where}: the label {name!r} is none of {some(tuple(numbers))}, which the training examples have")
    return numbers[name]


def _number(where: str, value: Any) -> float:
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond float64
        found = math.inf
    except (TypeError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise UserError(f"{where}: the answer {value!r} is no number; for classes give --task_name classification")
    if abs(found) > _LARGEST:
        raise UserError(f"{where}: the answer {found:g} is beyond {_LARGEST:.3g}, the largest that float32 holds; scale the answers down")
    return found


def some(names: tuple[str, ...]) -> str:
    """The first of them, in quotes."""
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
