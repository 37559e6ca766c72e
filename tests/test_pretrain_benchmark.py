"""The pre-training contest: methods start alike, share what they must share, and the table holds what the runs measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from galore_torch.train.config.recipes import recipe_text
from galore_torch.train.model.llama import model_shape
from support.benchmarks import BENCHMARKS, benchmark_modules
from support.forked import Forked

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")
LR, REST_LR = 3e-2, 7e-3
TOKENS = torch.arange(2000, dtype=torch.int32).mul(7).remainder(61)


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """(run, contest); what they import by plain names is forgotten afterwards."""
    with benchmark_modules("pretrain", "run", "contest") as (run, contest):
        yield run, contest


@pytest.fixture(scope="module")
def command(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def contest(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[1]


@pytest.fixture(scope="module")
def task(command: ModuleType) -> Any:
    tiny = replace(command.PRESETS["small"], hidden=32, inner=48, layers=1, heads=2, vocab=64, length=16, batch=4, micro=4)
    return replace(tiny, steps=6, rank=8, gap=2, cycle=3, eval_tokens=64)


@pytest.fixture(scope="module")
def trained(contest: ModuleType, task: Any) -> Callable[[str], tuple[list[float], dict[str, torch.Tensor], list[set[float]]]]:
    """method -> (loss of each update, weights at the end, the learning rates of embeddings, head and norms in each update)."""

    def run(method: str) -> tuple[list[float], dict[str, torch.Tensor], list[set[float]]]:
        losses, rates = [], []
        for loss, model, built in contest.train(task, contest.Run(method, 0, LR, REST_LR), TOKENS):
            losses.append(loss)
            rates.append({group["lr"] for group in built["rest"].param_groups})
            rest = {id(p) for group in built["rest"].param_groups for p in group["params"]}
            matrices = built.get("matrices")
            assert rest.isdisjoint(id(p) for group in (matrices.param_groups if matrices else []) for p in group["params"])
            named = {name: p for name, p in model.named_parameters() if id(p) in rest}
            assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < set(named)
            assert not any("_proj" in name for name in named)
        return losses, {name: p.detach() for name, p in model.named_parameters()}, rates

    return run


@pytest.fixture(scope="module")
def runs(trained: Any, contest: ModuleType) -> dict[str, Any]:
    return {method: trained(method) for method in contest.METHODS}


def test_all_methods_but_random_factors_begin_with_the_same_loss(runs: dict[str, Any]) -> None:
    first = {method: losses[0] for method, (losses, _, _) in runs.items()}
    assert first.pop("low_rank") != first["adamw"]
    assert set(first.values()) == {first["adamw"]}


def test_methods_part_after_the_first_update(runs: dict[str, Any]) -> None:
    assert len({losses[-1] for losses, _, _ in runs.values()}) == len(runs)


def test_embeddings_head_and_norms_get_one_learning_rate_in_every_method(runs: dict[str, Any], task: Any) -> None:
    for _, _, rates in runs.values():
        assert rates == [{REST_LR * task.lr_factor(step, "adamw")} for step in range(task.steps)]


def test_frozen_leaves_the_matrices_and_the_others_move_them(runs: dict[str, Any], task: Any) -> None:
    first = {name: p.detach() for name, p in task.model(0).named_parameters()}
    projected = [name for name in first if "_proj" in name]
    assert len(projected) == 7
    for name in projected:
        assert torch.equal(runs["frozen"][1][name], first[name])
        for method in ("adamw", "galore_adamw", "galore_adamw8bit"):
            assert not torch.equal(runs[method][1][name], first[name])
    assert not torch.equal(runs["frozen"][1]["model.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_micro_batches_do_not_change_the_run(contest: ModuleType, task: Any) -> None:
    whole, parts = (
        [loss for loss, _, _ in contest.train(replace(task, micro=micro), contest.Run("adamw", 0, 1e-3, 1e-3), TOKENS)] for micro in (4, 2)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_measured_state_is_that_of_the_formulas(contest: ModuleType, task: Any) -> None:
    result = contest.measure(task, contest.Run("galore_adamw", 0, LR, REST_LR), TOKENS, TOKENS[:100])
    rest = 2 * 64 * 32 + 3 * 32
    assert result["weights"] == 4 * (rest + 4 * 32 * 32 + 3 * 32 * 48)
    assert result["state"]["rest"] == pytest.approx(2 * 4 * rest, abs=100)  # and the counts of steps
    low = 8 * (2 * (4 * 32 + 3 * 48) + 7 * 32)  # two moments beside the long side, and the basis, of rank 8
    assert result["state"]["matrices"] == pytest.approx(4 * low, rel=0.05)
    assert result["peak_rss_mb"] >= result["start_mb"] > 0


def test_reloras_state_is_counted_though_its_last_update_forgets_it(contest: ModuleType, task: Any) -> None:
    assert task.steps % task.cycle == 0
    state = {
        method: contest.measure(task, contest.Run(method, 0, LR, REST_LR), TOKENS, TOKENS[:100])["state"]["matrices"]
        for method in ("lora", "relora")
    }
    assert state["relora"] == state["lora"]


def test_the_heading_counts_the_parameters_of_the_model(command: ModuleType, task: Any) -> None:
    named = dict(task.model(0).named_parameters())
    matrices = sum(p.numel() for name, p in named.items() if "_proj" in name)
    assert sys.modules["table"].parameters(task) == (matrices, sum(p.numel() for p in named.values()))


def test_the_60m_preset_is_the_published_run(command: ModuleType) -> None:
    published = command.PRESETS["60m"]
    assert published.shape == model_shape("60m")
    recipe = json.loads(recipe_text("60m") or "")
    assert (published.steps, published.batch, published.rank, published.gap, published.scale) == tuple(
        recipe[name] for name in ("num_training_steps", "total_batch_size", "rank", "update_proj_gap", "galore_scale")
    )


def test_the_search_ends_between_worse_neighbours_or_at_the_grids_end(command: ModuleType) -> None:
    grid = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    assert command.best_on_grid(lambda lr: abs(math.log(lr / 9)), 2.0, grid) == (10.0, [1.0, 2.0, 5.0, 10.0, 20.0])
    assert command.best_on_grid(lambda lr: -lr, 20.0, grid) == (50.0, [10.0, 20.0, 50.0])
    assert command.best_on_grid(lambda lr: lr if lr < 5 else math.nan, 5.0, grid)[0] == 1.0
    assert command.best_on_grid(lambda lr: math.nan, 5.0, grid)[0] == 5.0


def call(forked: Forked, folder: Path, *arguments: str) -> tuple[int, str]:
    text = folder / "text.txt"
    text.write_text("Of a gradient, a few directions hold nearly all. " * 100, encoding="utf-8")
    sizes = {"layers": 1, "length": 16, "batch": 2, "micro": 2, "steps": 4, "rank": 4, "gap": 2, "cycle": 2, "eval_tokens": 64}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    out = ["--results", str(folder / "runs.jsonl"), "--out", str(folder / "table"), "--data", str(text), "--eval_data", str(text)]
    return forked.run(str(BENCHMARKS / "pretrain" / "run.py"), *out, *flags, *arguments, XDG_CACHE_HOME=str(folder / "cache"))


def test_the_table_is_made_of_the_runs_lines_and_a_second_call_runs_nothing(
    command: ModuleType, contest: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked
) -> None:
    given = ["--methods", "adamw", "--seeds", "3", "--lr", "0.001", "--rest_lr", "0.002"]
    code, said = call(forked, tmp_path, *given)
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["run"] for line in lines] == [{"method": "adamw", "seed": 3, "lr": 0.001, "rest_lr": 0.002}]
    written = (tmp_path / "table" / "results.md").read_text(encoding="utf-8")
    assert f"| {math.exp(lines[0]['result']['loss']):.2f} |" in written
    assert "| GaLore | 34.88 (1.024), 0.24 |" in written
    assert (tmp_path / "table" / "results.png").stat().st_size > 10_000

    # The table follows the lines: another loss there is another number here, and nothing is run again.
    monkeypatch.setattr(subprocess, "run", None)
    lines[0]["result"]["loss"] = math.log(1234.5)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = contest.Task(**lines[0]["task"])
    again = command.Contest(task, tmp_path / lines[0]["tokens"], tmp_path / "runs.jsonl", 1)
    scores = command.compete(again, ["adamw"], [3], 1e-3, 2e-3)
    assert "| 1234.50 |" in command.report(task, scores)


def test_the_tuning_seed_is_refused_as_a_reported_one(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "0", str(command.TUNING_SEED)])
    with pytest.raises(SystemExit):
        command.parsed()
    assert "1000 is the seed that learning rates are tuned on" in capsys.readouterr().err
