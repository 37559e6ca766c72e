"""Real neural operators of the package neuraloperator: its own Trainer with our optimizer, and weights that are stored factorised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import neuralop
import pytest
import torch
from neuralop.layers.spectral_convolution import SpectralConv
from neuralop.models import FNO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from galore_torch import TensorGaLoreAdamW

FRAMEWORK, PACKAGE = "neuraloperator", "neuraloperator"
pytestmark = pytest.mark.filterwarnings("ignore")


class Pairs(Dataset[dict[str, Tensor]]):
    """A smooth field, and its slope."""

    def __init__(self) -> None:
        k = torch.fft.fftfreq(16, 1 / 16)
        noise = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.x = torch.fft.irfft2(torch.fft.rfft2(noise) * 8 / (k[:, None] ** 2 + k[None, :9] ** 2 + 4))
        self.y = self.x.roll(1, -1) - self.x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


def operator(**kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = FNO(n_modes=(8, 8), hidden_channels=12, in_channels=1, out_channels=1, n_layers=2, **kwargs)
    return model


def optimizer_of(model: torch.nn.Module) -> tuple[TensorGaLoreAdamW, Any]:
    optimizer = TensorGaLoreAdamW(model.parameters(), lr=2e-2, rank=0.5, update_proj_gap=4, scale=1.0)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)


def trained(model: torch.nn.Module, epochs: int, **kwargs: Any) -> float:
    """By neuraloperator's Trainer, as it stands; an FNO's checkpoint names a function and a class, which torch.load has to be told of."""
    optimizer, scheduler = optimizer_of(model)
    loader = DataLoader(Pairs(), batch_size=8)
    losses = {"l2": neuralop.LpLoss(d=2, p=2)}
    trainer = neuralop.Trainer(model=model, n_epochs=epochs, device="cpu")
    with torch.serialization.safe_globals([torch.nn.functional.gelu, SpectralConv]):
        metrics = trainer.train(
            loader, {"test": loader}, optimizer, scheduler, training_loss=neuralop.LpLoss(d=2, p=2), eval_losses=losses, **kwargs
        )
    return float(metrics["test_l2"])


def test_its_own_trainer_runs_unchanged(record: Any) -> None:
    """Oracle: the same steps written out."""
    model, expected = operator(), operator()
    error = trained(model, 8)
    optimizer, scheduler = optimizer_of(expected)
    loss = neuralop.LpLoss(d=2, p=2)
    for _ in range(8):
        for sample in DataLoader(Pairs(), batch_size=8):
            optimizer.zero_grad()
            loss(expected(sample["x"]), sample["y"]).backward()
            optimizer.step()
        scheduler.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    assert error < 0.95 * trained(operator(), 1), "it learns"
    record("`TensorGaLoreAdamW` in its own Trainer, unchanged")


def test_its_checkpoints_hold_our_state_and_resume_bit_for_bit(tmp_path: Path, record: Any) -> None:
    """The Trainer counts from the last epoch that it has saved, and so does that one again: two epochs, and three after them."""
    whole, parted = operator(), operator()
    trained(whole, 5)
    trained(parted, 2, save_every=1, save_dir=tmp_path)
    trained(parted, 4, resume_from_dir=tmp_path)
    for p, q in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(p, q)
    record("checkpoints of its Trainer", resume=0.0)


@pytest.mark.parametrize("factorization", ["tucker", "cp", "tt"])
def test_weights_that_are_stored_factorised_are_ordinary_tensors(factorization: str, record: Any) -> None:
    model = operator(factorization=factorization, implementation="factorized", rank=0.4)
    optimizer, _ = optimizer_of(model)
    complex_ones = [p for p in model.parameters() if p.is_complex() and p.dim() > 1]
    assert len(complex_ones) > 2
    assert any("basis_ready" in optimizer.state[p] for p in complex_ones)
    untrained = operator(factorization=factorization, implementation="factorized", rank=0.4)
    assert trained(model, 8) < 0.95 * trained(untrained, 1), "it learns"
    record(f"weights stored factorised, {factorization}")
