"""The optimizer's memory of a Fourier neural operator, by the fraction of its spectral weights' elements that a core keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from rich.console import Console

from galore_torch.train.errors import UserError
from galore_torch.train.plan.units import gb
from galore_torch.train.report.progress import show_table

PREFIX = "fno:"
RATIOS = (0.5, 0.25, 0.1, 0.05)
SPARSE = 0.05  # beside a core of 0.2: TensorGRaD's own split of a quarter (arXiv 2501.02379v2)
# Optimizer state in "GB" of the published peak table (Tensor-GaLore, arXiv 2501.02379, the authors' notebook), AdamW's first.
PUBLISHED = {1.0: 19.73, 0.5: 9.93, 0.25: 4.83, 0.1: 1.97, 0.05: 0.98}


@dataclass(frozen=True)
class FourierOperator:
    """An FNO as neuraloperator 2.0 makes it from these sizes, with one channel in and out and its defaults for all else."""

    modes: tuple[int, ...]
    channels: int
    layers: int

    @staticmethod
    def parse(name: str) -> FourierOperator:
        """Of "fno:64x64:64:4": modes, channels, layers."""
        match = re.fullmatch(r"fno:(\d+(?:x\d+)*):(\d+):(\d+)", name.lower())
        sizes = [int(size) for part in match.groups() for size in part.split("x")] if match else []
        if not sizes or min(sizes) < 1:
            raise UserError(f"--model {name!r} is no Fourier neural operator: give modes, channels and layers, such as fno:64x64:64:4")
        return FourierOperator(tuple(sizes[:-2]), sizes[-2], sizes[-1])

    @property
    def spectral(self) -> tuple[int, ...]:
        """The shape of one of ``layers`` complex weights; the last axis of a real field's transform has half of the modes."""
        return (self.channels, self.channels, *self.modes[:-1], self.modes[-1] // 2 + 1)

    @property
    def real(self) -> list[tuple[int, ...]]:
        """Shapes of all other weights."""
        half = round(self.channels / 2)
        C, d, ones = self.channels, len(self.modes), [1] * len(self.modes)
        layer = [(C, *ones), (C, C, 1), (half, C, 1), (half,), (C, half, 1), (C,), (1, C, *ones)]
        ends = [(2 * C, 1 + d, 1), (2 * C,), (C, 2 * C, 1), (C,), (2 * C, C, 1), (2 * C,), (1, 2 * C, 1), (1,)]
        return layer * self.layers + ends

    @property
    def nbytes(self) -> int:
        return 8 * self.layers * prod(self.spectral) + 4 * sum(prod(shape) for shape in self.real)

    def state(self, class_name: str, rank: float | None, sparse: float | None = None) -> tuple[int, int]:
        """Bytes of (factors, moments) in an optimizer of this package that projects the spectral weights."""
        import torch

        import galore_torch
        from galore_torch.train.plan.optimizer_bytes import param_bytes

        optimizer = getattr(galore_torch, class_name)([torch.nn.Parameter(torch.zeros(2, device="cpu"))], tensor=True)
        group = optimizer.param_groups[0]
        weight = param_bytes(self.spectral, torch.complex64, {**group, "rank": rank, "sparse": sparse}, optimizer.rule)
        rest = sum(param_bytes(shape, torch.float32, group, optimizer.rule).moments for shape in self.real)
        return self.layers * weight.basis, self.layers * weight.moments + rest


def plan_operator(arguments: Mapping[str, Any], console: Console) -> None:
    """`galore plan --model fno:...`: a table; no other flag has a meaning here."""
    if other := sorted(set(arguments) - {"model", "run"}):
        raise UserError(f"--{other[0]} has no effect with --model {arguments['model']}, whose optimizers stand side by side; leave it out")
    model = FourierOperator.parse(arguments["model"])
    adamw = 2 * model.nbytes
    rows = [["torch's AdamW", "", gb(adamw), "100.0 %", f"{PUBLISHED[1.0]:.2f} = 100 %"]]
    cases: list[tuple[str, str, float | None, float | None]] = [("GaLoreAdamW, |g|² real", "GaLoreAdamW", None, None)]
    cases += [("Tensor-GaLore", "TensorGaLoreAdamW", ratio, None) for ratio in RATIOS]
    cases += [("Tensor-GaLore, 8-bit", "GaLoreAdamW8bit", ratio, None) for ratio in RATIOS]
    cases += [("TensorGRaD", "TensorGaLoreAdamW", 0.25 - SPARSE, SPARSE)]
    for label, class_name, ratio, sparse in cases:
        basis, moments = model.state(class_name, ratio, sparse)
        published = f"{PUBLISHED[ratio]:.2f} = {PUBLISHED[ratio] / PUBLISHED[1.0]:.1%}" if ratio and label == "Tensor-GaLore" else ""
        share = f"{(basis + moments) / adamw:.1%}".replace("%", " %")
        name = label + "".join([f", {ratio:g}" if ratio else "", f" + {sparse:g}" if sparse else ""])
        rows.append([name, gb(basis), gb(basis + moments), share, published.replace("%", " %")])
    sizes = f"{'x'.join(map(str, model.modes))} modes, {model.channels} channels, {model.layers} layers"
    title = f"[bold]FNO, {sizes}: {gb(model.nbytes)} GB of weights, and as much of gradients[/]"
    show_table(console, title, ["optimizer, ratio", "bases", "state, GB", "of AdamW's", "published, GB"], rows)
    console.print(
        "note: GB of 10^9 bytes; spectral weights in complex64, projected; all others at full rank. The published numbers are those of a "
        "model whose AdamW holds 19.73, so their shares compare and their sizes do not",
        highlight=False,
        soft_wrap=True,
    )
