"""Bytes of optimizer state a parameter, by shapes alone: this package's optimizers beside AdamW, Adafactor, Muon and APOLLO.

    python benchmarks/state_bytes/run.py                  # LLaMA-7B, bf16 weights
    python benchmarks/state_bytes/run.py --model_config 1b --dtype float32

This package's rows add up `galore_torch.engine.stored.state_spec`, from which the engine allocates; the others are arithmetic, with its
source beside it. Nothing is allocated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import table

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.model.sizes import Part, Sizes
from galore_torch.train.plan.answer import plan_request

SHARES = (4, 8)  # rank: the width over this
Row = tuple[str, str, int]  # name, how its state is kept, bytes


def by_package(name: str, model: str, dtype: str, rank: int) -> int:
    """Of an optimizer that `galore plan` knows, the basis included."""
    request = plan_request(PretrainConfig(model_config=model, optimizer=name, dtype=dtype, rank=rank), device="cuda")
    return request.total("basis") + request.total("moments")


def added_up(sizes: Sizes, matrix: Callable[[Part], float], rest: float) -> int:
    """``matrix``: bytes of one projected matrix; ``rest``: bytes an element of all other parameters."""
    return round(sum(part.count * matrix(part) if part.role == "matrix" else rest * part.elements for part in sizes.parts))


def rows(model: str, dtype: str) -> Iterator[Row]:
    request = plan_request(PretrainConfig(model_config=model, dtype=dtype), device="cuda")
    sizes, width, b = request.sizes, request.sizes.hidden, request.itemsize
    yield "AdamW", "fp32 moments", 8 * sizes.parameters
    yield "AdamW", "bf16 moments", 4 * sizes.parameters
    yield "AdamW", "8-bit moments", by_package("adam8bit", model, dtype, 1)
    # torchao's AdamW4bit: two codes a byte and an fp32 scale a block of 128, of each moment.
    yield "AdamW", "4-bit moments", added_up(sizes, lambda part: 2 * (0.5 + 4 / 128) * part.shape[0] * part.shape[1], 2 * (0.5 + 4 / 128))
    yield "Adafactor", "rows and columns, no first moment", by_package("adafactor", model, dtype, 1)
    yield "Muon", "8-bit momentum; 8-bit AdamW outside of the layers", by_package("muon", model, dtype, 1)
    for share in SHARES:
        yield f"GaLoreMuon, r = n/{share}", "8-bit momentum, bf16 basis", by_package("galore_muon", model, dtype, width // share)
    for share in SHARES:
        # arXiv 2412.05270, table 1: 2 n r + 2; the projection is drawn again from a seed. Its moments have the gradient's dtype.
        rank = width // share
        yield (
            f"APOLLO, r = n/{share}",
            f"moments in {dtype}",
            added_up(sizes, lambda part, rank=rank: b * 2 * rank * max(part.shape) + 8, 2 * b),  # type: ignore[misc]
        )
    for share in SHARES:
        for name, how in (
            ("galore_adamw", "fp32 moments"),
            ("galore_adamw8bit", "8-bit moments, bf16 basis"),
            ("qgalore_adamw8bit", "8-bit moments, 4-bit basis; int8 weights"),
        ):
            title = "Q-GaLore" if name.startswith("q") else "GaLore"
            yield f"{title}, r = n/{share}", how, by_package(name, model, dtype, width // share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="7b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()
    config = PretrainConfig(model_config=arguments.model_config, dtype=arguments.dtype)
    parameters = plan_request(config, device="cuda").sizes.parameters
    found = list(rows(arguments.model_config, arguments.dtype))
    cells = [
        [
            name,
            how,
            f"{state / parameters:.2f}" if state > 0.01 * parameters else f"{state / parameters:.1g}",
            f"{state / 1e9:.2f}",
            f"{state / (4 * parameters):.0%}",
        ]
        for name, how, state in found
    ]
    print(f"{date.today()}; LLaMA {arguments.model_config}, {parameters / 1e9:.2f} billion parameters, weights in {arguments.dtype}\n")
    print(table(["optimizer", "state", "bytes a parameter", "GB of state", "of bf16 AdamW's"], cells))


if __name__ == "__main__":
    main()
