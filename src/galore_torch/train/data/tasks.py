"""Classification and regression: GLUE, and the user's own files, as tokens with their answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.answers import answer, label_names, some, targets_of
from galore_torch.train.data.glue import GLUE, glue_rows
from galore_torch.train.data.loader import Batches
from galore_torch.train.data.own_files import CORRELATED, own_rows
from galore_torch.train.data.readers import encodable
from galore_torch.train.data.sampler import Lanes
from galore_torch.train.data.sequences import BucketedBatches, Sequences
from galore_torch.train.data.tables import Row
from galore_torch.train.data.tokenizer import TextTokenizer, load_tokenizer
from galore_torch.train.errors import UserError
from galore_torch.train.model.pretrained import reads_last_place

_ENCODE_AT_ONCE = 1000


@dataclass(frozen=True)
class TaskData:
    """Examples to fine-tune on. `labels`: the classes by number, () for a number; None where the answer is text.

    `held_out`: what a set adds to its scores' names -> its examples; `scores`: their names, the first one the task's own; `columns`:
    those that the texts are read from.
    """

    train: Sequences
    held_out: dict[str, Sequences]
    tokenizer: TextTokenizer
    vocab_size: int
    text: str  # what it is, for people
    labels: tuple[str, ...] | None
    scores: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """What decides the training batches, wherever the files lie."""
        return f"{len(self.train)} examples, sha256 {self.train.digest}"

    @cached_property
    def held_out_fingerprint(self) -> str:
        """What decides the scores of a model."""
        return "; ".join(f"{len(examples)} examples, sha256 {examples.digest}" for examples in self.held_out.values())

    def batches(self, config: FinetuneConfig, lanes: Lanes | None = None, rank: int = 0) -> Batches:
        """The training batches of one of config.processes ranks, from their beginning or from where they are."""
        return BucketedBatches(self.train, config.batch_size, config.seed, lanes, rank, config.processes)

    def amount(self, config: FinetuneConfig) -> str:
        """How much there is, in words."""
        held = ", ".join(f"{len(examples):,}" for examples in self.held_out.values())
        columns = f"{' and '.join(map(repr, self.columns))} of " if self.columns else ""
        read = f"{len(self.train):,} {'sequences' if config.packing else 'examples'} in {config.epochs:.3g} epochs, {held} to evaluate on"
        left_out = sum(part.left_out for part in (self.train, *self.held_out.values()))
        return columns + read + (f"; {left_out:,} left out, whose answers begin past --max_length {config.max_length}" if left_out else "")

    def record(self) -> dict[str, Any]:
        """What was read, for config.json."""
        sets = {f"held_out{suffix}_examples": len(examples) for suffix, examples in self.held_out.items()}
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        columns = {"text_columns": list(self.columns)} if self.columns else {}
        return {"train_examples": len(self.train), **sets, "scores": list(self.scores), **labels, **columns}


def load_labelled(config: FinetuneConfig) -> TaskData:
    """Read and tokenise what --task_name names: one of GLUE's tasks, or a classification or regression on the user's files."""
    name = config.task_name or ""
    glue = GLUE.get(name)
    rows = own_rows(config) if glue is None else glue_rows(name, config.data_dir)
    columns = _text_columns(rows["train"], config) if glue is None else glue.columns
    column = config.label_column if glue is None else "label"
    if name == "regression" or (glue and not glue.classes):
        labels: tuple[str, ...] = ()
        _check_held_out(rows, config)
    else:
        labels = label_names((answer(row, column) for row in rows["train"]), glue.classes if glue else ())
    tokenizer = with_padding(load_tokenizer(config.tokenizer_name or "").within(config.shape.vocab_size))
    _check_length(tokenizer, len(columns), config.max_length)
    sets = {
        key: _encoded(tokenizer, found, columns, targets_of(found, column, labels, numbered=glue is not None), config)
        for key, found in rows.items()
    }
    train = sets.pop("train")
    text = ", ".join(config.train_file) if glue is None else f"{name} of {config.data_dir or 'the hub'}"
    return TaskData(train, sets, tokenizer, config.shape.vocab_size, text, labels, glue.scores if glue else _own_scores(labels), columns)


def _own_scores(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Of as many classes, or of numbers."""
    return {0: ("pearson", "spearman"), 2: ("accuracy", "f1")}.get(len(labels), ("accuracy", "macro_f1"))


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


def _check_held_out(rows: dict[str, list[Row]], config: FinetuneConfig) -> None:
    """Refuse a set of numbers that has no correlation."""
    for key, found in rows.items():
        if key != "train" and len(found) < CORRELATED:
            flag = f"--data_dir {config.data_dir}" if config.task_name in GLUE else "--validation_file " + " ".join(config.validation_file)
            raise UserError(f"{flag} has {len(found)} example to evaluate on, and a correlation is of at least {CORRELATED}; give more")


def _check_length(tokenizer: TextTokenizer, texts: int, length: int) -> None:
    """Refuse a length that the special tokens alone fill up, or all but one text of a pair."""
    special = tokenizer.fast.num_special_tokens_to_add(pair=texts == 2)
    if length < special + texts:
        raise UserError(
            f"--max_length {length} leaves no room for {'each text of a pair' if texts == 2 else 'the text'} beside the tokenizer's "
            f"{special} special tokens; give at least {special + texts}"
        )


def _text_columns(rows: list[Row], config: FinetuneConfig) -> tuple[str, ...]:
    """Those that are named, else those that hold text in any row: neither the answer nor numbers, such as the rows' own."""
    if config.text_columns:
        return config.text_columns
    answer(rows[0], config.label_column)
    names = dict.fromkeys(name for _, cells in rows for name in cells)
    others = (name for name in names if name != config.label_column and name.lower() not in ("", "id", "idx"))
    found = tuple(name for name in others if any(_is_text(cells.get(name)) for _, cells in rows))
    if len(found) not in (1, 2):
        raise UserError(
            f"--train_file {' '.join(config.train_file)} has text in {some(found) if found else 'no column'}; name the one or two to read "
            "with --text_columns"
        )
    return found


def _is_text(cell: Any) -> bool:
    """Whether it says more than a number; in a .csv numbers are strings too."""
    if not isinstance(cell, str) or not cell.strip():
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def _texts(rows: list[Row], column: str) -> list[str]:
    for where, cells in rows:
        if not isinstance(cells.get(column), str):
            kind = "null" if cells.get(column) is None else type(cells[column]).__name__
            has = f"it is {kind} there" if column in cells else f"it has {some(tuple(cells))}"
            raise UserError(f"{where} has no text in {column!r}: {has}; name the right columns with --text_columns")
    return [encodable(cells[column]) for _, cells in rows]


def _encoded(
    tokenizer: TextTokenizer, rows: list[Row], columns: tuple[str, ...], targets: torch.Tensor, config: FinetuneConfig
) -> Sequences:
    fast = tokenizer.fast
    pieces: dict[str, list[torch.Tensor]] = {}
    lengths = [0]
    for part in _parts(rows):
        texts = [_texts(part, column) for column in columns]
        found = fast(*texts, truncation=True, max_length=config.max_length, return_attention_mask=False)
        for name, values in found.items():
            pieces.setdefault(name, []).append(torch.tensor(list(itertools.chain.from_iterable(values)), dtype=torch.int32))
        lengths += [len(ids) for ids in found["input_ids"]]
    if 0 in lengths[1:]:
        where, _ = rows[lengths.index(0, 1) - 1]
        raise UserError(f"{where}: the text has no tokens; leave the example out")
    padding = {"input_ids": fast.pad_token_id, "token_type_ids": fast.pad_token_type_id}
    fields = {name: torch.cat(part) for name, part in pieces.items()}
    return Sequences(fields, torch.tensor(lengths).cumsum(0), targets, padding, left=reads_last_place(config.hf_model or ""))


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    return (rows[start : start + _ENCODE_AT_ONCE] for start in range(0, len(rows), _ENCODE_AT_ONCE))
