"""Tokenizers: one the user names, or a byte-level BPE trained on the corpus once and cached."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_torch.train.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_SMALLEST_BPE = 257  # the 256 bytes and the end-of-text token
_RECIPE = "byte-level bpe, no prefix space, end of text first, v1"  # part of the cache key


@dataclass(frozen=True)
class TextTokenizer:
    """A transformers tokenizer (`fast`), the number of ids it can emit, and where it came from."""

    fast: Any
    size: int
    end_id: int | None
    source: str
    markers_left_out: bool = False

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        encodings = self.fast.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        if self.markers_left_out:
            unknown = self.fast.unk_token_id
            ids = [[unknown if i >= self.size else i for i in text] for text in ids]
        return ids

    def within(self, rows: int, cure: str = "") -> TextTokenizer:
        """This tokenizer for an embedding of `rows`; UserError with the `cure` where text can have an id past its end.

        Special tokens past the end, such as T5's hundred sentinels behind the published 32,000 rows, are no part of text:
        where a text spells one, it becomes the unknown token. Those that end, begin or stand for text need rows.
        """
        special = self.fast.added_tokens_decoder
        past = {i for i in self.fast.get_vocab().values() if i >= rows}
        if not past:
            return self
        unknown = self.fast.unk_token_id
        left_out = past - {unknown, self.end_id, self.fast.bos_token_id}  # what the run itself uses cannot be
        if unknown is None or not all(i in left_out and i in special and special[i].special for i in past):
            raise UserError(
                f"the tokenizer has {self.size} ids, more than the {rows} rows of the model's "
                f"vocabulary; {cure or f'give --vocab_size {self.size} or more, or a smaller tokenizer'}"
            )
        return replace(self, size=rows, markers_left_out=True)


def cache_folder() -> Path:
    """Where trained tokenizers are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "galore-torch"


def load_tokenizer(name: str) -> TextTokenizer:
    """A tokenizer from a tokenizers file, a tokenizers or transformers folder, or by its name on the hub, such as t5-base."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    if not path.exists():
        return _hub_tokenizer(name)
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"--tokenizer {name} holds neither tokenizer_config.json nor tokenizer.json; "
                "give a folder made by save_pretrained or a tokenizers file"
            )
    try:
        if path.is_dir():
            fast: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        else:
            fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises bare Exception on a file it cannot parse
        raise UserError(f"--tokenizer {name} cannot be loaded: {first_line(error)}") from error
    return _wrap(fast, name)


def _hub_tokenizer(name: str) -> TextTokenizer:
    from transformers import AutoTokenizer

    missing = f"--tokenizer {name} does not exist; give a folder, a tokenizer.json or a name that the hub gives"
    if name.count("/") > 1 or name.startswith(("/", ".", "~")) or name.endswith(".json"):
        raise UserError(missing)  # a path: the hub has no such names
    try:
        return _wrap(AutoTokenizer.from_pretrained(name), f"{name} from the hub")
    except UserError:
        raise
    except Exception as error:  # what a network, a hub or a foreign file raises has no common class
        raise UserError(f"{missing} (it says: {first_line(error)})") from error


def trained_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` ids for `texts`, from the cache where it is there.

    The cache key is the content: other text or another size is another file.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_BPE:
        raise UserError(
            f"--vocab_size {vocab_size} is too small for a byte-level BPE; give at least {_SMALLEST_BPE}, or a --tokenizer of your own"
        )
    texts = list(texts)
    digest = hashlib.sha256(f"{_RECIPE} {vocab_size}".encode())
    for text in texts:
        data = text.encode("utf-8", errors="replace")
        digest.update(len(data).to_bytes(8, "little") + data)
    cached = cache_folder() / f"bpe-{vocab_size}-{digest.hexdigest()[:24]}.json"
    backend = _read_cached(cached)
    source = f"byte-level BPE from {cached}"
    if backend is None:
        backend = _train_bpe(texts, vocab_size)
        if not _write_cached(cached, backend):
            source = f"byte-level BPE, trained now ({cached.parent} cannot be written)"
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    return _wrap(fast, source)


def _wrap(fast: Any, source: str) -> TextTokenizer:
    if not hasattr(fast, "backend_tokenizer"):
        raise UserError(f"--tokenizer {source} has no fast form; convert it to a tokenizer.json")
    vocabulary = fast.get_vocab()
    if not vocabulary:
        raise UserError(f"--tokenizer {source} has an empty vocabulary; give a trained tokenizer")
    if fast.eos_token_id is None:
        # A bare tokenizers file does not say which token ends a text; its name tells.
        fast.eos_token = next((name for name in _END_NAMES if name in vocabulary), None)
    return TextTokenizer(fast, max(vocabulary.values()) + 1, fast.eos_token_id, source)


def _train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _read_cached(path: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception:  # absent, unreadable or damaged: train again, the file is replaced
        return None


def _write_cached(path: Path, tokenizer: Tokenizer) -> bool:
    """Write through a temporary file, so that no other process ever reads half a tokenizer."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str())
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True
