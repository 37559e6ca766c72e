"""The benchmark commands run: each at its smallest size, in a process of their own, without any peer that is not torch's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support import tasks
from support.forked import Forked

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")


PEERS = ["--shapes", "demo", "--peers", "galore-torch", "torch"]
MISSING = "Without galore-torch 1.0 AdamW: not installed"


def run(*command: str, forked: Forked, folder: Path) -> str:
    """What a command prints. Peers are looked for in an empty folder, and caches stay in the test's."""
    script, *arguments = command
    own = {"GALORE_PEERS": str(folder / "peers"), "XDG_CACHE_HOME": str(folder / "cache")}
    code, said = forked.run(str(BENCHMARKS / script), *arguments, **own)
    assert code == 0, said
    return said


# Script, its arguments, what it prints (each so often at least), and whether it draws a picture.
STEP_BENCHMARKS: dict[str, tuple[list[str], dict[str, int], bool]] = {
    "step_time/run.py": ([*PEERS, "--rounds", "1", "--dtype", "bfloat16"], {"| GaLoreAdamW8bit |": 1, MISSING: 1}, True),
    "step_time/gap.py": ([*PEERS, "--steps", "3", "--gap", "2", "--skip", "1"], {"| GaLoreAdamW8bit |": 1, MISSING: 1}, True),
    "step_time/memory.py": (PEERS, {"| GaLoreAdamW8bit |": 1, MISSING: 1}, True),
    "step_time/parts.py": (["--shapes", "demo", "--rounds", "1"], {"| GaLoreAdamW8bit |": 1}, False),
    "step_time/latency.py": (
        ["--shapes", "1", "--rank", "16", "--steps", "10", "--classes", "GaLoreAdamW"],
        {"| GaLoreAdamW | ": 1},
        False,
    ),
    "structured/run.py": (["--shapes", "demo", "--rounds", "1", "--processor_time"], {"| foam, compile=False |": 1}, False),
    "loss/run.py": (["--cases", "100:20", "--chunks", "8", "--width", "8", "--rounds", "1"], {"| 100 | 20 | chunks of 8 |": 1}, False),
    "refresh/energy.py": (["--layers", "1", "--steps", "2", "--gaps", "1", "--batch", "1"], {"| 1 | power, first |": 1}, False),
}
QUICK = ("step_time/run.py", "structured/run.py")


@pytest.mark.parametrize("script", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in STEP_BENCHMARKS])
def test_step_benchmark_runs_and_names_the_peer_that_is_missing(script: str, tmp_path: Path, forked: Forked) -> None:
    arguments, printed, draws = STEP_BENCHMARKS[script]
    (tmp_path / "text.txt").write_text("Of a gradient, a few directions hold nearly all. " * 100, encoding="utf-8")
    text = ["--data", str(tmp_path / "text.txt"), "--eval_data", str(tmp_path / "text.txt")] if script == "refresh/energy.py" else []
    picture = ["--picture", str(tmp_path / "picture.png")] if draws else []
    said = run(script, *arguments, *text, *picture, forked=forked, folder=tmp_path)
    for words, times in printed.items():
        assert said.count(words) >= times, words
    assert (tmp_path / "picture.png").exists() == draws


@pytest.mark.slow
def test_end_to_end_benchmark_runs_in_the_trainers_loop(tmp_path: Path, forked: Forked) -> None:
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / name).write_text("Of a gradient, a few directions hold nearly all. " * 60, encoding="utf-8")
    data = ["--data", str(tmp_path / "train.txt"), "--eval_data", str(tmp_path / "held_out.txt")]
    smallest = ["--layers", "1", "--steps", "2", "--block", "1", "--tokens", "128", "--threads", "1", "--grad_clipping", "1"]
    printed = run("end_to_end/run.py", *data, *smallest, forked=forked, folder=tmp_path)
    assert "| galore_adamw |" in printed
    assert "Without galore-torch 1.0 AdamW: not installed" in printed


@pytest.mark.parametrize("optimizer", ["galore", "qgalore"])
def test_seven_billion_benchmark_trains_a_small_model_the_same_way(optimizer: str, tmp_path: Path, forked: Forked) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    (tmp_path / "tiny.json").write_text(json.dumps({"model_type": "llama", **shape}), encoding="utf-8")
    (tmp_path / "text.txt").write_text("Of a gradient, a few directions hold nearly all. " * 100, encoding="utf-8")
    text = ["--data", str(tmp_path / "text.txt"), "--eval_data", str(tmp_path / "text.txt")]
    smallest = ["--model_config", str(tmp_path / "tiny.json"), "--rank", "16", "--length", "32", "--steps", "3", "--threads", "1"]
    printed = run("seven_billion/run.py", "--optimizer", optimizer, *smallest, *text, forked=forked, folder=tmp_path)
    steps = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ") and "." in line]
    assert [step[0] for step in steps] == ["| 1, every basis", "| 2", "| 3", "| none: the first text again"]
    assert float(steps[-1][1]) < float(steps[0][1]), "the loss falls"


@pytest.mark.slow
def test_two_trees_are_timed_turn_by_turn(tmp_path: Path, forked: Forked) -> None:
    root = str(BENCHMARKS.parent)
    words = ["--rounds", "1", "--pairs", "1", "--cases", "GaLoreAdamW, step, not compiled"]
    printed = run("two_trees/run.py", root, root, *words, forked=forked, folder=tmp_path)
    (row,) = [line for line in printed.splitlines() if line.startswith("| GaLoreAdamW, step")]
    before, after, ratio = (float(cell) for cell in row.split("|")[2:5])
    assert min(before, after, ratio) > 0


def test_the_long_run_goes_on_where_it_stopped_bit_for_bit(tmp_path: Path, forked: Forked) -> None:
    """AdamW, GaLore, and bf16 weights rounded at random. One run is put down after its first look, the other is not."""
    (tmp_path / "text.txt").write_text("Of a gradient, a few directions hold nearly all. " * 200, encoding="utf-8")
    smallest = ["--hidden", "32", "--layers", "1", "--length", "16", "--rank", "4", "--gap", "3", "--eval_tokens", "64", "--every", "4"]
    text = ["--data", str(tmp_path / "text.txt"), "--eval_data", str(tmp_path / "text.txt"), "--steps", "8"]
    lines = ["--lines", "adamw", "galore", "galore_bf16"]

    def looks(name: str, *more: str) -> tuple[str, list[dict[str, object]]]:
        file = tmp_path / name / "results.jsonl"
        words = ["long_run/run.py", *text, *smallest, *lines, *more, "--results", str(file), "--picture", str(tmp_path / f"{name}.png")]
        printed = run(*words, forked=forked, folder=tmp_path)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return printed, [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    _, whole = looks("whole")
    _, first = looks("parts", "--stop", "4")
    printed, both = looks("parts")
    assert [row["step"] for row in whole] == [4, 8] * 3
    assert [row["step"] for row in first] == [4] * 3
    assert sorted(map(str, both)) == sorted(map(str, whole))
    assert "| GaLore, bf16 weights rounded at random | " in printed
    assert (tmp_path / "parts.png").exists()


def test_the_scaling_tables_say_what_does_not_fit(tmp_path: Path, forked: Forked) -> None:
    words = ["scaling/run.py", "--models", "7B", "--devices", "2", "1024", "--gpu", "RTX 4090", "--outer", "40"]
    rows = [line.split(" | ") for line in run(*words, forked=forked, folder=tmp_path).splitlines() if line.startswith("| 7B")]
    assert rows[0][2] == "(57)", "AdamW on one GPU of 24 GB"
    slow, fast = rows[-1], rows[-2]
    assert (fast[1], slow[1]) == ("2", "1,024")
    assert fast[2:5] == ["–", "–", "–"], "and under DDP nothing here"


@pytest.mark.dist
def test_the_ways_to_find_a_basis_together_are_timed(tmp_path: Path, forked: Forked) -> None:
    """Each way finds the same subspace, or the benchmark says that it does not."""
    words = ["data_parallel/run.py", "--rounds", "1", "--processes", "2", "--shapes", "60M, attention"]
    printed = run(*words, forked=forked, folder=tmp_path)
    assert re.search(r"\| 60M, attention: 512 x 512, 128 \| 2 \| \d+ \| \d+ \| \d+ \| 0\.197 M \|", printed)


@pytest.mark.dist
@pytest.mark.slow
def test_bytes_of_real_collectives_are_those_of_the_scaling_tables(tmp_path: Path, forked: Forked) -> None:
    printed = run("scaling/run.py", "--models", "7B", "--devices", "8", "--check", "2", forked=forked, folder=tmp_path)
    assert printed.count("| 15 of 15 |") == 4


@pytest.mark.dist
@pytest.mark.slow
def test_what_saving_takes_is_measured(tmp_path: Path, forked: Forked) -> None:
    words = ["checkpoint_memory/run.py", "--model_config", "9m", "--rank", "32", "--optimizers", "galore_adamw"]
    printed = run(*words, forked=forked, folder=tmp_path)
    save, later = [line.split(" | ") for line in printed.splitlines() if line.startswith("| galore_adamw")]
    everything, largest, by_tensors = (float(cell.strip(" |").replace(",", "")) for cell in (save[2], save[3], save[5]))
    assert by_tensors <= largest + 1
    assert float(later[5].strip(" |").replace(",", "")) >= everything


@pytest.mark.slow
def test_the_table_of_architectures_says_what_is_refused_and_why(tmp_path: Path, forked: Forked) -> None:
    words = ["--architectures", "mixtral", "--optimizers", "galore_adamw", "lora", "--output", str(tmp_path / "page.md")]
    printed = run("architectures/run.py", *words, forked=forked, folder=tmp_path)
    assert "| mixtral | yes | [1], [2] |" in printed
    page = (tmp_path / "page.md").read_text(encoding="utf-8").strip()
    assert "lora: lora and relora put adapters beside linear layers; some weights of this model are outside of them" in page
    assert page in printed


def test_glue_benchmark_tunes_reports_and_goes_on(tmp_path: Path, forked: Forked) -> None:
    """A grid of two rates on a seed of its own, then two seeds; the same command again runs nothing. Claims are differences of pairs."""
    model, data, results = tasks.bert(tmp_path / "bert"), tasks.glue(tmp_path / "glue", train=24, dev=8), tmp_path / "results.jsonl"
    words = ["glue/run.py", "--model", model, "--data", data, "--tasks", "mrpc", "--methods", "galore r=4", "--grid", "1e-3", "1e-4"]
    words += ["--steps", "2", "--seeds", "1", "2", "--max_length", "32", "--output", str(results)]
    run(*words, forked=forked, folder=tmp_path)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["seed"], line["lr"]) for line in lines[:2]] == [(0, 1e-3), (0, 1e-4)]
    best = min(line["lr"] for line in lines[:2] if line["best"] == max(other["best"] for other in lines[:2]))
    assert [(line["seed"], line["lr"]) for line in lines[2:]] == [(1, best), (2, best)]
    run(*words, forked=forked, folder=tmp_path)
    assert len(results.read_text().splitlines()) == 4
    with results.open("a", encoding="utf-8") as file:
        for line in lines:
            further = {score: line[score] + 0.01 * (2 + line["seed"]) for score in ("last", "best")}
            file.write(json.dumps(line | {"method": "lora r=4"} | further) + "\n")
    printed = run("glue/table.py", str(results), forked=forked, folder=tmp_path)
    assert f"| galore r=4 | {best:g} of 0.0001, 0.001 (at an end) |" in printed
    assert "| 2 |" in printed
    # 3 and 4 points: the mean is 3.5, and half of the interval of two pairs 12.706 x 0.5.
    assert "- mrpc, galore r=4 less lora r=4, 2 pairs of seeds: -3.50 (-9.85 to +2.85) at the last epoch" in printed
    assert "| 92.25 |" in printed
