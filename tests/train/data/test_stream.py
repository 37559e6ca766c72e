"""Streamed text: the batches of the documents in order, whatever the number of threads, from any batch on; and whole runs."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch.train.checkpoint.storage import checkpoints_in
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData, load_data
from galore_torch.train.data.sampler import Documents
from galore_torch.train.data.sources import FileSource
from galore_torch.train.data.streaming import StreamedBatches
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.loss import IGNORED, counted
from support.texts import document
from support.whole_runs import Silent, command, rows

Make = Callable[..., PretrainConfig]


@pytest.fixture
def three_files(tmp_path: Path) -> tuple[str, ...]:
    """70 documents of about 40 tokens, in a jsonl, a txt and another jsonl file."""
    parts = {"a.jsonl": range(30), "b.txt": [30], "c.jsonl": range(31, 70)}
    for name, indices in parts.items():
        lines = [json.dumps({"text": document(i)}) if name.endswith("jsonl") else document(i) for i in indices]
        (tmp_path / name).write_text("\n".join(lines))
    return tuple(str(tmp_path / name) for name in parts)


@pytest.fixture
def streamed(make_config: Make, three_files: tuple[str, ...]) -> Make:
    def make(**changes: Any) -> PretrainConfig:
        return make_config(data=three_files, stream=True, **changes)

    return make


def drawn(data: TokenData, config: PretrainConfig, count: int, state: dict[str, int] | None = None) -> list[tuple[Tensor, Tensor]]:
    stream = data.batches(config, state)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def equal(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_packed_stream_is_the_text_that_memory_would_hold(streamed: Make) -> None:
    """In file order, validation documents left out: the oracle is the same text read into memory, window after window."""
    config = streamed()
    tokens = load_data(replace(config, stream=False, num_training_steps=1000)).train
    stream = load_data(config)
    assert len(stream.train) == 0
    count = (len(tokens) - 1) // 16
    found = torch.cat([torch.cat(pair, dim=1) for pair in drawn(stream, config, count // 4)])
    windows = tokens.unfold(0, 17, 16)[: len(found)].long()
    assert torch.equal(found, torch.cat([windows[:, :-1], windows[:, 1:]], dim=1))


def test_padded_stream_is_one_document_a_row(streamed: Make) -> None:
    config = streamed(pad_documents=True, max_length=32)
    in_memory = load_data(replace(config, stream=False, num_training_steps=1000)).train
    assert in_memory.shape[1] == 33
    found = torch.cat([targets for _, targets in drawn(load_data(config), config, len(in_memory) // 4)])
    assert torch.equal(found, in_memory[: len(found), 1:].long())


def test_padded_text_in_memory_is_seen_once_a_pass(make_config: Make) -> None:
    config = make_config(pad_documents=True, max_length=64, batch_size=3, num_training_steps=1000)
    data = load_data(config)
    assert len(data.train) == 57, "60 documents, 3 of them held out"
    seen = Counter(tuple(row.tolist()) for _, targets in drawn(data, config, 19) for row in targets)
    assert seen == Counter(tuple(row[1:].tolist()) for row in data.train)
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("eval_tokens", [64, 128, 150])
def test_padded_documents_are_evaluated_up_to_the_tokens_asked_for(eval_tokens: int, make_config: Make) -> None:
    """As many documents as have no more targets together; the next one would be too many."""
    everything = load_data(make_config(pad_documents=True, max_length=64)).held_out
    held = load_data(make_config(pad_documents=True, max_length=64, eval_tokens=eval_tokens)).held_out
    assert torch.equal(held, everything[: len(held)])
    assert counted(held[:, 1:]) <= eval_tokens < counted(everything[: len(held) + 1, 1:])


@pytest.mark.parametrize("pad", [False, True])
def test_threads_change_no_batch(streamed: Make, pad: bool) -> None:
    """Three passes over the text."""
    config = streamed(pad_documents=pad, max_length=32)
    data = load_data(config)
    in_place = drawn(data, replace(config, workers=0), 60)
    for workers in (1, 2, 4):
        assert equal(drawn(data, replace(config, workers=workers), 60), in_place)


@pytest.mark.parametrize("pad", [False, True])
def test_any_batch_can_be_gone_on_from(streamed: Make, pad: bool) -> None:
    """`state` is that of what was drawn, not of what is ready; the threads that go on are another number."""
    config = streamed(pad_documents=pad, max_length=32)
    data = load_data(config)
    whole = drawn(data, config, 64)
    stream = data.batches(config)
    states = [stream.state() for _ in zip(range(60), iter(stream.__next__, None), strict=False)]
    stream.close()
    assert len({state[0]["epoch"] for state in states}) == (4 if pad else 3)
    assert states[0][0] == json.loads(json.dumps(states[0][0]))
    for at in (0, 1, 7, 17, 30, 45, 59):
        assert equal(drawn(data, replace(config, workers=at % 3), 4, states[at]), whole[at + 1 : at + 5])


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(("began", "later"), [(2, 1), (1, 2), (2, 4), (4, 2), (2, 3), (3, 2), (4, 6)])
def test_another_number_of_processes_goes_on_with_the_rows_of_each_step(streamed: Make, began: int, later: int, pad: bool) -> None:
    """12 rows a step, 6 steps. Oracle: the processes that began, never stopped; from step to step, rank after rank, row after row."""

    def steps(processes: int, count: int, lanes: Any = None) -> tuple[list[Tensor], dict[int, Any]]:
        config = streamed(pad_documents=pad, max_length=32, batch_size=12 // processes, processes=processes, workers=processes % 2)
        found, known = [], {}
        for rank in range(processes):
            stream = data.batches(config, lanes, rank)
            found.append(torch.stack([torch.cat(next(stream), dim=1) for _ in range(count)]))
            known |= stream.state()
            stream.close()
        return list(torch.stack(found, dim=2).flatten(1, 2)), known  # (step, row of the run, place)

    data = load_data(streamed(pad_documents=pad, max_length=32))
    whole, end = steps(began, 6)
    first, lanes = steps(began, 2)
    middle, lanes = steps(later, 2, lanes)
    last, lanes = steps(began, 2, lanes)
    assert all(torch.equal(mine, other) for mine, other in zip([*first, *middle, *last], whole, strict=True))
    assert lanes == end


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_document_is_trained_on_once_a_pass_over_ranks_and_threads(streamed: Make, ranks: int, workers: int) -> None:
    """Counted in the batches themselves, by the number at the end of each document; one row a document."""
    config = streamed(pad_documents=True, max_length=64, batch_size=1, processes=ranks, workers=workers)
    data = load_data(config)
    seen: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
    for rank in range(ranks):
        stream = data.batches(config, rank=rank)
        epoch = 0
        while True:
            _, targets = next(stream)
            (state,) = stream.state().values()
            if state["epoch"] == 2:
                break
            kept = targets[targets != IGNORED]
            text = data.tokenizer.fast.decode(kept, skip_special_tokens=True)
            seen[state["epoch"]][text.rpartition(" end ")[2].rstrip(".")] += 1
            epoch = state["epoch"]
        assert epoch == 1
        stream.close()
    assert seen[0] == seen[1] == Counter(str(index) for index in range(70) if index % 20 != 1)


def loading() -> list[str]:
    """Threads that read or tokenise."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "tokenize"))]


def test_threads_end_with_the_run_also_with_one_that_fails(streamed: Make, three_files: tuple[str, ...], tmp_path: Path) -> None:
    """And what a thread found wrong is what the run says; what was trained until then is saved and gone on from."""
    config = streamed(num_training_steps=40, batch_size=4, save_every=0)
    data = load_data(config)
    train(config, "adamw", 0.01, data, _made(tmp_path / "whole"), Silent())
    assert not loading()
    good = Path(three_files[2]).read_text()
    lines = good.splitlines()
    Path(three_files[2]).write_text("\n".join([*lines[:9], "{" + lines[9][1:].replace("text", "next"), *lines[10:]]))
    with pytest.raises(UserError, match=r"c.jsonl line 10 has no text in 'text'"):
        train(config, "adamw", 0.01, data, _made(tmp_path / "parts"), Silent())
    assert not loading()
    (saved,) = checkpoints_in(tmp_path / "parts" / "checkpoints")
    Path(three_files[2]).write_text(good)
    result, _ = train(config, "adamw", 0.01, data, tmp_path / "parts", Silent(), saved)
    assert result.finished
    losses = [[row["loss"] for row in rows(tmp_path / folder) if "loss" in row] for folder in ("whole", "parts")]
    assert losses[0] == losses[1]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_loop_that_is_interrupted_ends_the_threads(streamed: Make, tmp_path: Path) -> None:
    class Impatient(Silent):
        def step(self, row: dict[str, Any], total: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(streamed(), "adamw", 0.01, load_data(streamed()), tmp_path, Impatient())
    assert not loading()


class Stop(Silent):
    def __init__(self, after: int) -> None:
        self.after, self.at = after, 0

    def step(self, row: dict[str, Any], total: int) -> None:
        self.at = row["step"]

    def should_stop(self) -> bool:
        return self.at >= self.after


@pytest.mark.parametrize(
    ("pad", "stop"),
    [(False, 25), (True, 3), pytest.param(False, 3, marks=pytest.mark.slow), pytest.param(True, 25, marks=pytest.mark.slow)],
)
def test_streamed_run_resumed_is_bit_equal(streamed: Make, tmp_path: Path, pad: bool, stop: int) -> None:
    """Stopped in the first pass over three files and in the second; accumulated; gone on with other threads."""
    settings = {"pad_documents": pad, "num_training_steps": 30, "total_batch_size": 8, "max_length": 32, "eval_every": 10}
    config = streamed(**settings, workers=2)
    data = load_data(config)
    _, model = train(config, "galore_adamw", 0.01, data, _made(tmp_path / "whole"), Silent())
    train(config, "galore_adamw", 0.01, data, _made(tmp_path / "parts"), Stop(stop))
    (saved,) = checkpoints_in(tmp_path / "parts" / "checkpoints")
    (position,) = json.loads((saved / "trainer.json").read_text())["positions"]
    assert (position["epoch"] > 0) == (stop == 25)
    _, again = train(replace(config, workers=0), "galore_adamw", 0.01, data, tmp_path / "parts", Silent(), saved)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_command_says_that_it_streams_and_goes_on_with_no_other_text(streamed: Make, three_files: tuple[str, ...]) -> None:
    code, said = command(streamed())
    assert (code, "3 files, " in said, "streamed, 24 sequences of 16 tokens are to be read" in said) == (0, True, True)
    with Path(three_files[0]).open("a") as file:
        file.write("\n" + json.dumps({"text": "one more"}))
    with pytest.raises(UserError, match=r"--data gives a stream of 3 files of the names and sizes .*, but .* was trained on a stream of 3"):
        command(streamed(resume="auto"))


def test_padding_counts_for_nothing(make_config: Make, tmp_path: Path) -> None:
    """tokens_seen are targets of text; the loss is the mean over them, not over places: the oracle is a loop by hand."""
    from galore_torch.train.loop.build import model_for

    config = make_config(pad_documents=True, max_length=64, num_training_steps=2, total_batch_size=8, eval_tokens=64)
    data = load_data(config)
    result, _ = train(config, "adamw", 1e-9, data, tmp_path, Silent())
    batches = drawn(data, config, 4)
    assert result.tokens_seen == sum(int((targets != IGNORED).sum()) for _, targets in batches) < 4 * 4 * 63
    model = model_for(config, data).eval()
    losses = []
    with torch.no_grad():
        for inputs, targets in batches[:2]:
            scores = model(input_ids=inputs).logits.log_softmax(-1)
            losses += [-scores[row, at, target] for row, at in itertools.product(range(4), range(64)) if (target := targets[row, at]) >= 0]
    assert result.losses[0][1] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    evaluated = [row["eval_tokens"] for row in rows(tmp_path) if "eval_tokens" in row]
    assert set(evaluated) == {int((data.held_out[:, 1:] != IGNORED).sum())}
    assert 0 < evaluated[0] <= 64, "whole documents, as many as have no more than --eval_tokens"


def test_time_waited_for_text_is_in_the_metrics(streamed: Make, tmp_path: Path) -> None:
    train(streamed(), "adamw", 0.01, load_data(streamed()), tmp_path, Silent())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["data_s"] < row["seconds"] for row in lines if "loss" in row)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": 65}, "--workers 65 is out of bounds: give a number between 0 and 64"),
        ({"pad_documents": True, "max_train_tokens": 10000}, "--max_train_tokens 10000 and --pad_documents: .* give|--num_training_steps"),
    ],
)
def test_bad_settings_are_one_line(make_config: Make, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_config(**settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_text_without_a_target_is_no_endless_search(streamed: Make, tmp_path: Path, workers: int) -> None:
    """Documents of one token, and a tokenizer that knows no end of text."""
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter}) for letter in "abc"))
    tokenizer = replace(load_data(streamed()).tokenizer, end_id=None)
    documents = Documents(FileSource((str(path),), "text"))
    stream = StreamedBatches(documents, tokenizer, streamed(pad_documents=True, workers=workers))
    with pytest.raises(UserError, match=r"letters.jsonl has no document of 2 tokens or more; give other text, or another --tokenizer"):
        next(stream)
    stream.close()
    assert next(StreamedBatches(documents, tokenizer, streamed(workers=0)))[0].shape == (4, 16), "packed, they are text"


def test_stream_without_files_is_refused() -> None:
    from galore_torch.train.data.check import check_data

    with pytest.raises(UserError, match="--stream has no effect without --data; leave it out, or name files"):
        check_data(PretrainConfig(stream=True))


def test_workers_without_a_stream_are_noted() -> None:
    given = frozenset({"workers"})
    assert any("--workers has no effect" in note for note in PretrainConfig(workers=8, given=given).notes)
    assert not any("--workers" in note for note in PretrainConfig(workers=8, data=("a.txt",), stream=True, given=given).notes)


def test_workers_are_threads(streamed: Make) -> None:
    config = streamed(workers=0)
    stream = load_data(config).batches(config)
    next(stream)
    assert not loading()
    stream = load_data(config).batches(replace(config, workers=2))
    next(stream)
    assert len(loading()) == 3, "two that tokenise and one that reads and packs"
    stream.close()
    assert not loading()
