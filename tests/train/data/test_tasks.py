"""Own examples for classification and regression: what is inferred, and what is refused in one line."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch.train.config.finetune import GLUE_TASKS, FinetuneConfig
from galore_torch.train.data.answers import label_names
from galore_torch.train.data.glue import GLUE
from galore_torch.train.data.own_files import held_out
from galore_torch.train.data.tasks import load_labelled
from galore_torch.train.errors import UserError
from galore_torch.train.model.heads import LabelLoss, load_classifier
from support import tasks

Make = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT of width 32, which these tests only read."""
    return tasks.bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def make(model: str, tmp_path: Path) -> Make:
    """A config for the rows of a file."""

    def config(rows: list[dict[str, Any]], held: list[dict[str, Any]] | None = None, **changes: Any) -> FinetuneConfig:
        files: dict[str, Any] = {"train_file": (tasks.write(tmp_path / "train.jsonl", rows),)}
        if held is not None:
            files["validation_file"] = (tasks.write(tmp_path / "dev.jsonl", held),)
        return FinetuneConfig(**({"hf_model": model, "task_name": "classification", "device": "cpu"} | files | changes))

    return config


def test_classes_are_those_of_the_training_examples(make: Make) -> None:
    """Words by alphabet; the model's config has their names, and the held-out answers their numbers."""
    rows = [{"text": "w1 w2", "label": label} for label in ("sport", "art", "news", "art")]
    data = load_labelled(make(rows, [{"text": "w3", "label": "news"}]))
    assert data.labels == ("art", "news", "sport")
    assert data.train.targets.tolist() == [2, 0, 1, 0]
    assert data.held_out[""].targets.tolist() == [1]
    assert data.scores == ("accuracy", "macro_f1")
    model = load_classifier(make(rows).hf_model or "", data.labels)
    assert model.config.id2label == {0: "art", 1: "news", 2: "sport"}


def test_numbers_are_classes_by_size() -> None:
    assert label_names(("line", value) for value in (10, 9, "2", 2.0)) == ("2", "9", "10")


@pytest.mark.parametrize("period", [2, 5, 10, 20])
def test_a_tenth_is_held_out_of_each_class_whatever_the_order(period: int, make: Make) -> None:
    """Files with a pattern, and sorted ones (20); the same examples for every seed."""
    rows = [{"text": f"w{index}", "label": index % period * 2 // period} for index in range(40)]
    data = load_labelled(make(rows))
    assert (len(data.train), len(data.held_out[""])) == (36, 4)
    assert data.held_out[""].targets.bincount().tolist() == [2, 2]
    assert data.scores == ("accuracy", "f1")
    assert load_labelled(make(rows, seed=7)).held_out_fingerprint == data.held_out_fingerprint


@pytest.mark.parametrize("least", [1, 2])
def test_every_class_is_trained_on_and_none_is_drawn_beyond_its_share(least: int) -> None:
    draw = random.Random(0)
    for length in range(1, 60):
        kinds = draw.choices("abc", weights=(10, 3, 1), k=length)
        held = held_out(kinds, least)
        spare = length - len(set(kinds))
        assert len(held) == min(max(least, math.ceil((length - 1) / 10)), spare)
        for kind, number in Counter(kinds).items():
            drawn = sum(kinds[index] == kind for index in held)
            assert drawn < number
            assert drawn <= math.ceil((number - 1) * len(held) / max(1, spare))


def test_one_example_of_each_class_leaves_none_to_hold_out(make: Make) -> None:
    with pytest.raises(UserError, match="has one example of each of 2 classes, so that none can be held out; give more, or --validation"):
        load_labelled(make([{"text": "w1", "label": label} for label in (1, 0)]))
    data = load_labelled(make([{"text": "w1", "label": label} for label in (0, 1, 0)]))
    assert (sorted(data.train.targets.tolist()), data.held_out[""].targets.tolist()) == ([0, 1], [0])


@pytest.mark.parametrize(
    ("columns", "says"),
    [(("text", "text"), "a pair is of two columns"), (("text", "label"), "has the answer, --label_column label, in the text")],
)
def test_columns_that_say_nothing_more_are_refused(columns: tuple[str, ...], says: str, make: Make) -> None:
    with pytest.raises(UserError, match=says):
        make([{"text": "w1", "label": 0}], text_columns=columns)


def test_two_columns_of_one_name_are_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,text,label\nw1,w2,0\nw3,w4,1\nw5,w6,1\n")
    with pytest.raises(UserError, match=r"own.csv has two columns 'text', of which one would be lost"):
        load_labelled(make([], train_file=(str(tmp_path / "own.csv"),)))


@pytest.mark.parametrize("task", ["mrpc", "rte"])
def test_a_task_of_numbers_has_classes_with_names(task: str, model: str, tmp_path: Path) -> None:
    data = load_labelled(FinetuneConfig(hf_model=model, task_name=task, data_dir=tasks.glue(tmp_path / "glue", task=task)))
    assert data.labels == GLUE[task].classes
    assert load_classifier(model, data.labels or ()).config.id2label == dict(enumerate(GLUE[task].classes))


@pytest.mark.parametrize("number", [3, 10, 11, 12, 40])
def test_two_numbers_at_least_are_held_out(number: int, make: Make) -> None:
    """Of one there is no correlation; from 12 rows on it is a tenth."""
    data = load_labelled(make([{"text": f"w{index}", "label": index / 7} for index in range(number)], task_name="regression"))
    held = max(2, -(-(number - 1) // 10))
    assert (len(data.train), len(data.held_out[""])) == (number - held, held)


@pytest.mark.parametrize(
    ("train", "held", "says"),
    [
        (2, None, "train.jsonl has 2 examples, of which 2 would be held out; give more, or --validation_file too"),
        (1, None, "train.jsonl has one example; give more, or --validation_file too"),
        (5, 1, "dev.jsonl has 1 example to evaluate on, and a correlation is of at least 2; give more"),
    ],
)
def test_too_few_numbers_to_correlate_are_refused(train: int, held: int | None, says: str, make: Make) -> None:
    rows = [{"text": "w1", "label": index / 2} for index in range(5)]
    with pytest.raises(UserError) as caught:
        load_labelled(make(rows[:train], None if held is None else rows[:held], task_name="regression"))
    assert says in str(caught.value)


CSV = {
    "written by pandas": (",text,label\n0,w1 w2,1\n1,w3,0\n2,w4,0\n", ("text",)),
    "with stars": ("text,label,stars\nw1 w2,1,5\nw3,0,\nw4,0,4.5\n", ("text",)),
    "with rows' names": ("Unnamed: 0,ID,a,b,label\n0,x1,w1,w2,1\n1,x2,4,w4,0\n2,x3,5,w6,0\n", ("a", "b")),
}


@pytest.mark.parametrize("case", CSV)
def test_numbers_of_a_csv_are_no_text(case: str, make: Make, tmp_path: Path) -> None:
    """Those of rows, and what may tell the answer; a column with one cell of words is text. What was read is printed and recorded."""
    text, columns = CSV[case]
    (tmp_path / "own.csv").write_text(text)
    config = make([], train_file=(str(tmp_path / "own.csv"),))
    data = load_labelled(config)
    assert data.columns == columns
    assert (
        data.train.batch([0])[0]["input_ids"][0].tolist()
        == tasks.tokenizer()(*["w1 w2"] if len(columns) == 1 else ("w1", "w2"))["input_ids"]
    )
    assert data.amount(config).startswith(" and ".join(map(repr, columns)) + " of 2 examples in ")
    assert data.record()["text_columns"] == list(columns)


@pytest.mark.parametrize("first", [{"context": None}, {"context": ""}, {}])
def test_text_columns_are_those_of_all_rows(first: dict[str, Any], make: Make) -> None:
    """Not of the first one alone: a row without a text is named, an empty one is read."""
    rows = [{"text": "w1", "label": 0} | first, {"text": "w2", "context": "w3", "label": 1}]
    if first.get("context") == "":
        assert load_labelled(make(rows, rows)).columns == ("text", "context")
        return
    has = "it is null there" if first else "it has 'text', 'label'"
    with pytest.raises(UserError, match=f"train.jsonl line 1 has no text in 'context': {has}; name the right columns"):
        load_labelled(make(rows, rows))


def test_regression_takes_any_number(make: Make) -> None:
    rows = [{"a": "w1", "b": "w2", "score": value} for value in (0.5, "1e2", -3)]
    data = load_labelled(make(rows, rows[:2], task_name="regression", label_column="score", text_columns=("b", "a")))
    assert data.train.targets.tolist() == [0.5, 100.0, -3.0]
    assert (data.labels, data.scores) == ((), ("pearson", "spearman"))
    ids = data.train.batch([0])[0]["input_ids"][0].tolist()
    assert ids == tasks.tokenizer()("w2", "w1")["input_ids"]


@pytest.mark.parametrize(
    ("rows", "says", "settings"),
    [
        ([{"text": "w1"}], "line 1 has no column 'label', it has 'text'; name the right one with --label_column", {}),
        ([{"text": "w1", "label": None}], "line 1 has no answer in 'label'", {}),
        ([{"text": "w1", "label": 1}] * 2, "every example has the label '1'", {}),
        ([{"text": "w1", "label": 1.5}], "the label 1.5 is no class; for numbers give --task_name regression", {}),
        ([{"text": "w1", "label": [1]}], "the label is list, not a class", {}),
        ([{"text": "w1", "label": index} for index in range(30)], "30 different labels", {}),
        (
            [{"text": "w1", "label": "x"}] * 2,
            "the answer 'x' is no number; for classes give --task_name classification",
            {"task_name": "regression"},
        ),
        ([{"text": "w1", "label": math.nan}] * 2, "the answer nan is no number", {"task_name": "regression"}),
        (
            [{"text": "w1", "label": 3e38}, {"text": "w1", "label": 1e39}],
            "line 2: the answer 1e+39 is beyond 3.4e+38, the largest that float32 holds; scale the answers down",
            {"task_name": "regression"},
        ),
        ([{"text": "w1", "label": -(10**400)}] * 2, "line 1: the answer inf is beyond 3.4e+38", {"task_name": "regression"}),
        ([{"a": "w", "b": "w", "c": "w", "label": index} for index in (0, 1)], "has text in 'a', 'b', 'c'; name the one or two", {}),
        ([{"label": index} for index in (0, 1)], "has text in no column", {}),
        ([{"text": "w", "label": index} for index in (0, 1)], "has no text in 'body': it has 'text', 'label'", {"text_columns": ("body",)}),
        ([{"text": "w", "label": 0}, {"text": 5, "label": 1}], "line 2 has no text in 'text': it is int there", {}),
    ],
)
def test_bad_examples_name_their_line(rows: list[dict[str, Any]], says: str, settings: dict[str, Any], make: Make) -> None:
    with pytest.raises(UserError) as caught:
        load_labelled(make(rows, rows, **settings))
    assert says in str(caught.value)


def test_class_that_training_does_not_have_is_refused(make: Make) -> None:
    rows = [{"text": "w1", "label": label} for label in ("yes", "no")]
    with pytest.raises(UserError, match=r"dev.jsonl line 2: the label 'maybe' is none of 'no', 'yes'"):
        load_labelled(make(rows, [rows[0], {"text": "w1", "label": "maybe"}]))


def test_hidden_answers_of_a_test_set_are_refused(model: str, tmp_path: Path) -> None:
    """GLUE's test files have -1 everywhere."""
    folder = tasks.glue(tmp_path / "glue", task="rte")
    tasks.write(tmp_path / "glue" / "rte" / "dev.jsonl", [row | {"label": -1} for row in tasks.examples(3)])
    config = FinetuneConfig(hf_model=model, task_name="rte", data_dir=folder)
    with pytest.raises(UserError, match="the label '-1' is none of 'entailment', 'not_entailment', '0', '1'"):
        load_labelled(config)


@pytest.mark.parametrize("family", ["bert", "llama", "roberta", "xlnet"])
def test_padding_changes_no_answer(family: str, make: Make, tmp_path: Path) -> None:
    """An example alone, and in a batch with longer ones; of a decoder whose tokenizer names no padding too, and of XLNet, which
    reads the last place of all."""
    model = getattr(tasks, family)(tmp_path / family)
    rows = [{"text": "w1 w2 w3 w4 w5 w6 w7 w8", "label": 0}, {"text": "w9 good", "label": 1}]
    data = load_labelled(make(rows, rows, hf_model=model))
    loss = LabelLoss(load_classifier(model, ("0", "1")).eval(), regression=False)
    loss.model.config.pad_token_id = data.tokenizer.fast.pad_token_id
    assert data.tokenizer.fast.pad_token_id is not None
    together = loss(data.train.batch([0, 1])[0])
    for row in (0, 1):
        torch.testing.assert_close(loss(data.train.batch([row])[0])[0], together[row])


def test_long_pairs_are_cut_to_the_length(make: Make) -> None:
    long = " ".join(["w1"] * 100)
    rows = [{"a": long, "b": "w2", "label": index} for index in (0, 1)]
    assert load_labelled(make(rows, rows, max_length=10)).train.lengths.tolist() == [10, 10]


@pytest.mark.parametrize(("columns", "length"), [(("a",), 2), (("a", "b"), 2), (("a", "b"), 3), (("a", "b"), 4)])
def test_length_without_room_for_the_texts_is_refused(columns: tuple[str, ...], length: int, make: Make) -> None:
    """Below the number of special tokens a tokenizer does not cut at all."""
    rows = [{"a": "w1 w2", "b": "w3 w4 w5", "label": index} for index in (0, 1)]
    least = 3 if len(columns) == 1 else 5
    with pytest.raises(
        UserError, match=rf"--max_length {length} leaves no room .* {least - len(columns)} special tokens; give at least {least}"
    ):
        load_labelled(make(rows, rows, max_length=length, text_columns=columns))
    assert load_labelled(make(rows, rows, max_length=least, text_columns=columns)).train.lengths.tolist() == [least, least]


@pytest.mark.parametrize("task", [name for name in GLUE if GLUE[name].classes])
def test_words_are_numbered_in_the_order_of_the_task(task: str) -> None:
    """And not by alphabet, which makes 0 of MRPC's `equivalent`, whose f1 is the task's. One class alone will do, and numbers."""
    classes = GLUE[task].classes
    assert label_names((("line", name) for name in sorted(classes)), classes) == classes
    assert label_names([("line", classes[-1])], classes) == classes
    assert label_names((("line", number) for number in reversed(range(len(classes)))), classes) == classes


def test_hub_order_of_the_tasks_whose_score_is_of_one_class() -> None:
    assert GLUE["mrpc"].classes == ("not_equivalent", "equivalent")
    assert GLUE["qqp"].classes == ("not_duplicate", "duplicate")


@pytest.mark.parametrize(("labels", "strange"), [((1, 2), "2"), (("no", "yes"), "no"), ((0, "equivalent"), "0"), ((0, -1), "-1")])
def test_labels_that_are_not_the_task_s_are_refused(labels: tuple[Any, ...], strange: str, model: str, tmp_path: Path) -> None:
    folder = tasks.glue(tmp_path / "glue")
    tasks.write(tmp_path / "glue" / "mrpc" / "train.jsonl", [tasks.examples(1)[0] | {"label": label} for label in labels])
    says = f"train.jsonl line {[str(label) for label in labels].index(strange) + 1}: the label '{strange}' is no class of the task"
    with pytest.raises(UserError, match=rf"{says}, .*; give 'not_equivalent', 'equivalent', or 0 to 1 in place of all"):
        load_labelled(FinetuneConfig(hf_model=model, task_name="mrpc", data_dir=folder))


def test_every_task_that_the_command_names_has_a_reader() -> None:
    assert tuple(GLUE) == GLUE_TASKS
