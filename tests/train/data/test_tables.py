"""Files of examples: what is read, and what is said of a file that cannot be."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from galore_torch.train.data.tables import check_tables, table_rows
from galore_torch.train.errors import UserError

FILES = {
    "a.jsonl": '{"text": "one, two", "label": 1}\n\n{"text": "three", "label": 0}\n',
    "b.json": '[{"text": "one, two", "label": 1},\n {"text": "three", "label": 0}]\n',
    "c.json": '{"text": "one, two", "label": 1}\n{"text": "three", "label": 0}\n',
    "d.csv": 'text,label\n"one, two",1\nthree,0\n',
    "e.tsv": "text\tlabel\none, two\t1\nthree\t0\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_every_kind_are_the_same(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" * packed)
    data = FILES[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    check_tables([str(path)], "--train_file")
    found = [(row["text"], int(row["label"])) for _, row in table_rows([path])]
    assert found == [("one, two", 1), ("three", 0)]


def test_cell_of_a_csv_may_be_of_any_length(tmp_path: Path) -> None:
    """csv's own limit is 131,072 characters."""
    text = "long " * 30_000
    (tmp_path / "long.csv").write_text(f"text,label\n{text},1\n")
    ((_, row),) = table_rows([tmp_path / "long.csv"])
    assert row == {"text": text, "label": "1"}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "a.jsonl line 2 is list, not an object"),
        ("a.jsonl", "\n\n", "holds no examples"),
        ("a.csv", "text,label\nx\n", "a.csv line 2 has fewer cells than the 2 of its header"),
        ("a.csv", "text,label\nx,1,2\n", "a.csv line 2 has more cells"),
        ("a.csv", 'text,label\n"x"y,1\n', "is not CSV"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.json", "[{]", "is not JSON"),
    ],
)
def test_broken_file_names_its_line(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(says)):
        list(table_rows([tmp_path / name]))


def test_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "a.txt").write_text("x")
    for name, says in (("none.csv", "does not exist"), ("empty.csv", "is empty"), ("a.txt", "unknown kind '.txt'")):
        with pytest.raises(UserError, match=says):
            check_tables([str(tmp_path / name)], "--train_file")
