"""The user's own examples: those to train on and those to evaluate on, from his files or held out."""

from __future__ import annotations

import random
from collections.abc import Sequence

from galore_torch.train.config.finetune import HOLD_OUT, FinetuneConfig
from galore_torch.train.data.answers import answer, class_name, label_names
from galore_torch.train.data.tables import Row, table_rows
from galore_torch.train.errors import UserError

CORRELATED = 2  # examples that have a correlation, at least


def own_rows(config: FinetuneConfig) -> dict[str, list[Row]]:
    """{"train": rows, "": rows to evaluate on} of --train_file and --validation_file; a tenth is held out where there is no latter."""
    train = list(table_rows(config.train_file))
    if config.validation_file:
        return {"train": train, "": list(table_rows(config.validation_file))}
    least = CORRELATED if config.task_name == "regression" else 1
    if len(train) <= least:
        has = "one example" if len(train) == 1 else f"{len(train)} examples, of which {least} would be held out"
        raise UserError(f"--train_file {' '.join(config.train_file)} has {has}; give more, or --validation_file too")
    held = held_out(_kinds(train, config), least)
    if not held:
        raise UserError(
            f"--train_file {' '.join(config.train_file)} has one example of each of {len(train)} classes, so that none can be held out; "
            "give more, or --validation_file too"
        )
    return {"train": [row for index, row in enumerate(train) if index not in held], "": [train[index] for index in sorted(held)]}


def _kinds(rows: list[Row], config: FinetuneConfig) -> list[str]:
    """The class of each row; all are alike where there are no classes."""
    if config.task_name != "classification":
        return [""] * len(rows)
    answers = [answer(row, config.label_column) for row in rows]
    label_names(answers)  # says what is wrong with them
    return [class_name(where, value) for where, value in answers]


def held_out(kinds: Sequence[str], least: int) -> set[int]:
    """Indices of a tenth of the examples, of each kind its share but never the only one.

    Drawn, for files have patterns; and the same in every run, so that seeds and methods have the same ones.
    """
    order = list(range(len(kinds)))
    random.Random(0).shuffle(order)
    trained: set[str] = set()
    spare = []
    for index in order:
        if kinds[index] in trained:
            spare.append(index)
        trained.add(kinds[index])
    spare.sort(key=lambda index: kinds[index])
    number = min(len(spare), max(least, -(-(len(kinds) - 1) // HOLD_OUT)))
    return {spare[(2 * place + 1) * len(spare) // (2 * number)] for place in range(number)}  # spread evenly over the kinds
