"""How much of a gradient, and of AdamW's update, each way to spend a quarter of the elements can hold.

    python benchmarks/operator/energy.py --data FOLDER

An operator trains on Darcy flow with AdamW alone. At some steps the squared norm of what a projection keeps, over that of the whole, is
printed for the gradient and for the update m / sqrt(v): the mean over the four spectral weights.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from statistics import mean

import torch
from problems import darcy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import heading, table

from galore_torch.slots import tucker

WAYS: dict[str, tuple[int | None, ...]] = {
    "every dimension": (17, 17, 8, 5),
    "frequencies alone": (None, None, 7, 3),
    "channels alone": (12, 12, None, None),
    "input channels alone": (6, None, None, None),
}
STEPS = (5, 50, 110)


def kept(X: Tensor, rank: tuple[int | None, ...]) -> float:
    """||core||^2 / ||X||^2 after three sweeps of HOOI."""
    factors = None
    for sweep in range(3):
        factors = tucker.find(X, tucker.mode_ranks(tuple(X.shape), rank), factors, sweep)
    assert factors is not None
    return float(tucker.project(X, factors).norm() ** 2 / X.norm() ** 2)


def flattened(X: Tensor) -> float:
    """Of a matrix, channels by frequencies, at rank 21 of 84."""
    squares = torch.linalg.svdvals(X.reshape(X.shape[0] * X.shape[1], -1)).square()
    return float(squares[:21].sum() / squares.sum())


def largest(X: Tensor) -> float:
    """Of the largest 5 % of the elements."""
    squares = X.abs().square().flatten().sort(descending=True).values
    return float(squares[: len(squares) // 20].sum() / squares.sum())


def update_of(state: dict[str, Tensor]) -> Tensor:
    """m / sqrt(v), which torch keeps of real and imaginary parts apart."""
    m, v = (torch.view_as_real(state[key]) for key in ("exp_avg", "exp_avg_sq"))
    return torch.view_as_complex(m / (v.sqrt() + 1e-8))


def main() -> None:
    from neuralop.losses import H1Loss
    from neuralop.models import FNO

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .npz files")
    warnings.filterwarnings("ignore", module="neuralop")
    data, loss = darcy(parser.parse_args().data).tuning(), H1Loss(d=2)
    torch.manual_seed(3000)
    model = FNO(n_modes=(12, 12), hidden_channels=24, in_channels=1, out_channels=1, n_layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    spectral = [p for p in model.parameters() if p.is_complex()]
    (x, y), found = data.train, {}
    batches = [rows for epoch in range(4) for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(32)]
    for step, rows in enumerate(batches[: max(STEPS)], 1):
        optimizer.zero_grad()
        (loss(data.mean + data.std * model(x[rows]), y[rows]) / len(rows)).backward()
        optimizer.step()
        if step in STEPS:
            pairs = [(p.grad, update_of(optimizer.state[p])) for p in spectral]
            ways = {name: lambda X, rank=rank: kept(X, rank) for name, rank in WAYS.items()}  # type: ignore[misc]
            for name, way in {**ways, "matrix, channels by frequencies": flattened, "the largest 5 % of elements": largest}.items():
                found[name, step] = [f"{100 * mean(way(pair[i]) for pair in pairs):.1f}" for i in (0, 1)]  # type: ignore[arg-type]
    names = dict.fromkeys(name for name, _ in found)
    print(heading("shares in percent of gradient / update"))
    print(table(["what is kept", *(f"step {step}" for step in STEPS)], [[n, *(" / ".join(found[n, s]) for s in STEPS)] for n in names]))


if __name__ == "__main__":
    main()
