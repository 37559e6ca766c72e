"""The trained BPE is lossless and trained once; a named tokenizer is loaded from each form it comes in."""

from __future__ import annotations

from pathlib import Path

import pytest

from galore_torch.train.data import tokenizer as module
from galore_torch.train.data.tokenizer import TextTokenizer, _wrap, cache_folder, load_tokenizer, trained_tokenizer
from galore_torch.train.errors import UserError

TEXTS = ["def f(x):\n\treturn x  # naïve\n", "class A:\n    pass\n"] * 30


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def count_trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    trained: list[int] = []
    train = module._train_bpe

    def counting(texts: list[str], vocab_size: int) -> object:
        trained.append(vocab_size)
        return train(texts, vocab_size)

    monkeypatch.setattr(module, "_train_bpe", counting)
    return trained


def test_any_text_comes_back_whole(empty_cache: Path) -> None:
    tokenizer = trained_tokenizer(TEXTS, 300)
    text = "an unseen «text»\n\twith 日本語 and  two spaces"
    assert tokenizer.fast.backend_tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert 257 <= tokenizer.size <= 300
    assert tokenizer.end_id == 0


def test_trained_once_then_read_from_the_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = count_trainings(monkeypatch)
    first, second = trained_tokenizer(TEXTS, 300), trained_tokenizer(iter(TEXTS), 300)
    assert trained == [300]
    assert first.fast.get_vocab() == second.fast.get_vocab()
    assert [path.suffix for path in empty_cache.iterdir()] == [".json"], "a temporary file is left"


def test_other_text_or_size_is_another_tokenizer(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = count_trainings(monkeypatch)
    trained_tokenizer(TEXTS, 300)
    trained_tokenizer(TEXTS, 280)
    trained_tokenizer(TEXTS[1:], 300)
    trained_tokenizer(["".join(TEXTS)], 300)
    assert trained == [300, 280, 300, 300]


def test_damaged_cache_file_is_replaced(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = count_trainings(monkeypatch)
    trained_tokenizer(TEXTS, 300)
    (cached,) = empty_cache.iterdir()
    whole = cached.read_text()
    cached.write_text(whole[:100])
    trained_tokenizer(TEXTS, 300)
    assert trained == [300, 300]
    assert cached.read_text() == whole


def test_cache_that_cannot_be_written_is_said_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be written" in trained_tokenizer(TEXTS, 300).source


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"--vocab_size 200.*257"):
        trained_tokenizer(TEXTS, 200)


def test_tokenizers_file_and_both_folders_load(tmp_path: Path) -> None:
    made = trained_tokenizer(TEXTS, 300)
    made.fast.save_pretrained(tmp_path / "transformers")
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "tokenizer.json"
    made.fast.backend_tokenizer.save(str(bare))
    for name in (tmp_path / "transformers", tmp_path / "bare", bare):
        loaded = load_tokenizer(str(name))
        assert loaded.encode(TEXTS[:2]) == made.encode(TEXTS[:2])
        assert (loaded.size, loaded.end_id) == (made.size, made.end_id)


def test_unusable_tokenizers_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"neither tokenizer_config.json nor tokenizer.json"):
        load_tokenizer(str(tmp_path))
    broken.write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(broken))
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))


def sentinels(tmp_path: Path, *, special: bool = True) -> TextTokenizer:
    """T5's kind: 40 words and, behind them, two markers."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 40)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<unk>", "</s>"])
    words.add_tokens([AddedToken("<extra_id_0>", special=special), AddedToken("<extra_id_1>", special=special)])
    words.save(str(tmp_path / "tokenizer.json"))
    named = load_tokenizer(str(tmp_path / "tokenizer.json"))
    named.fast.unk_token = "<unk>"
    return named


def test_special_tokens_past_the_models_rows_are_unknown_in_text(tmp_path: Path) -> None:
    """The published recipes give T5's 32,100 ids to 32,000 rows: text never has the others but where it spells them."""
    named = sentinels(tmp_path)
    assert named.size == 42
    assert named.encode(["w3 <extra_id_1> w39"]) == [[3, 41, 39]]
    fewer = named.within(40)
    assert fewer.size == 40
    assert fewer.encode(["w3 <extra_id_1> w39", "</s>"]) == [[3, 0, 39], [1]]
    assert named.within(42) is named


def test_ordinary_tokens_past_the_models_rows_are_refused(tmp_path: Path) -> None:
    for rows, named in ((39, sentinels(tmp_path)), (40, sentinels(tmp_path, special=False))):
        with pytest.raises(UserError, match=rf"42 ids, more than the {rows} rows.*--vocab_size 42"):
            named.within(rows)
    without = sentinels(tmp_path)
    without.fast.unk_token = None
    with pytest.raises(UserError, match="42 ids, more than the 40 rows"):
        without.within(40)


@pytest.mark.parametrize("role", ["unk_token", "eos_token", "bos_token"])
def test_special_tokens_that_the_run_needs_are_refused_past_the_models_rows(role: str, tmp_path: Path) -> None:
    """GPT-2's kind: the token behind a document, or for unknown text, is the last one."""
    named = sentinels(tmp_path)
    setattr(named.fast, role, "<extra_id_1>")
    with pytest.raises(UserError, match="42 ids, more than the 40 rows"):
        _wrap(named.fast, "here").within(40)


def test_t5_in_the_published_rows(shared_data: Path) -> None:
    named = load_tokenizer(str(shared_data / "tokenizers" / "t5"))
    assert named.size == 32_100
    assert named.within(32_000).encode(["Thank <extra_id_0> you"]) == [[1562, 2, 25]]
