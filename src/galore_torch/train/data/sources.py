"""Where streamed documents come from: local files, or a data set of the Hugging Face hub. Knows no order and no tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from galore_torch.train.data.readers import file_documents
from galore_torch.train.errors import UserError, first_line

_C4 = ("allenai/c4", "en")
_LOCAL = "without a network give local files, such as --data 'c4/*.json.gz'"


class Source(Protocol):
    """Documents in `shards` that can be read alone, each always in the same order."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def identity(self) -> str:
        """What a resumed run has to find again."""

    @property
    def shards(self) -> int: ...

    @property
    def shuffled(self) -> bool:
        """Whether every pass takes the shards, and neighbouring documents, in an order of its own."""

    def documents(self, shard: int, start: int) -> Iterator[str]:
        """The documents of one shard from number `start` on; one may be blank."""


@dataclass(frozen=True)
class FileSource:
    """Local files, one a shard, in the order they are named."""

    files: tuple[str, ...]
    text_field: str
    shuffled = False

    @property
    def name(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{len(self.files)} files, {self.files[0]} to {self.files[-1]}"

    @cached_property
    def identity(self) -> str:
        """Names and sizes: reading all of the text would take as long as training on it."""
        known = "\n".join(f"{Path(name).name} {Path(name).stat().st_size}" for name in self.files)
        return f"{len(self.files)} files of the names and sizes {hashlib.sha256(known.encode()).hexdigest()[:16]}"

    @property
    def shards(self) -> int:
        return len(self.files)

    def documents(self, shard: int, start: int) -> Iterator[str]:
        return itertools.islice(file_documents((self.files[shard],), self.text_field), start, None)


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the hub, read over the network as it is needed."""

    flag: str  # --data c4
    path: str
    config: str | None
    split: str
    text_field: str
    shuffled = True

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.path, self.config, self.split)))

    @property
    def identity(self) -> str:
        return f"{self.name} of the hub"

    @cached_property
    def _dataset(self) -> Any:
        dataset = _told(lambda: _load(self.path, self.config, self.split), f"{self.flag}: {self.name} cannot be opened", _LOCAL)
        names = dataset.column_names
        if names is None:  # a data set that does not say: its first row does
            names = list(_told(lambda: next(iter(dataset)), f"{self.flag}: {self.name} cannot be read", _LOCAL))
        if self.text_field not in names:
            raise UserError(
                f"{self.flag}: {self.name} has no column {self.text_field!r}, it has {', '.join(map(repr, names))}; "
                "name the right one with --text_field"
            )
        return dataset

    @property
    def shards(self) -> int:
        return int(self._dataset.num_shards)

    def documents(self, shard: int, start: int) -> Iterator[str]:
        # The library skips rows without making Python objects of them.
        rows = iter(self._dataset.shard(self.shards, shard).select_columns(self.text_field).skip(start))
        for number in itertools.count(start):
            row = _told(
                lambda: next(rows, None),
                f"{self.flag}: {self.name} cannot be read beyond document {number} of shard {shard}",
                "what was trained so far is saved; go on with --resume auto",
            )
            if row is None:
                return
            text = row[self.text_field]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"{self.flag}: {self.name} column {self.text_field!r} holds {type(text).__name__}, not text; "
                    "name another with --text_field"
                )
            yield "" if text is None else text


def hub_source(name: str, flag: str, split: str, text_field: str) -> HubSource:
    """The data set that --data or --eval_data (`flag`) names: c4 or hf:NAME[:CONFIG]. Nothing is opened yet."""
    path, _, config = name.removeprefix("hf:").partition(":")
    if not path or path.startswith("/") or path.count("/") > 1 or "\\" in path or name.endswith(":"):
        raise UserError(f"{flag} {name} names no data set of the hub; give c4 or hf:NAME[:CONFIG], such as hf:wikitext:wikitext-2-raw-v1")
    return HubSource(f"{flag} {name}", *(_C4 if name == "c4" else (path, config or None)), split, text_field)


def split_rows(path: str, config: str, split: str) -> list[dict[str, Any]]:
    """All rows of one split of a data set of the hub."""
    return _told(
        lambda: list(_load(path, config, split)), f"{path} {config} {split} cannot be read from the hub", "give files with --data_dir"
    )


def _load(path: str, config: str | None, split: str) -> Any:
    """The one place where a name becomes a data set."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError('streaming from the hub needs the package datasets: pip install "galore-torch[train]"') from error
    return load_dataset(path, config, split=split, streaming=True)


def _told(read: Callable[[], Any], what: str, cure: str) -> Any:
    """`read`(), whose failure becomes one line."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # what a network, a hub or a foreign file raises has no common class
        if "Bad split" in str(error):
            cure = "give the validation text with --eval_data"
        raise UserError(f"{what} ({first_line(error)}); {cure}") from error
