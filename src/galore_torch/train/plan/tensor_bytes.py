"""What a step of a tensor needs for a moment: the products with its factors one after the other, and a refresh's sketches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from galore_torch.engine.layout import Layout
from galore_torch.ops.chunks import part_size
from galore_torch.ops.linalg import OVERSAMPLING, THIN
from galore_torch.slots.sparse_tucker import SET, modes


def step_bytes(layout: Layout, low: int, passes: int, at_once: int) -> int:
    """An ordinary step: the gradient in fp32 where it has 16 bits, the chains of products, factors that are decoded.

    ``low``, ``passes``: bytes of the core, and of the elementwise passes over it. ``at_once``: elements of a pass, `chunk_elements`.
    """
    itemsize, ranks = layout.compute_dtype.itemsize, modes(layout.ranks)
    order = sorted(ranks, key=lambda axis: ranks[axis] / layout.view[axis])
    sizes = [*layout.view]
    copies = (SET in layout.ranks) + _is_wide(layout)  # of the gradient, for the first product: in fp32, without its largest elements
    first = copies * prod(layout.view) + _chain([*sizes], order[:1], ranks)
    forth = max(first, _chain(sizes, order, ranks)) * itemsize
    last = next((axis for axis in order if prod(sizes[: axis + len(sizes)]) == 1), max(order))
    back = _chain(sizes, [axis for axis in reversed(order) if axis != last], dict(enumerate(layout.view, -len(sizes)))) * itemsize
    rounded = 18 * _rounded_at_once(layout, last, at_once) if layout.dtype.itemsize == 2 else 0
    decoded = sum(prod(basis.shape) for basis in modes(layout.bases).values()) * itemsize if layout.basis_codec != "fp32" else 0
    decoded += 8 * layout.ranks.get(SET, 0)  # indices as torch takes them
    return decoded + max(forth, low + passes, low + back + rounded)


def refresh_bytes(layout: Layout, moved: int, copied: int) -> int:
    """The first refresh, whose sketches start from nothing: of each mode's unfolding, products as wide as the sketch.

    ``moved``: bytes of the moments on their way across; ``copied``: those of a state that is to be put back on a device.
    """
    sizes, worst, whole = [*layout.view], 0, prod(layout.view)
    for axis, rank in modes(layout.ranks).items():
        size, length = prod(sizes), sizes[axis]
        before = size if size != whole else 0  # what the modes before have left of G
        unfolded = 0 if prod(sizes[: axis + len(sizes)]) == 1 else size
        width = min(rank + OVERSAMPLING, length, size // length)
        worst = max(worst, before + unfolded + int(SKETCHES * width * size) // length)
        sizes[axis] = rank
    itemsize = layout.compute_dtype.itemsize
    factors = 2 * sum(prod(basis.shape) for basis in modes(layout.bases).values())
    gradient = whole * itemsize * (_is_wide(layout) + (copied > 0) + (SET in layout.ranks))
    return gradient + factors * itemsize + max(worst * itemsize, moved) + copied


SKETCHES = 2.3  # tensors as wide as a sketch that are there at once: a product, and it over its largest magnitude


def _chain(sizes: list[int], order: Iterable[int], lengths: Mapping[int, int]) -> int:
    """The most elements at once, but for what comes in first, while each axis of ``order`` in turn gets its length; ``sizes`` follow."""
    most, held = 0, 0
    for axis in order:
        before = prod(sizes)
        thin = axis != -1 and prod(sizes[axis + 1 :]) < THIN < prod(sizes[: axis + len(sizes)])
        sizes[axis] = lengths[axis]
        after = prod(sizes)
        most, held = max(most, held + after + (before if thin else 0)), after
    return most


def _rounded_at_once(layout: Layout, last: int, at_once: int) -> int:
    """Elements that the product of the mode ``last`` brings into the weight at a time: some rows of it, seen as a matrix."""
    before, length, after = prod(layout.view[:last]), layout.view[last], prod(layout.view[len(layout.view) + last + 1 :])
    rows, columns = (before, length) if after == 1 else (length, after)
    return part_size(rows, at_once // max(1, columns)) * columns


def _is_wide(layout: Layout) -> bool:
    return layout.dtype != layout.compute_dtype
