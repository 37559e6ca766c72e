"""Classification and regression: GLUE from the hub or from files, and the user's own files, as tokens with their answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.loader import Batches
from galore_torch.train.data.sequences import BucketedBatches, Sequences
from galore_torch.train.data.sources import split_rows
from galore_torch.train.data.tables import SUFFIXES, Row, table_rows
from galore_torch.train.data.tokenizer import TextTokenizer, load_tokenizer
from galore_torch.train.errors import UserError

_ENCODE_AT_ONCE = 1000
_HUB = "nyu-mll/glue"
_MATCHED = {"": "validation_matched", "_mm": "validation_mismatched"}
_ALIASES = {"validation": "dev", "validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched"}


@dataclass(frozen=True)
class Glue:
    """`classes` 0: a number. The first of `scores` is the task's own. `held_out`: what a set adds to its scores' names -> the split."""

    columns: tuple[str, ...]
    classes: int
    scores: tuple[str, ...]
    held_out: dict[str, str] = field(default_factory=lambda: {"": "validation"})


_PAIR = ("sentence1", "sentence2")
# Columns as on the hub; scores of Wang et al., GLUE, arXiv 1804.07461, table 1.
GLUE = {
    "cola": Glue(("sentence",), 2, ("matthews",)),
    "mnli": Glue(("premise", "hypothesis"), 3, ("accuracy",), _MATCHED),
    "mrpc": Glue(_PAIR, 2, ("f1", "accuracy")),
    "qnli": Glue(("question", "sentence"), 2, ("accuracy",)),
    "qqp": Glue(("question1", "question2"), 2, ("accuracy", "f1")),
    "rte": Glue(_PAIR, 2, ("accuracy",)),
    "sst2": Glue(("sentence",), 2, ("accuracy",)),
    "stsb": Glue(_PAIR, 0, ("pearson", "spearman")),
    "wnli": Glue(_PAIR, 2, ("accuracy",)),
}


@dataclass(frozen=True)
class TaskData:
    """Examples to fine-tune on. `labels`: the classes by number, () for a number; None where the answer is text.

    `held_out`: what a set adds to its scores' names -> its examples; `scores`: their names, the first one the task's own.
    """

    train: Sequences
    held_out: dict[str, Sequences]
    tokenizer: TextTokenizer
    vocab_size: int
    text: str  # what it is, for people
    labels: tuple[str, ...] | None
    scores: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """What decides the training batches, wherever the files lie."""
        return f"{len(self.train)} examples, sha256 {self.train.digest}"

    def batches(self, config: FinetuneConfig, state: dict[str, int] | None = None, rank: int = 0) -> Batches:
        """The training batches of one of config.processes ranks, from their beginning or from a `state` of theirs."""
        return BucketedBatches(self.train, config.batch_size, config.seed, state, rank, config.processes)

    def amount(self, config: FinetuneConfig) -> str:
        """How much there is, in words."""
        held = ", ".join(f"{len(examples):,}" for examples in self.held_out.values())
        read = f"{len(self.train):,} {'sequences' if config.packing else 'examples'} in {config.epochs:.3g} epochs, {held} to evaluate on"
        left_out = sum(part.left_out for part in (self.train, *self.held_out.values()))
        return read + (f"; {left_out:,} left out, whose answers begin past --max_length {config.max_length}" if left_out else "")

    def record(self) -> dict[str, Any]:
        """What was read, for config.json."""
        sets = {f"held_out{suffix}_examples": len(examples) for suffix, examples in self.held_out.items()}
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        return {"train_examples": len(self.train), **sets, "scores": list(self.scores), **labels}


def load_labelled(config: FinetuneConfig) -> TaskData:
    """Read and tokenise what --task_name names: one of GLUE's tasks, or a classification or regression on the user's files."""
    tokenizer = with_padding(load_tokenizer(config.tokenizer_name or "").within(config.shape.vocab_size))
    task = GLUE.get(config.task_name or "")
    if task is not None:
        splits = {"train": "train"} | task.held_out
        rows = {suffix: _glue_rows(config, split) for suffix, split in splits.items()}
        columns, names, scores, classes = task.columns, _hub_names(config, task), task.scores, task.classes
    else:
        rows = own_rows(config)
        columns, names = _text_columns(rows["train"][0], config), None
        classes = 0 if config.task_name == "regression" else 2
        scores = ("pearson", "spearman") if classes == 0 else ("accuracy", "macro_f1")
    answer = "label" if task is not None else config.label_column
    if classes:
        labels = names or label_names((_answer(row, answer) for row in rows["train"]), task.classes if task is not None else None)
        numbers = {label: index for index, label in enumerate(labels)}
        if task is None and len(labels) == 2:
            scores = ("accuracy", "f1")
    else:
        labels, numbers = (), {}

    def sequences(found: list[Row]) -> Sequences:
        answers = [_answer(row, answer) for row in found]
        if not classes:
            targets = torch.tensor([_number(*pair) for pair in answers], dtype=torch.float32)
        else:
            targets = torch.tensor([_class(where, value, numbers) for where, value in answers])
        return _encoded(tokenizer, found, columns, targets, config.max_length)

    train, *held = (sequences(found) for found in rows.values())
    where = config.data_dir or "the hub"
    text = f"{config.task_name} of {where}" if task is not None else ", ".join(config.train_file)
    return TaskData(
        train,
        dict(zip([key for key in rows if key != "train"], held, strict=True)),
        tokenizer,
        config.shape.vocab_size,
        text,
        labels,
        scores,
    )


def with_padding(tokenizer: TextTokenizer) -> TextTokenizer:
    """The same, with a token that pads: decoders often name none, and then it is the one that ends a text."""
    fast = tokenizer.fast
    if fast.pad_token_id is None:
        if fast.eos_token is None:
            raise UserError(
                f"the tokenizer {tokenizer.source} names neither a padding nor an end-of-text token; give another with --tokenizer"
            )
        fast.pad_token = fast.eos_token
    return tokenizer


def label_names(answers: Iterable[tuple[str, Any]], classes: int | None = None) -> tuple[str, ...]:
    """The classes among (where, label) of training examples, numbers by size and words by alphabet; `classes`: how many there must be."""
    seen: dict[str, str] = {}
    examples = 0
    for where, value in answers:
        seen.setdefault(_class_name(where, value), where)
        examples += 1
    try:
        names = tuple(sorted(seen, key=int))
    except ValueError:
        names = tuple(sorted(seen))
    if classes is not None and set(names) <= set(map(str, range(classes))):
        return tuple(map(str, range(classes)))
    if classes is not None and len(names) != classes:
        raise UserError(f"{seen[names[-1]]}: the labels are {_some(names)}, but the task has {classes} classes; is it the task's own file?")
    if len(names) < 2:
        raise UserError(f"{seen[names[0]]}: every example has the label {names[0]!r}; a classification needs two classes")
    if len(names) > max(20, examples // 2):
        raise UserError(
            f"the {examples} examples have {len(names)} different labels ({_some(names)}); if these are numbers give "
            "--task_name regression, else name the column of classes with --label_column"
        )
    return names


def own_rows(config: FinetuneConfig) -> dict[str, list[Row]]:
    """{"train": rows, "": rows to evaluate on} of --train_file and --validation_file; every tenth is held out where there is no latter."""
    train = list(table_rows(config.train_file))
    if config.validation_file:
        return {"train": train, "": list(table_rows(config.validation_file))}
    if len(train) < 2:
        raise UserError(f"--train_file {' '.join(config.train_file)} has one example; give more, or --validation_file too")
    held = [row for index, row in enumerate(train) if index % 10 == 1]  # the second: two are enough for both sides
    return {"train": [row for index, row in enumerate(train) if index % 10 != 1], "": held}


def _glue_rows(config: FinetuneConfig, split: str) -> list[Row]:
    assert config.task_name is not None
    if config.data_dir is None:
        return [
            (f"{_HUB} {config.task_name} {split} row {index}", row) for index, row in enumerate(split_rows(_HUB, config.task_name, split))
        ]
    return list(table_rows([_local_file(Path(config.data_dir), config.task_name, split)]))


def _local_file(folder: Path, task: str, split: str) -> Path:
    names = [name for name in (split, _ALIASES.get(split)) if name]
    for place, name, suffix in itertools.product((folder / task, folder), names, SUFFIXES):
        if (place / (name + suffix)).is_file():
            return place / (name + suffix)
    raise UserError(f"--data_dir {folder} has no {' or '.join(names)} file for {task}; give a folder with such as {task}/{names[-1]}.jsonl")


def _hub_names(config: FinetuneConfig, task: Glue) -> tuple[str, ...] | None:
    """As numbers: the hub's answers are such."""
    return tuple(map(str, range(task.classes))) if task.classes and config.data_dir is None else None


def _answer(row: Row, column: str) -> tuple[str, Any]:
    where, cells = row
    if column not in cells:
        raise UserError(f"{where} has no column {column!r}, it has {_some(tuple(cells))}; name the right one with --label_column")
    if cells[column] is None or cells[column] == "":
        raise UserError(f"{where} has no answer in {column!r}; every example needs one")
    return where, cells[column]


def _class_name(where: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise UserError(f"{where}: the label {value} is no class; for numbers give --task_name regression")
    if not isinstance(value, (str, int)):
        raise UserError(f"{where}: the label is {type(value).__name__}, not a class; name the right column with --label_column")
    return str(int(value) if isinstance(value, bool) else value).strip()


def _class(where: str, value: Any, numbers: dict[str, int]) -> int:
    name = _class_name(where, value)
    if name not in numbers:
        raise UserError(f"{where}: the label {name!r} is none of {_some(tuple(numbers))}, which the training examples have")
    return numbers[name]


def _number(where: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: the answer {value!r} is no number; for classes give --task_name classification")
    return found


def _text_columns(first: Row, config: FinetuneConfig) -> tuple[str, ...]:
    """Those that are named, else those that hold text in the first row beside the answer."""
    where, cells = first
    if config.text_columns:
        return config.text_columns
    if config.label_column not in cells:
        _answer(first, config.label_column)
    found = [
        name
        for name, value in cells.items()
        if isinstance(value, str) and name != config.label_column and name.lower() not in ("id", "idx")
    ]
    if len(found) not in (1, 2):
        raise UserError(
            f"{where} has text in {_some(tuple(found)) if found else 'no column'}; name the one or two to read with --text_columns"
        )
    return tuple(found)


def _texts(rows: list[Row], column: str) -> list[str]:
    for where, cells in rows:
        if not isinstance(cells.get(column), str):
            has = f"it has {_some(tuple(cells))}" if column not in cells else f"it is {type(cells[column]).__name__} there"
            raise UserError(f"{where} has no text in {column!r}: {has}; name the right columns with --text_columns")
    # JSON can escape half of a surrogate pair, which no tokenizer takes: it becomes "?".
    return [cells[column].encode("utf-8", errors="replace").decode("utf-8") for _, cells in rows]


def _encoded(tokenizer: TextTokenizer, rows: list[Row], columns: tuple[str, ...], targets: torch.Tensor, length: int) -> Sequences:
    fast = tokenizer.fast
    pieces: dict[str, list[torch.Tensor]] = {}
    lengths = [0]
    for part in _parts(rows):
        texts = [_texts(part, column) for column in columns]
        found = fast(*texts, truncation=True, max_length=length, return_attention_mask=False)
        for name, values in found.items():
            pieces.setdefault(name, []).append(torch.tensor(list(itertools.chain.from_iterable(values)), dtype=torch.int32))
        lengths += [len(ids) for ids in found["input_ids"]]
    if 0 in lengths[1:]:
        where, _ = rows[lengths.index(0, 1) - 1]
        raise UserError(f"{where}: the text has no tokens; leave the example out")
    padding = {"input_ids": fast.pad_token_id, "token_type_ids": fast.pad_token_type_id}
    return Sequences({name: torch.cat(part) for name, part in pieces.items()}, torch.tensor(lengths).cumsum(0), targets, padding)


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    return (rows[start : start + _ENCODE_AT_ONCE] for start in range(0, len(rows), _ENCODE_AT_ONCE))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
