"""Documents come out of every kind of file as they went in; a bad file is named with its cure."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from galore_torch.train.data.readers import check_files, file_documents, stdlib_documents, text_files
from galore_torch.train.errors import UserError

TEXTS = ["first, with ünïcode", "second\nof two lines", "third"]


def read(path: Path, field: str = "text") -> list[str]:
    return list(file_documents((str(path),), field))


def test_standard_library_is_source_code_in_a_fixed_order() -> None:
    first, again = (list(islice(stdlib_documents(), 30)) for _ in range(2))
    assert first == again
    assert sum("import " in text for text in first) > 15


def test_standard_library_skips_its_tests(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "test/test_a.py", "pkg/tests/c.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    assert sorted(stdlib_documents(tmp_path)) == ["# a.py", "# b.py"]


def test_python_without_its_source_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 source files.*--data"):
        list(stdlib_documents(tmp_path))


@pytest.mark.parametrize("ending", ["l", "l.gz", ".gz"])
def test_jsonl_gives_its_lines(tmp_path: Path, ending: str) -> None:
    data = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in [*TEXTS, "  "]).encode()
    path = tmp_path / f"a.json{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    assert read(path) == TEXTS


def test_half_a_surrogate_pair_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "bad \\ud83d here"}')
    assert read(path) == ["bad ? here"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("null", "it is null"),
        ('{"text": null}', "it is null there"),
        ('{"text": 3}', "it is int there"),
        ("[1]", "it is no object"),
        ('{"body": "a"}', "it has 'body'"),
    ],
)
def test_row_without_text_is_called_what_it_is(row: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "first"}}\n{row}')
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path} line 2 has no text in 'text': {says}; name the right one with --text_field"


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [*TEXTS, None], "n": [1, 2, 3, 4]}), path)
    assert read(path, "body") == TEXTS
    with pytest.raises(UserError, match=r"no column 'text', it has 'body', 'n'.*--text_field"):
        read(path)
    with pytest.raises(UserError, match="holds int, not text"):
        read(path, "n")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_txt_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path, ending: str) -> None:
    text = "".join(f"line {i} of some length\n" + "\n" * (i % 7 == 0) for i in range(2000)) + "last, no line end"
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending else text.encode())
    documents = read(path)
    assert "".join(documents) == text
    assert len(documents) > 5
    assert all(document.endswith("\n\n") for document in documents[:-1])


def test_txt_without_blank_lines_is_still_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("words and words\n" * 10_000)
    assert 2 <= len(read(path)) <= 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.csv", b"x", "unknown kind '.csv'"),
        (None, b"", "does not exist"),
    ],
)
def test_unusable_file_is_refused_before_reading(tmp_path: Path, name: str | None, content: bytes, says: str) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        check_files((str(path),), "--data")
    assert str(path) in str(caught.value)


def test_folders_and_patterns_are_their_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json.gz", "sub/c.txt", "sub/notes.md", "d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a.json.gz", "b.jsonl", "d.parquet", "sub/c.txt")]
    assert list(text_files((str(tmp_path),), "--data")) == found
    assert list(text_files((f"{tmp_path}/*.json*", f"{tmp_path}/**/*.txt"), "--data")) == [found[0], found[1], found[3]]


def test_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").touch()
    assert text_files((f"{tmp_path}/a[1].txt",), "--data") == (f"{tmp_path}/a[1].txt",)


@pytest.mark.parametrize(("name", "says"), [("", "is a folder without text files"), ("/*.txt", "matches no file")])
def test_folder_or_pattern_without_text_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=rf"--eval_data .*{says}; give .txt, .jsonl"):
        text_files((f"{tmp_path}{name}",), "--eval_data")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "holds no text"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("a.txt", b"\xff\xfe\x00bad", "not UTF-8"),
        ("a.txt.gz", b"not gzip at all", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"word " * 9999, mtime=0)[:-30], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"word", mtime=0)[:10] + b"\xff" * 40, "cannot be read"),
        ("a.jsonl", b'{"text": "good"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', "line 1 has no text in 'text': it has 'content'"),
        ("a.jsonl", b'["x"]\n', "it is no object"),
        ("a.parquet", b"not parquet", "no parquet file"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read(path)
    assert str(path) in str(caught.value)
