"""Text as documents: the standard library's source, or the user's txt, jsonl and parquet files.

Nothing here knows tokens. Every reader is lazy and gives the same documents in the same order.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from galore_torch.train.errors import UserError

# Tables, tests and vendored packages: little of it reads like a program.
_SKIPPED_FOLDERS = frozenset(
    {
        *("test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"),
        *("lib2to3", "encodings", "pydoc_data", "turtledemo", "ensurepip"),
    }
)
_STDLIB_CHARS = 4_000_000  # about 1.2 M tokens, twice what the demo reads
_JSONL = (".jsonl", ".json")  # C4's own files are .json.gz, one object a line
_KINDS = (".txt", *_JSONL, ".parquet")
_TXT_BLOCK_CHARS = 4096  # a .txt file is cut at the first blank line after this many
_TXT_BLOCK_LIMIT = 65536  # ... or, where no blank line comes, at a line end after this many


def stdlib_documents(root: Path | None = None) -> Iterator[str]:
    """Source files of the running Python's standard library, in an order that mixes packages.

    `root` defaults to the interpreter's library folder.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and not any(part.startswith("config-") for part in path.relative_to(root).parts)
    ]
    if len(names) < 2:
        raise UserError(
            f"the standard library at {root} has {len(names)} source files, at least 2 are needed; give your own text with --data FILE"
        )
    chars = 0
    # The hash of the name is an order that depends on nothing but the name.
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if text:
            yield text
            chars += len(text)
        if chars > _STDLIB_CHARS:
            return


def text_files(names: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """The files that paths, folders (all text files below them) and patterns with * stand for, each sorted by name."""
    files: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if file.is_file() and kind_of(file) in _KINDS)
            lacks = "is a folder without text files"
        elif not path.exists() and any(letter in name for letter in "*?["):
            found = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
            lacks = "matches no file"
        else:
            found, lacks = [name], ""
        if not found:
            raise UserError(f"{flag} {name} {lacks}; give .txt, .jsonl, .json (each also .gz) or .parquet files")
        files += found
    return tuple(files)


def check_files(files: tuple[str, ...], flag: str) -> None:
    """Refuse, before anything is read, files that are missing, empty or of an unknown kind."""
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{flag} {name} does not exist; give the path of a text file")
        if path.stat().st_size == 0:
            raise UserError(f"{flag} {name} is empty (0 bytes); give a file with text")
        if kind_of(path) not in _KINDS:
            raise UserError(f"{flag} {name} is of unknown kind {path.suffix!r}; give .txt, .jsonl, .json (each also .gz) or .parquet")


def has_fields(files: tuple[str, ...]) -> bool:
    """Whether any of `files` is of a kind whose rows have named fields."""
    return any(kind_of(Path(name)) in (*_JSONL, ".parquet") for name in files)


def file_documents(files: tuple[str, ...], text_field: str) -> Iterator[str]:
    """The documents of all `files` in order: a jsonl line, a parquet row, a block of a txt file."""
    for name in files:
        path = Path(name)
        kind = kind_of(path)
        if kind == ".parquet":
            documents = _parquet_documents(path, text_field)
        elif kind in _JSONL:
            documents = _jsonl_documents(path, text_field)
        else:
            documents = _txt_documents(path)
        found = False
        for document in documents:
            if document.strip():
                found = True
                yield document
        if not found:
            raise UserError(f"{name} holds no text; give a file with text")


def kind_of(path: Path) -> str:
    """.jsonl of a.jsonl and of a.jsonl.gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a plain or gzip file; UserError where it is damaged."""
    try:
        with (
            gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig") as text,
        ):
            yield from text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}; is it whole, and really gzip?") from error


def _txt_documents(path: Path) -> Iterator[str]:
    block: list[str] = []
    chars = 0
    for line in lines_of(path):
        block.append(line)
        chars += len(line)
        if (chars >= _TXT_BLOCK_CHARS and not line.strip()) or chars >= _TXT_BLOCK_LIMIT:
            yield "".join(block)
            block, chars = [], 0
    yield "".join(block)


def _jsonl_documents(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else f"it is {'null' if row is None else 'no object'}"
            if isinstance(row, dict) and text_field in row:
                has = f"it is {'null' if text is None else type(text).__name__} there"
            raise UserError(f"{path} line {number} has no text in {text_field!r}: {has}; name the right one with --text_field")
        yield encodable(text)


def encodable(text: str) -> str:
    """JSON can escape half of a surrogate pair, which no tokenizer takes: it becomes "?"."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file that can be read: {error}") from error
    with table:
        if text_field not in table.schema_arrow.names:
            has = ", ".join(map(repr, table.schema_arrow.names))
            raise UserError(f"{path} has no column {text_field!r}, it has {has}; name the right one with --text_field")
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    if not isinstance(text, str):
                        raise UserError(
                            f"{path} column {text_field!r} holds {type(text).__name__}, not text; name another with --text_field"
                        )
                    yield text
