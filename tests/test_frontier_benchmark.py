"""The benchmark of loss against bytes: what has no state is its paper's, every method trains, lines are read, the frontier is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from galore_torch.train.optimizers.registry import state_bytes
from support.benchmarks import BENCHMARKS, benchmark_modules

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """Its files by name; what they import by plain names is forgotten afterwards."""
    names = ("cost", "methods", "run", "stateless", "table")
    with benchmark_modules("frontier", *names) as found:
        yield dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def task(modules: dict[str, ModuleType]) -> Any:
    tiny = replace(modules["run"].SMALL, hidden=32, inner=48, layers=1, heads=2, vocab=64, length=16, batch=4, micro=4)
    return replace(tiny, steps=6, rank=8, gap=2, eval_tokens=64)


def test_sinkgd_and_scale_are_their_papers_by_loops(modules: dict[str, ModuleType]) -> None:
    """arXiv 2502.06742, alg. 1: five times every row over its norm times sqrt(n), then every column; arXiv 2506.16659: the first alone."""
    G = torch.randn(5, 7, dtype=torch.float64)
    expected = G.clone()
    for _ in range(5):
        for i in range(5):
            expected[i] = expected[i] * 7**0.5 / expected[i].norm()
        for j in range(7):
            expected[:, j] = expected[:, j] * 5**0.5 / expected[:, j].norm()
    torch.testing.assert_close(modules["stateless"].sinkgd(G), expected)
    rows = torch.stack([row * 7**0.5 / row.norm() for row in G])
    torch.testing.assert_close(modules["stateless"].scale(G), rows)
    W = nn.Parameter(torch.ones_like(G))
    W.grad = G
    modules["stateless"].Stateless([W], 0.5, modules["stateless"].scale).step()
    torch.testing.assert_close(W.detach(), 1 - 0.5 * rows)
    W.data.fill_(0.1)
    modules["stateless"].Stateless([W], 0.5, modules["stateless"].scale, relative=True).step()
    torch.testing.assert_close(W.detach(), 0.1 - 0.05 * rows)


def test_every_method_of_ours_moves_the_matrices_and_nothing_else(modules: dict[str, ModuleType], task: Any) -> None:
    """Three steps of each; what needs a package of its own is left out."""
    tokens = torch.arange(64).reshape(4, 16)
    for name, method in modules["methods"].METHODS.items():
        if not method.ours:
            continue
        model = task.model(0)
        optimizer = method.build(model, task, method.start)
        chosen = {id(p) for p in modules["methods"].matrices(model)}
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, p in model.named_parameters():
            assert torch.equal(p, before[key]) != (id(p) in chosen), (name, key)
        assert state_bytes(optimizer) > 0, name


def test_beta2_has_one_half_life_in_tokens(modules: dict[str, ModuleType], task: Any) -> None:
    methods = modules["methods"]
    small, big = (replace(task, batch=batch, length=128) for batch in (8, 128))
    assert methods.beta2(small) == pytest.approx(0.999)
    assert methods.beta2(big) == pytest.approx(0.999**16)
    assert modules["run"].TASKS["big_batch"].batch == 128


def test_a_run_is_a_line_and_the_table_is_made_of_lines(
    modules: dict[str, ModuleType], task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods by hand-written losses: pairs, intervals and the frontier; a real run's line has the bytes of the state."""
    table, run = modules["table"], modules["run"]
    data = {
        "train": torch.arange(2000, dtype=torch.int32).mul(7).remainder(61),
        "held_out": torch.arange(65, dtype=torch.int32).remainder(61),
    }
    real = run.measure(task, "muon_fp32", 0, 5e-3, data)
    assert real["bytes"] == pytest.approx(4, abs=0.01)
    assert 0 < real["loss"] < 6
    narrow = run.measure(task, "muon_fp32", 0, 5e-3, data, bf16=True)["loss"]
    assert narrow != real["loss"]
    assert narrow == pytest.approx(real["loss"], abs=0.02)
    monkeypatch.setitem(run.TASKS, "small", task)

    def lines(name: str, held: float, losses: list[float]) -> list[str]:
        rows = [(run.TUNING_SEED, lr, 3.0 + lr) for lr in (0.01, 0.02)] + [(seed, 0.01, loss) for seed, loss in enumerate(losses)]
        common = {"task": asdict(task), "tokens": "t", "rest_lr": 0.01, "variant": name}
        return [json.dumps({**common, "seed": seed, "lr": lr, "result": {"loss": loss, "bytes": held}}) for seed, lr, loss in rows]

    every = [
        *lines("adamw", 8.0, [3.0, 3.2, 3.1, 3.0, 3.3, 3.0]),
        *lines("galore", 3.0, [2.9, 3.1, 3.0, 2.9, 3.2, 2.9]),
        *lines("fold", 1.0, [3.5] * 6),
        *lines("foam", 2.0, [3.5] * 5),  # one seed is missing
    ]
    scores = table.read(every, "small")
    assert [score.name for score in scores] == ["fold", "galore", "adamw"]
    assert table.frontier(scores) == {"fold", "galore"}
    assert table.difference(scores[1], scores[2]) == "-0.100 (-0.100 to -0.100)"
    assert scores[1].tried == {0.01: 3.01, 0.02: 3.02}
    steps = {"512": {"of_adamw": 2.5, "slowest": 1.2}, "1024": {"of_adamw": 2.0, "slowest": 1.1}}
    costs = {"galore": {"steps": steps, "all_in": 30.0, "mode": "direct"}}
    (row,) = (line for line in table.measured(scores, costs).splitlines() if "GaLore, n/4" in line)
    assert len({line.count("|") for line in table.measured(scores, costs).splitlines()}) == 1, "a heading for each cell"
    assert row.startswith("| 2 | **GaLore, n/4** | 3.00 | 3.000 |")
    assert "| 2.50; 2.00 | 1.20; 1.10 | 30.0, direct | 0.01 (0.01, 0.02) |" in row
    table.picture(tmp_path / "small.png", scores, costs)
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="galore has reported seeds at several rates"):
        table.read([*every, lines("galore", 3.0, [3.0])[-1].replace('"lr": 0.01', '"lr": 0.02')], "small")


def test_memory_counts_weights_state_and_the_peak_of_a_step(
    modules: dict[str, ModuleType], task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = modules["cost"]
    monkeypatch.setattr(cost, "SMALL", task)
    found = {name: cost.memory(name) for name in ("adamw", "galore", "muon_int8")}
    assert [row["mode"] for row in found.values()] == ["full", "direct_update", "update"]
    assert found["adamw"]["all_in"] > 4 + 8 + 4, "weights, moments and a gradient"
    assert found["galore"]["all_in"] < found["adamw"]["all_in"]


def test_a_method_whose_steps_take_long_has_fewer_rounds(
    modules: dict[str, ModuleType], task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that says that GaLore's steps take a second each, and AdamW's a thousandth."""
    cost = modules["cost"]
    monkeypatch.setattr(
        cost.Timed, "step", lambda self: self.seconds.append(1.0 if type(self.optimizer).__name__ == "GaLoreAdamW" else 1e-3)
    )
    found = cost.times(["galore"], task, rounds=60, warm_up=60, seconds=2.0)
    assert {name: row["rounds"] for name, row in found.items()} == {"adamw": 60, "galore": cost.LEAST}
    assert found["galore"]["of_adamw"] == pytest.approx(1000)
