"""Bytes of optimizer state, and of what the linear layers save for the backward pass, for each side of the basis. Nothing is allocated.

    python benchmarks/side/state.py                                   # the paper's models and ranks
    python benchmarks/side/state.py --models 7b:512 60m:0.25          # others; a rank below 1 is a share of the width

State is that of the projected matrices alone (embeddings, head and norms are the same on every side), added up from
`galore_torch.engine.stored.state_spec` by way of the planner's `cost`. A layer whose basis is on the right of its weight W (m x n,
y = x W^T) can save x Q (tokens x r) for its backward pass, all others save x (tokens x n), once for the layers that share it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import table

from galore_torch.engine.layout import projected_axes
from galore_torch.train.model.llama import model_shape
from galore_torch.train.model.sizes import Part, Sizes, llama_sizes
from galore_torch.train.plan.methods import cost

MODELS = ("60m:128", "350m:256", "1b:512", "7b:1024", "llama3-8b:1024")  # ranks of arXiv 2403.03507, table 2; 7B's for Llama-3 too
CODECS = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("int8", "bf16"), ("int8", "int4"))  # (moments, basis)
TOKENS = 1000


@dataclass(frozen=True)
class Side:
    """``shared``: one basis for q, k and v, and one for gate and up, as if each were one weight."""

    label: str
    proj_type: str
    shared: bool = False


SIDES = (
    Side("std", "std"),
    Side("reverse_std", "reverse_std"),
    Side("right", "right"),
    Side("right, shared", "right", shared=True),
    Side("left", "left"),
)


def readers(sizes: Sizes) -> list[list[tuple[int, int]]]:
    """The weights of one layer of a LLaMA, those that read the same input together: (q, k, v), (o), (gate, up), (down)."""
    D, I, Q, KV = sizes.hidden, sizes.intermediate, sizes.attention, sizes.key_value
    return [[(Q, D), (KV, D), (KV, D)], [(D, Q)], [(I, D), (I, D)], [(D, I)]]


def weights(sizes: Sizes, side: Side) -> list[list[tuple[int, int]]]:
    """`readers`, stacked into one weight where the basis is shared."""
    return [[(sum(m for m, _ in group), group[0][1])] if side.shared else group for group in readers(sizes)]


def state_bytes(sizes: Sizes, side: Side, rank: int, moments: str, basis: str) -> int:
    """Of the moments and bases of all projected matrices."""
    settings = {
        "rank": rank,
        "proj_type": side.proj_type,
        "state_codec": moments,
        "basis_codec": basis,
        "update_proj_gap": 200,
        "gap_range": None,
        "beta1": None,
    }
    shapes = Counter(shape for group in weights(sizes, side) for shape in group)
    costs = {shape: cost(Part(shape, 1, "matrix", True), True, "galore_adamw", "bfloat16", "cpu", settings) for shape in shapes}
    return sizes.layers * sum(count * (costs[shape].moments + costs[shape].basis) for shape, count in shapes.items())


def saved_elements(sizes: Sizes, side: Side, rank: int) -> int:
    """Elements a token that the linear layers save: x Q for each basis on the right, x once for all others that read it."""
    saved = 0
    for group in weights(sizes, side):
        right = [projected_axes(shape, side.proj_type) == (-1,) and rank < min(shape) for shape in group]
        saved += rank * sum(right) + (0 if all(right) else group[0][1])
    return sizes.layers * saved


def rows(model: str) -> Iterator[list[str]]:
    name, _, given = model.partition(":")
    shape = model_shape(name)
    assert shape.vocab_size is not None
    sizes = llama_sizes(shape, shape.vocab_size)
    rank = int(float(given) * sizes.hidden) if float(given) < 1 else int(given)
    whole = sizes.layers * sum(group[0][1] for group in readers(sizes))
    for side in SIDES:
        states = [f"{state_bytes(sizes, side, rank, *codecs) / 1e6:,.1f}" for codecs in CODECS]
        saved = saved_elements(sizes, side, rank)
        yield [f"{name}, r = {rank}", side.label, *states, f"{2 * TOKENS * saved / 1e6:,.1f}", f"{saved / whole:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL:RANK")
    arguments = parser.parse_args()
    print(f"{date.today()}; MB (10⁶ bytes) of the matrices' state, moments / basis; activations in bf16\n")
    columns = [f"{moments} / {basis}" for moments, basis in CODECS]
    header = ["model", "side", *columns, f"saved by linear layers, MB for {TOKENS:,} tokens", "of x"]
    print(table(header, [row for model in arguments.models for row in rows(model)]))


if __name__ == "__main__":
    main()
