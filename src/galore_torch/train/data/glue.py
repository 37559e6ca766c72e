"""GLUE's tasks: their columns, classes and scores, and their rows, from the hub or from files."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from galore_torch.train.data.sources import split_rows
from galore_torch.train.data.tables import SUFFIXES, Row, table_rows
from galore_torch.train.errors import UserError

_HUB = "nyu-mll/glue"
_MATCHED = {"": "validation_matched", "_mm": "validation_mismatched"}
_ALIASES = {"validation": "dev", "validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched"}


@dataclass(frozen=True)
class Glue:
    """`classes`: their names in the hub's order, () for a number. The first of `scores` is the task's own; f1 is of the second class.

    `held_out`: what a set adds to its scores' names -> the split.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    scores: tuple[str, ...]
    held_out: dict[str, str] = field(default_factory=lambda: {"": "validation"})


_PAIR = ("sentence1", "sentence2")
_FOLLOWS = ("entailment", "not_entailment")
# Columns and classes as on the hub; scores of Wang et al., GLUE, arXiv 1804.07461, table 1.
GLUE = {
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "mnli": Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), _MATCHED),
    "mrpc": Glue(_PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "qnli": Glue(("question", "sentence"), _FOLLOWS, ("accuracy",)),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": Glue(_PAIR, _FOLLOWS, ("accuracy",)),
    "sst2": Glue(("sentence",), ("negative", "positive"), ("accuracy",)),
    "stsb": Glue(_PAIR, (), ("pearson", "spearman")),
    "wnli": Glue(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}


def glue_rows(task: str, folder: str | None) -> dict[str, list[Row]]:
    """{"train": rows, and those of each held-out set by what it adds to its scores' names}, of the files in `folder`, or of the hub."""
    splits = {"train": "train"} | GLUE[task].held_out
    if folder is not None:
        return {key: list(table_rows([_local_file(Path(folder), task, split)])) for key, split in splits.items()}
    return {
        key: [(f"{_HUB} {task} {split} row {index}", row) for index, row in enumerate(split_rows(_HUB, task, split))]
        for key, split in splits.items()
    }


def _local_file(folder: Path, task: str, split: str) -> Path:
    names = [name for name in (split, _ALIASES.get(split)) if name]
    for place, name, suffix in itertools.product((folder / task, folder), names, SUFFIXES):
        if (place / (name + suffix)).is_file():
            return place / (name + suffix)
    raise UserError(f"--data_dir {folder} has no {' or '.join(names)} file for {task}; give a folder with such as {task}/{names[-1]}.jsonl")
