"""Bytes before you run. Adds up `stored.state_spec` and never touches the engine, a tensor or a device.

Lasting bytes are exact. Those that a step needs for a moment follow the engine's passes and are checked against the allocator's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from galore_torch.engine.layout import AnyRule, Layout, make_layout
from galore_torch.engine.sharding import Placed
from galore_torch.engine.stored import state_spec, stored_error
from galore_torch.ops.chunks import chunk_elements, part_size
from galore_torch.ops.codecs import CODED
from galore_torch.ops.linalg import OVERSAMPLING, product_dtype
from galore_torch.slots.carry import CARRIES
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.recovery import RECOVERIES
from galore_torch.slots.transport import TRANSPORTS
from galore_torch.train.plan import tensor_bytes

# Bytes an element that one elementwise pass has out at once, where no compiler fuses it; int8 looks its levels up by indices.
# Off the CPU the state is copied too, to be put back where a gradient is not finite.
_PASSES = {
    "cpu": {"mulaw4": 30, "int8": 29, "bf16": 22, "fp32": 4},
    "cuda": {"mulaw4": 32, "int8": 31, "bf16": 20, "fp32": 16},
}
# The same of a carry, which is stored in one pass over all of it, beside the gradient.
_ERROR = {"int4": 5.5, "int8": 29, "bf16": 10, "fp32": 0}
# Of a change of basis, in R's, beside the bases: by the transport's kind and how moments are stored.
_MOVED = {"turned": {"fp32": 2.0, "bf16": 3.5}, "predicted": {"fp32": 4.0, "bf16": 7.5}}
_MOVED_CODES = {"turned": 6.25, "predicted": 9.25}


@dataclass(frozen=True)
class ParamBytes:
    """Bytes of one parameter: ``basis`` and ``moments`` last, ``low`` is its gradient R, ``step`` and ``refresh`` pass."""

    basis: int
    moments: int
    low: int
    step: int
    refresh: int

    @property
    def transient(self) -> int:
        """The most a step needs beside the state and the gradient, R included; every parameter begins with a refresh."""
        return max(self.step, self.refresh)


def param_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any], rule: AnyRule, device: str = "cpu", shards: int = 1
) -> ParamBytes:
    """What one parameter of ``shape`` costs in a parameter group of one of this package's optimizers. ``device``: "cpu" or "cuda".

    ``shards``: processes among which `fully_shard` cuts its first dimension; the first, whose part is the largest, is counted.
    """
    placed = Placed(shape, ((0, shards),)) if shards > 1 else None
    layout = make_layout(shard_of(shape, shards), dtype, group, placed)
    spec = state_spec(layout, group, rule)
    basis = sum(tensor.nbytes for key, tensor in spec.items() if key.startswith("basis") and not tensor.host)
    moments = sum(tensor.nbytes for key, tensor in spec.items()) - basis
    low = prod(layout.low_shape) * layout.compute_dtype.itemsize if layout.ranks else 0
    step, refresh = _step(layout, group, low, device), _refresh(layout, group, low, basis + moments, device)
    return ParamBytes(basis, moments, low, step, refresh)


def shard_of(shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """The first process' part."""
    return (-(-shape[0] // shards), *shape[1:])


def thin_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any], rule: AnyRule, tokens: int, device: str = "cpu"
) -> int:
    """What a layer's backward pass needs for a moment to find a basis and R from dy (``tokens`` x m) and x (``tokens`` x n).

    `OuterProduct`: both factors in fp32, and products of as many columns as a sketch has; no tensor of the weight's size.
    """
    layout = make_layout(shape, dtype, group)
    spec = state_spec(layout, group, rule)
    low = prod(layout.low_shape) * layout.compute_dtype.itemsize
    state = sum(tensor.nbytes for key, tensor in spec.items())
    return _refresh(layout, group, low, state, device, tokens)


def _step(layout: Layout, group: Mapping[str, Any], low: int, device: str) -> int:
    """An ordinary step: R, the bases in the dtype of the products, and chunks of the elementwise passes."""
    elements = min(prod(layout.low_shape), chunk_elements(torch.device(device)))
    if group["state_codec"] not in CODED:  # slices of the first axis
        elements = min(elements, _part(layout.low_shape[0], prod(layout.low_shape[1:]), device))
    passes = _PASSES[device][group["state_codec"]] * elements * layout.compute_dtype.itemsize // 4
    if not layout.ranks:
        if layout.dtype != layout.compute_dtype:  # the gradient in fp32, and what rounding a weight makes on the way
            passes = max(passes + elements * layout.compute_dtype.itemsize, 18 * elements)
        return passes
    if layout.is_tensor:
        carried = 2 * prod(layout.shape) * layout.compute_dtype.itemsize if group["carry"] else 0
        return carried + tensor_bytes.step_bytes(layout, low, passes, chunk_elements(torch.device(device)))
    bases = sum(prod(basis.shape) for basis in layout.bases.values())
    is_made = PROJECTORS[layout.projector].basis == "a seed"  # at every step
    needed = product_dtype(layout.dtype, device)
    copied = bases * (needed.itemsize if layout.basis_codec != "fp32" or needed != torch.float32 or is_made else 0)
    alone = PROJECTORS[layout.projector].part and not RECOVERIES[group["recovery"]].reads and not group["weight_decay"]
    written = layout.low_shape if alone else layout.view  # a set of rows leaves all others as they are
    rows = _part(prod(written[:-1]), written[-1], device)
    product = rows * (needed.itemsize + 2 * layout.compute_dtype.itemsize + 6) if layout.dtype.itemsize == 2 else 0  # and its rounding
    recovery, carry = RECOVERIES[group["recovery"]], CARRIES[group["carry"]]
    reads, decoded = recovery.reads, {"fp32": 0, "bf16": 2 * low}.get(group["state_codec"], 5 * low)
    full = prod(layout.shape) * layout.compute_dtype.itemsize
    # Some rows of the update; for the residual R, both moments and G of them, and decoded moments.
    if group["projector"] == "block_mean" and recovery.residual in (0, 1):
        short = layout.dtype.itemsize == 2
        product = (10 if "moments" in reads else 9 if short else 4) * rows * layout.compute_dtype.itemsize // 2
        if "moments" in reads:
            product = low + max(product + min(decoded, 2 * low), decoded)
        elif decoded and not short and group["compile"] is not False:  # the one pass has no R, and both moments in full
            product = max(product, low)
    elif recovery.whole:
        product = low + _orthogonal(layout, device)  # the update beside R
    elif "grad" in reads:  # the residual, and the update beside R; where it reads moments those, and what becomes of them
        made = 8 * low if group["state_codec"] in CODED else 5 * low + decoded
        product += low + full + (made if "moments" in reads else 0)
        product += low if group["projector"] == "rows" and layout.batch else 0
    beside = low if (reads and not recovery.remakes) or carry else 0  # the update, where R is still wanted
    own = 0 if layout.projector == "identity" and layout.dtype == layout.compute_dtype else low  # else R is G itself
    most = max(passes + beside, copied + product + (low if carry else 0))
    if error := stored_error(layout, group):  # it is added to G in full, and stored
        most = max(most, full, int(_ERROR[error.codec] * full / layout.compute_dtype.itemsize))
    return own + _held(layout, group) + most


def _part(length: int, each: int, device: str) -> int:
    """Elements that are worked on at once, of so many slices of ``each``."""
    return each * part_size(length, max(1, chunk_elements(torch.device(device)) // max(1, each)))


def _held(layout: Layout, group: Mapping[str, Any]) -> int:
    """What a step with a carry has out throughout, in full: the gradient with the error in it, and what the momentum loses."""
    carry = CARRIES[group["carry"]]
    return (1 + carry.momentum) * prod(layout.shape) * layout.compute_dtype.itemsize if carry else 0


def _orthogonal(layout: Layout, device: str) -> int:
    """Newton-Schulz: the matrix, put together where it is shared, two iterates and two Gram matrices, or an iterate and the answer; or the
    answer, and what rounding some rows of a weight takes."""
    (m, n), matrices, itemsize = layout.whole[-2:], prod(layout.batch), layout.compute_dtype.itemsize
    product = itemsize if itemsize > 4 else product_dtype(torch.bfloat16, device).itemsize
    full, iterate, gram = (matrices * elements for elements in (m * n * itemsize, m * n * product, min(m, n) ** 2 * product))
    shared = prod(layout.view) * itemsize if layout.cuts else 0
    # A CPU brings an operand of a product in bf16 into an order of its own, for tiles both of them.
    tiled = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    copied = iterate + (gram if tiled else 0) if product == 2 and device == "cpu" else 0
    rows, columns = layout.view[-2:]
    rounded = 14 * columns * part_size(rows, chunk_elements(torch.device(device)) // max(1, columns)) if layout.dtype.itemsize == 2 else 0
    answered = max(iterate if product != itemsize else 0, rounded)
    return shared + full + max(2 * iterate + 2 * gram + copied, full + answered if answered else 0)


def _refresh(layout: Layout, group: Mapping[str, Any], low: int, state: int, device: str, tokens: int = 0) -> int:
    """A refresh: the gradient in fp32, then the largest of the sketch's blocks and of the transport of the moments.

    ``tokens``: rows of the two factors that stand in the gradient's place; 0: it is whole. Off the CPU the host looks at no value: a
    state is copied to be put back, and a gradient to be zeroed, where that is not finite.
    """
    if not layout.ranks or PROJECTORS[layout.projector].find is None:
        return 0
    if layout.is_tensor:
        return tensor_bytes.refresh_bytes(layout, low + 2 * low, state if device != "cpu" else 0)
    itemsize, (m, n), matrices = layout.compute_dtype.itemsize, layout.view[-2:], prod(layout.batch)
    rank, blind = max(layout.ranks.values()), device != "cpu"
    elements, codec = tokens * (m + n) if tokens else m * n, group["state_codec"]
    gradient = matrices * (elements * itemsize if layout.dtype != layout.compute_dtype and not group["carry"] else 0)
    gradient += matrices * elements * layout.dtype.itemsize if blind else 0
    followed = matrices * elements * itemsize if PROJECTORS[layout.projector].follows else 0
    width = min(rank + OVERSAMPLING, m, n)
    found = sum(prod(basis.shape) for basis in layout.bases.values()) * itemsize
    side = max(layout.view[axis] for axis in layout.ranks)
    sketch = matrices * (m + n + max(m + n, tokens + side if tokens else 0)) * width * itemsize
    if group["projector"] in ("svd", "gram"):
        sketch = matrices * itemsize * ((m + n + 1) * min(m, n) + m * n if group["projector"] == "svd" else 3 * min(m, n) ** 2 + m * n)
    if PROJECTORS[layout.projector].part:  # rows are drawn
        sketch = 0
    else:
        sketch += matrices * 3 * width**2 * itemsize // 2
    if len(layout.ranks) > 1:  # the first basis is there, and the old ones, while the second is found
        sketch += 2 * found
    decoded = found if layout.basis_codec != "fp32" else 0
    kind = "predicted" if TRANSPORTS[group["transport"]].adam else "turned"
    moved = int(low * _MOVED[kind].get(codec, _MOVED_CODES[kind]))
    transport = found + decoded + matrices * rank**2 * itemsize + moved + (state if blind else 0)
    started = 0 if tokens else decoded  # a first basis, the largest, starts from none
    # The first moment that a basis follows is made in full, of the gradient in full, and replaces it.
    made = 2 * found + {"fp32": 0, "bf16": low}.get(codec, 4 * low) + gradient + followed if followed else 0
    return _held(layout, group) + max(max(gradient, followed) + started + sketch, transport, made)
