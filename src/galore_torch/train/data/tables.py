"""Files of examples as rows with named columns: .jsonl, .json, .csv and .tsv, each also .gz. Every row says where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from galore_torch.train.data.readers import kind_of, lines_of
from galore_torch.train.errors import UserError

Row = tuple[str, dict[str, Any]]  # (where it stands, its columns)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = (".jsonl", ".json", *_DELIMITERS)
SUFFIXES = tuple(kind + packed for kind in KINDS for packed in ("", ".gz"))
_LONGEST_CELL = 2**31 - 1  # characters: the most that csv takes on every platform; its own limit is 131,072


def check_tables(files: Iterable[str], flag: str) -> None:
    """Refuse, before anything is read, files that are missing, empty or of an unknown kind."""
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{flag} {name} does not exist; give the path of a file with examples")
        if path.stat().st_size == 0:
            raise UserError(f"{flag} {name} is empty (0 bytes); give a file with examples")
        if kind_of(path) not in KINDS:
            raise UserError(f"{flag} {name} is of unknown kind {path.suffix!r}; give .jsonl, .json, .csv or .tsv (each also .gz)")


def table_rows(files: Iterable[str | Path]) -> Iterator[Row]:
    """The rows of all `files` in order; empty lines are none. A .json file holds an object a line, or one list of objects."""
    for path in map(Path, files):
        kind, found = kind_of(path), False
        for row in _csv_rows(path, _DELIMITERS[kind]) if kind in _DELIMITERS else _json_rows(path):
            found = True
            yield row
        if not found:
            raise UserError(f"{path} holds no examples; give a file with some")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(lines_of(path), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path} has two columns {twice!r}, of which one would be lost; give each its own name")
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where} has {'more' if None in row else 'fewer'} cells than the {len(reader.fieldnames or ())} of its header"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"{path} line {reader.line_num} is not {kind_of(path)[1:].upper()}: {error}; quote cells that hold quotes"
        ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    lines = lines_of(path)
    first = next((line for line in lines if line.strip()), "")
    if kind_of(path) == ".json" and first.lstrip().startswith("["):
        try:
            items = json.loads(first + "".join(lines))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        for number, item in enumerate(items, 1):
            yield _object(f"{path} item {number}", item)
        return
    number = 0
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                item = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON: {error}") from error
            yield _object(where, item)


def _object(where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise UserError(
            f'{where} is {"null" if item is None else type(item).__name__}, not an object such as {{"text": "...", "label": 1}}'
        )
    return where, item
