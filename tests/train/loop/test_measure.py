"""What a step is said to cost, against torch by hand; and that looking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_torch import GaLoreAdamW
from galore_torch.optim.direct_backward import DirectLayer
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.subspace import kept_share
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop import build as place
from galore_torch.train.loop import trainer
from galore_torch.train.loop.probe import Probe
from galore_torch.train.optimizers.registry import build_optimizer
from galore_torch.train.report.series import RefreshShare, smooth, thin
from support.whole_runs import Silent

Make = Callable[..., PretrainConfig]


def updates(config: PretrainConfig, data: TokenData, folder: Path) -> tuple[list[dict[str, Any]], torch.nn.Module]:
    folder.mkdir(exist_ok=True)
    name, lr = config.contenders[0]
    _, model = trainer.train(config, name, lr, data, folder, Silent())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], model


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw8bit", "galore_adamw_per_layer"])
def test_tracking_the_subspace_changes_no_bit(
    name: str, make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, losses and the whole optimizer state of a run with and without, over several refreshes."""
    optimizers: list[torch.optim.Optimizer] = []

    def remembered(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizers.append(build_optimizer(*args, **kwargs))
        return optimizers[-1]

    monkeypatch.setattr(trainer, "build_optimizer", remembered)
    (off, plain), (on, tracked) = (
        updates(make_config(optimizer=name, rank=4, num_training_steps=8, track_subspace=track), token_data, tmp_path / str(track))
        for track in (False, True)
    )
    assert not any("overlap" in row for row in off)
    assert any("overlap" in row for row in on)
    assert [row["loss"] for row in off] == [row["loss"] for row in on]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tracked.parameters(), strict=True))
    first, second = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert first.keys() == second.keys()
    for index, state in first.items():
        for key, value in state.items():
            other = second[index][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (index, key)


def test_refreshes_and_overlap_are_those_of_the_schedule(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """Every matrix at the first step, then each once in a gap of three; an overlap for each refresh that had an old basis."""
    rows, model = updates(make_config(optimizer="galore_adamw", rank=4, num_training_steps=7, track_subspace=True), token_data, tmp_path)
    matrices = {name for name, p in model.named_parameters() if "proj" in name and p.dim() == 2}
    assert len(matrices) == 7
    assert rows[0]["refreshes"] == 7
    assert "overlap" not in rows[0]
    for gap in (rows[1:4], rows[4:7]):
        assert sum(row["refreshes"] for row in gap) == 7
        assert [row["refreshes"] for row in gap] == [len(row.get("overlap", {})) for row in gap]
        assert set().union(*(row.get("overlap", {}) for row in gap)) == matrices
    assert all(0 < share <= 1.00001 for row in rows for share in row.get("overlap", {}).values())


def test_overlap_by_hand() -> None:
    """1 for the same subspace in a rotated basis, 0 for an orthogonal one, a half where half is kept."""
    eye = torch.eye(8)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q

    def share(new: dict[int, torch.Tensor], old: dict[int, torch.Tensor]) -> float:
        return float(kept_share(PROJECTORS["power"].overlap(new, old)))

    assert share({-2: eye[:, :4] @ turn}, {-2: eye[:, :4]}) == pytest.approx(1, abs=1e-5)
    assert share({-2: eye[:, :4]}, {-2: eye[:, 4:]}) == 0
    assert share({-2: eye[:, :4], -1: eye[:, 2:6]}, {-2: eye[:, :4], -1: eye[:, :4]}) == pytest.approx(0.75)


def test_gradient_norm_is_torchs(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """Without clipping the row has the norm that a clipping far away measures."""
    free, _ = updates(make_config(), token_data, tmp_path / "free")
    clipped, _ = updates(make_config(grad_clipping=1e9), token_data, tmp_path / "clipped")
    assert [row["grad_norm"] for row in free] == pytest.approx([row["grad_norm"] for row in clipped], rel=1e-6)


def test_consumed_gradients_have_no_norm_and_no_optimizer_time(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """Per-layer updates inside the backward pass: nothing is made up."""
    rows, _ = updates(make_config(optimizer="galore_adamw_per_layer", rank=4), token_data, tmp_path)
    assert not any("grad_norm" in row or "optimizer_s" in row for row in rows)
    assert rows[0]["memory_mb"]["gradients"] == 0
    assert all("refreshes" in row for row in rows)


def test_bad_gradient_inside_the_backward_pass_is_counted(
    make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix meets NaN in step 3: the optimizer leaves it as it is, and the loop says that the step was bad."""
    bad, weights = "model.layers.0.mlp.gate_proj.weight", []

    def model_for(*args: Any) -> torch.nn.Module:
        model = place.model_for(*args)

        def poisoned(grad: torch.Tensor) -> torch.Tensor:
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return grad * torch.nan if len(weights) == 3 else grad

        model.get_parameter(bad).register_hook(poisoned)
        return model

    monkeypatch.setattr(trainer, "model_for", model_for)
    config = make_config(optimizer="galore_adamw_per_layer", gradients="project", rank=4, num_training_steps=4)
    rows, model = updates(config, token_data, tmp_path)
    assert {row["step"]: row.get("skipped") for row in rows} == {1: None, 2: None, 3: "the gradient norm is nan", 4: None}
    third, fourth = weights[2:]
    assert [name for name, p in fourth.items() if torch.equal(p, third[name])] == [bad]
    assert not torch.equal(model.get_parameter(bad), fourth[bad])


def test_bad_low_rank_gradient_inside_the_backward_pass_is_counted(
    make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a layer whose full gradient is never made: its own NaN in step 3."""
    bad, weights = "model.layers.0.mlp.gate_proj.weight", []
    reduce = DirectLayer.reduce

    def poisoned(layer: DirectLayer, view: Any, grad: torch.Tensor, *kept: Any) -> torch.Tensor:
        if layer.name == bad:
            weights.append(layer.weight.detach().clone())
            grad = grad * torch.nan if len(weights) == 3 else grad
        return reduce(layer, view, grad, *kept)

    monkeypatch.setattr(DirectLayer, "reduce", poisoned)
    config = make_config(optimizer="galore_adamw_per_layer", rank=4, num_training_steps=4)
    rows, _ = updates(config, token_data, tmp_path)
    assert {row["step"]: row.get("skipped") for row in rows} == {1: None, 2: None, 3: "the gradient norm is nan", 4: None}
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[2], weights[1])


def one_update(probe: Probe, model: torch.nn.Module, inputs: torch.Tensor) -> dict[str, Any]:
    probe.begin()
    with probe.saving():
        loss = model(inputs).square().mean()
    loss.backward()
    with probe.stepping():
        probe.optimizer.step()
    probe.optimizer.zero_grad()
    return probe.finish()


def test_overlap_of_a_refresh_is_between_the_bases_before_and_after_it() -> None:
    """By hand from copies of the state, at a refresh in every step."""
    model = torch.nn.Linear(24, 16, bias=False)
    optimizer = GaLoreAdamW([{"params": model.parameters(), "rank": 4, "update_proj_gap": 1}])
    probe = Probe(model, optimizer, "cpu", track_subspace=True)
    one_update(probe, model, torch.randn(8, 24))
    for _ in range(3):
        old = optimizer.state[model.weight]["basis"].clone()
        row = one_update(probe, model, torch.randn(8, 24))
        kept = (optimizer.state[model.weight]["basis"].T @ old).norm().item() ** 2 / 4
        assert kept < 0.9, "the basis has to turn for this test to see anything"
        assert row["overlap"] == {"weight": pytest.approx(kept, abs=1e-5)}


def test_memory_by_purpose_is_what_tensors_hold() -> None:
    """Two layers by hand: kept for the backward pass are the inputs of both and the output that is squared, not the weights."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 8, bias=False))
    optimizer = GaLoreAdamW([{"params": model.parameters(), "rank": 4}])
    probe = Probe(model, optimizer, "cpu", track_subspace=False)
    row = one_update(probe, model, torch.randn(16, 64))
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    in_bytes = {name: round(mb * 1e6) for name, mb in row["memory_mb"].items()}
    weights = (64 * 32 + 32 * 8) * 4
    assert in_bytes == {"weights": weights, "gradients": weights, "optimizer": state, "activations": 16 * (64 + 32 + 8) * 4}
    assert 0 < row["optimizer_s"] < 60
    assert "memory_mb" not in one_update(probe, model, torch.randn(16, 64)), "sizes are told once"


def test_rows_have_what_a_report_needs(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    rows, _ = updates(make_config(num_training_steps=2), token_data, tmp_path)
    for row in rows:
        assert 0 < row["optimizer_s"] < row["seconds"]
        assert {"loss", "lr", "grad_norm", "tokens_seen", "rss_mb", "peak_rss_mb"} <= row.keys()
        assert row["peak_rss_mb"] >= row["rss_mb"]
        assert "refreshes" not in row, "AdamW has none"


def test_tracking_what_has_no_subspace_is_refused() -> None:
    with pytest.raises(UserError, match="--track_subspace has no effect on adamw; leave it out"):
        PretrainConfig(optimizer="adamw", track_subspace=True)


def test_refresh_share_is_the_cost_of_refreshes() -> None:
    """Steps of 1 s with 0.5 s more for each refresh: found exactly, whatever the first step took."""
    share = RefreshShare()
    for step in range(1, 21):
        refreshes = 5 if step == 1 else step % 3
        share.add({"step": step, "refreshes": refreshes, "seconds": 9.0 if step == 1 else 1 + 0.5 * refreshes})
    seconds = 9.0 + sum(1 + 0.5 * (step % 3) for step in range(2, 21))
    assert share.value == pytest.approx(0.5 * (5 + sum(step % 3 for step in range(2, 21))) / seconds)


def test_refresh_share_is_silent_where_it_cannot_tell() -> None:
    share = RefreshShare()
    for step in range(1, 30):
        share.add({"step": step, "refreshes": 2, "seconds": 1.0})  # always two: their cost cannot be told from the rest
        share.add({"step": step, "seconds": 1.0})
    assert share.value is None


def test_thinned_curves_keep_their_ends_and_means() -> None:
    xs, ys = thin(range(1, 10_001), [1.0] * 9_999 + [5.0])
    assert len(xs) == len(ys) <= 802
    assert (xs[-1], ys[-1]) == (10_000, 5.0)
    assert set(ys[:-1]) == {1.0}
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert thin([], []) == ([], [])
