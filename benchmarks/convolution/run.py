"""A small ResNet on scikit-learn's digits: kernels by AdamW, by a Tucker projection, and as flattened matrices with as many bytes of state.

    pip install scikit-learn
    python benchmarks/convolution/run.py

1,797 images of 8 x 8, of which 300 are the test and 200 of the rest choose the learning rates, with a seed of their own. A seed has one
split, one set of first weights and of batches for every method. Kernels of 3 x 3 are projected; the rest trains at full rank.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import heading, progress, table

from galore_torch import GaLoreAdamW
from galore_torch.train.optimizers.registry import state_bytes

GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TUNING_SEED = 1000


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


def resnet(width: int) -> nn.Module:
    stem = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), Block(width), nn.MaxPool2d(2), Block(width), nn.MaxPool2d(2), Block(width)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def optimizer_of(method: str, ratio: float, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """method: adamw, tucker, or matrix, whose rank is that with the bytes of tucker's state."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    rest = [p for p in model.parameters() if not (p.dim() == 4 and p.shape[1] > 1)]
    group: dict[str, Any] = {"params": kernels, "update_proj_gap": 50, "scale": 1.0}
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    if method == "tucker":
        return GaLoreAdamW([{"params": rest}, {**group, "rank": ratio, "tensor": True}], lr=lr)
    like = state_bytes(GaLoreAdamW([{**group, "params": [kernels[0]], "rank": ratio, "tensor": True}]))
    m, n = kernels[0].shape[0], kernels[0][0].numel()
    rank = max(1, round(like / (8 * n + 4 * m)))
    return GaLoreAdamW([{"params": rest}, {**group, "rank": rank}], lr=lr)


def digits(seed: int, tuning: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, those to test on)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:300], order[300:]
    if tuning:
        test, train = train[:200], train[200:]
    return (x[train], y[train]), (x[test], y[test])


def run(make: Callable[[nn.Module], torch.optim.Optimizer], arguments: argparse.Namespace, seed: int, tuning: bool) -> dict[str, float]:
    (x, y), (test_x, test_y) = digits(seed, tuning)
    torch.manual_seed(seed)
    model = resnet(arguments.width)
    optimizer = make(model)
    steps = arguments.epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 7919 * epoch))
        for rows in order[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        out = model(test_x)
    error = float((out.argmax(1) != test_y).float().mean())
    return {"loss": float(F.cross_entropy(out, test_y)), "error": error, "bytes": float(state_bytes(optimizer))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("epochs", 8), ("width", 32), ("seeds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.1, 0.05])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [("adamw", 1.0)] + [(method, ratio) for ratio in arguments.ratios for method in ("tucker", "matrix")]
    rows = []
    for method, ratio in cases:

        def at(lr: float, method: str = method, ratio: float = ratio) -> Callable[[nn.Module], torch.optim.Optimizer]:
            return lambda model: optimizer_of(method, ratio, model, lr)

        progress(f"{method} {ratio}")
        lr = min(GRID, key=lambda lr: run(at(lr), arguments, TUNING_SEED, True)["loss"])
        found = [run(at(lr), arguments, seed, False) for seed in range(arguments.seeds)]

        def spread(key: str, scale: float, digits: int, found: list[dict[str, float]] = found) -> str:
            values = [scale * each[key] for each in found]
            return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"

        name = method if method == "adamw" else f"{method}, {ratio:g}"
        rows.append([name, f"{found[0]['bytes'] / 1e3:.1f}", f"{lr:g}", spread("loss", 1, 4), spread("error", 100, 2)])
    progress("")
    print(heading(f"width {arguments.width}, {arguments.epochs} epochs, {arguments.seeds} seeds, mean ± standard deviation"))
    print(table(["method, ratio", "state, KB (10³ bytes)", "learning rate", "test loss", "test error, %"], rows))


if __name__ == "__main__":
    main()
