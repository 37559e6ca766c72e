"""The benchmark of the basis's side: bytes by hand, a shared basis is what it says, pairs are tested as pairs, a run is run once."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from galore_torch import GaLoreAdamW, galore_param_groups
from galore_torch.train.model.llama import ModelShape
from galore_torch.train.model.sizes import Sizes, llama_sizes
from galore_torch.train.optimizers.registry import state_bytes
from support.benchmarks import BENCHMARKS, benchmark_modules

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="a source distribution has no benchmarks")
TOKENS = torch.arange(2000, dtype=torch.int32).mul(7).remainder(61)
D, I, KV, RANK, LAYERS = 32, 48, 16, 8, 2


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """(perplexity, state); what they import by plain names is forgotten afterwards."""
    with benchmark_modules("side", "perplexity", "state") as (perplexity, state):
        yield perplexity, state


@pytest.fixture(scope="module")
def perplexity(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def state(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[1]


@pytest.fixture(scope="module")
def task(perplexity: ModuleType) -> Any:
    tiny = replace(perplexity.SMALL, hidden=D, inner=I, layers=LAYERS, heads=2, vocab=64, length=16, batch=4, micro=4)
    return replace(tiny, steps=6, rank=RANK, gap=2, eval_tokens=64)


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    """With fewer heads for keys and values, so that k and v are wide."""
    return llama_sizes(ModelShape(D, I, LAYERS, 2, vocab_size=64, extras=(("num_key_value_heads", 1),)), 64)


# --- bytes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "bases", "long"),
    [
        # q, k, v, o, gate, up, down: the projected axis, and the one that the moments keep
        ("std", [D, KV, KV, D, D, D, D], [D, D, D, D, I, I, I]),
        ("reverse_std", [D, D, D, D, I, I, I], [D, KV, KV, D, D, D, D]),
        ("right", [D, D, D, D, D, D, I], [D, KV, KV, D, I, I, D]),
        ("left", [D, KV, KV, D, I, I, D], [D, D, D, D, D, D, I]),
        ("right, shared", [D, D, D, I], [D + 2 * KV, D, 2 * I, D]),
    ],
)
def test_state_is_a_basis_and_two_moments_of_each_matrix(
    state: ModuleType, sizes: Sizes, label: str, bases: list[int], long: list[int]
) -> None:
    (side,) = [side for side in state.SIDES if side.label == label]
    counters = LAYERS * len(bases)  # whether a basis is ready: one byte
    fp32 = state.state_bytes(sizes, side, RANK, "fp32", "fp32")
    assert fp32 - counters == 4 * LAYERS * RANK * (sum(bases) + 2 * sum(long))
    mixed = state.state_bytes(sizes, side, RANK, "fp32", "bf16")
    assert fp32 - mixed == 2 * LAYERS * RANK * sum(bases)


@pytest.mark.parametrize(
    ("name", "label"), [("std", "std"), ("right", "right"), ("reverse_std", "reverse_std"), ("shared", "right, shared")]
)
def test_state_is_what_the_optimizer_of_a_run_holds(perplexity: ModuleType, state: ModuleType, task: Any, name: str, label: str) -> None:
    (side,) = [side for side in state.SIDES if side.label == label]
    variant, model = perplexity.VARIANTS[name], task.model(0)
    if variant.shared:
        perplexity.stack(model)
    held = state_bytes(perplexity.optimizers(model, task, variant, 1e-2, 1e-2)[0])
    assert held == state.state_bytes(llama_sizes(task.shape, 64), side, RANK, "fp32", "fp32")


@pytest.mark.parametrize(
    ("label", "saved"),
    [
        ("left", 3 * D + I),
        # down's basis is on the left, and with one key-value head those of k and v are too, so that x stays for them beside q's x Q
        ("std", (RANK + D) + RANK + 2 * RANK + I),
        ("reverse_std", (D + 2 * RANK) + D + D + RANK),
        ("right", 7 * RANK),
        ("right, shared", 4 * RANK),
    ],
)
def test_a_layer_saves_x_once_or_x_q_for_each_basis_on_the_right(state: ModuleType, sizes: Sizes, label: str, saved: int) -> None:
    (side,) = [side for side in state.SIDES if side.label == label]
    assert state.saved_elements(sizes, side, RANK) == LAYERS * saved


def test_the_table_has_a_row_for_each_side(state: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["state.py", "--models", "60m:128"])
    state.main()
    printed = capsys.readouterr().out
    # 8 layers: 4 x (512 + 2 x 512) and 3 x (512 + 2 x 1376), times rank 128 and 4 bytes
    assert f"| 60m, r = 128 | std | {4 * 8 * 128 * (4 * 3 * 512 + 3 * (512 + 2 * 1376)) / 1e6:.1f} |" in printed
    assert printed.count("| 60m, r = 128 |") == len(state.SIDES)


# --- one basis for the matrices that read the same input ---------------------------------------------------------------------


def test_stacked_layers_compute_what_the_model_computed(perplexity: ModuleType, task: Any) -> None:
    plain, stacked = task.model(3), task.model(3)
    perplexity.stack(stacked)
    inputs = TOKENS[:64].long().reshape(4, 16)
    assert torch.allclose(stacked(input_ids=inputs).logits, plain(input_ids=inputs).logits, atol=1e-6)
    shapes = [tuple(p.shape) for _, p in galore_param_groups(stacked, RANK)[-1]["params"]]
    assert sorted(shapes) == sorted(LAYERS * [(3 * D, D), (D, D), (2 * I, D), (D, I)])
    assert sum(p.numel() for p in stacked.parameters()) == sum(p.numel() for p in plain.parameters())


def test_a_stacked_layer_is_adam_of_each_matrix_in_one_shared_basis(perplexity: ModuleType, task: Any) -> None:
    """Oracle: q, k and v apart, Adam (arXiv 2403.03507, Alg. 2) of G_i Q for each with the Q that the stacked layer holds."""
    plain, stacked, lr, rows = task.model(1), task.model(1), 1e-2, 3 * D
    perplexity.stack(stacked)
    matrices, _ = perplexity.optimizers(stacked, replace(task, gap=100), perplexity.VARIANTS["shared"], lr, 0.0)
    inputs, targets = TOKENS[:64].long().reshape(4, 16), TOKENS[1:65].long().reshape(4, 16)
    layer = stacked.model.layers[0].self_attn.q_proj.stacked.weight
    assert layer.shape == (rows, D)
    assert layer is stacked.model.layers[0].self_attn.v_proj.stacked.weight
    parts = [plain.model.layers[0].self_attn.get_submodule(name).weight.detach().clone() for name in ("q_proj", "k_proj", "v_proj")]
    first, second = ([torch.zeros(D, RANK) for _ in parts] for _ in range(2))
    for step in (1, 2, 3):
        stacked(input_ids=inputs, labels=inputs, shift_labels=targets).loss.backward()
        gradients = layer.grad.clone().split(D)
        matrices.step()
        basis = matrices.state[layer]["basis"]
        assert basis.shape == (D, RANK)
        for i, gradient in enumerate(gradients):
            low = gradient @ basis
            first[i] = 0.9 * first[i] + 0.1 * low
            second[i] = 0.999 * second[i] + 0.001 * low**2
            size = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            parts[i] -= task.scale * size * (first[i] / (second[i].sqrt() + 1e-6)) @ basis.T
        matrices.zero_grad()
        torch.testing.assert_close(layer.detach(), torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_each_variant_projects_its_side(perplexity: ModuleType, task: Any) -> None:
    expected = {"std": {D}, "right": {D, I}, "reverse_std": {D, I}, "left": {D, I}, "shared": {D, I}}
    down = {"std": D, "right": I, "reverse_std": I, "left": D, "shared": I}
    for name, lengths in expected.items():
        variant, model = perplexity.VARIANTS[name], task.model(0)
        if variant.shared:
            perplexity.stack(model)
        matrices, rest = perplexity.optimizers(model, task, variant, 1e-2, 1e-2)
        assert isinstance(matrices, GaLoreAdamW)
        assert {matrices.state[p]["basis"].shape[0] for p in matrices.param_groups[0]["params"]} == lengths, name
        assert matrices.state[model.model.layers[0].mlp.down_proj.weight]["basis"].shape == (down[name], RANK)
        covered = {id(p) for optimizer in (matrices, rest) for group in optimizer.param_groups for p in group["params"]}
        assert covered == {id(p) for p in model.parameters()}


# --- runs and their table -------------------------------------------------------------------------------------------------------


def test_pairs_are_compared_seed_by_seed(perplexity: ModuleType) -> None:
    mean, deviation, t, half = perplexity.paired([3.1, 3.3, 3.2, 3.6], [3.0, 3.1, 3.1, 3.4])
    assert (mean, deviation) == (pytest.approx(0.15), pytest.approx(math.sqrt(4 * 0.05**2 / 3)))
    assert t == pytest.approx(0.15 / (deviation / 2))
    assert half == pytest.approx(3.18 * deviation / 2)  # Student's t of 3 degrees of freedom, two-sided 5 %


def test_the_table_is_made_of_the_lines_and_a_second_call_runs_nothing(
    perplexity: ModuleType, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    tokens, lines = tmp_path / "tokens.safetensors", tmp_path / "results.jsonl"
    save_file({"train": TOKENS, "held_out": TOKENS[:100].clone()}, tokens)
    results = perplexity.results_of(task, tokens, lines, 1e-2)
    tuned = {"std": (1e-2, [1e-2]), "right": (2e-2, [1e-2, 2e-2])}
    for seed in (0, 1):
        for name, (lr, _) in tuned.items():
            results.run(name, seed, lr)
    written = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [(row["variant"], row["seed"]) for row in written] == [("std", 0), ("right", 0), ("std", 1), ("right", 1)]

    monkeypatch.setattr(perplexity, "measure", None)
    again = perplexity.results_of(task, tokens, lines, 1e-2)
    rows = perplexity.report(again, ["std", "right"], [0, 1], tuned).splitlines()
    means = {name: sum(math.exp(row["result"]["loss"]) for row in written if row["variant"] == name) / 2 for name in tuned}
    assert rows[2].startswith(f"| std (short side) | 0.01 (0.01) | {means['std']:.2f} |")
    assert rows[3].startswith(f"| right (input side) | 0.02 (0.01, 0.02) | {means['right']:.2f} |")
    loss = [row["result"]["loss"] for row in written]
    assert rows[7].startswith(f"| right - std | {(loss[1] - loss[0] + loss[3] - loss[2]) / 2:+.4f} |")
    with pytest.raises(TypeError):  # another task is another run
        perplexity.results_of(replace(task, steps=7), tokens, lines, 1e-2).run("std", 0, 1e-2)


def test_variants_of_a_seed_begin_with_the_same_weights_and_end_apart(perplexity: ModuleType, task: Any) -> None:
    data = {"train": TOKENS, "held_out": TOKENS[:100]}
    short = replace(task, steps=2)
    ended = {name: perplexity.measure(short, variant, 0, 1e-2, 1e-2, data)["loss"] for name, variant in perplexity.VARIANTS.items()}
    assert len(set(ended.values())) == len(ended)
    still = {name: perplexity.measure(short, variant, 0, 0.0, 0.0, data)["loss"] for name, variant in perplexity.VARIANTS.items()}
    assert max(still.values()) - min(still.values()) < 1e-6


def test_the_tuning_seed_is_refused_as_a_reported_one(
    perplexity: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["perplexity.py", "--seeds", "0", "1000"])
    with pytest.raises(SystemExit):
        perplexity.parsed()
    assert "1000 is the seed that learning rates are tuned on" in capsys.readouterr().err
