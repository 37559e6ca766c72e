"""Ops: a weight held as INT8 alone (Q-GaLore, arXiv 2407.08296). A tensor that owns codes, and no floating copy of itself.

To autograd, hooks, groups and checkpoints it is an ordinary parameter of its floating dtype; its gradient is an ordinary tensor.
A linear layer decodes it for each product and keeps nothing floating for the backward pass. Any other operation reads a decoded copy;
writing goes through `write.subtract`, or `copy_` and ``.data``, which replace all of it. A view is a decoded copy that refuses to be
written to.

256 elements of the flattened weight share a scale and an offset in bf16: 1.0156 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galore_torch.ops import affine
from galore_torch.ops.chunks import chunk_elements, parts
from galore_torch.ops.codecs import BLOCK
from galore_torch.ops.int8_codes import LEVELS, blocks_of, decode, int8_spec, store
from galore_torch.ops.linalg import product_dtype

DTYPES = (torch.bfloat16, torch.float32)
aten = torch.ops.aten


class Int8Weight(torch.Tensor):
    """An (m x n) weight. ``codes``: uint8 (m x n), contiguous; ``scale``, ``offset``: bf16, one for each block of 256 codes, in order."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Int8Weight:
        if dtype not in DTYPES:
            raise ValueError(
                f"an INT8 weight cannot stand for {dtype}: use torch.bfloat16 or torch.float32, such as model.to(torch.bfloat16)"
            )
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype):
        self.codes, self.scale, self.offset = codes, scale, offset

    @staticmethod
    @torch.no_grad()
    def quantize(weight: Tensor) -> Int8Weight:
        """The nearest INT8 weight to a matrix in bf16 or fp32, a few rows at a time: no full-size temporary.

        ValueError for values that are not finite: one would take the 255 others of its block with it.
        """
        codes, scale, offset = (tensor.allocate(weight.device) for tensor in int8_spec(tuple(weight.shape)).values())
        out = Int8Weight(codes, scale, offset, weight.dtype)
        for rows in row_parts(out):
            values = blocks_of(weight[rows].float())
            low, high = values.amin(1), values.amax(1)
            is_real = type(high) is Tensor and not high.is_meta  # a traced one has no values
            if is_real and not bool((high - low).isfinite().all()):
                raise ValueError(
                    f"values for an INT8 weight of shape {tuple(weight.shape)} are not finite: INT8 cannot hold them; load or initialise "
                    "the weights first"
                )
            scale, offset = affine.grid(low, high, LEVELS)
            store(out.rows(rows).stored, values - offset.unsqueeze(1), scale, offset, 0.5)
        return out

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """All the memory there is."""
        return self.codes, self.scale, self.offset

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)

    def rows(self, rows: slice) -> Int8Weight:
        """A view of some rows, which start and, but for the last, end with a block: whole multiples of `row_unit`."""
        n = self.shape[1]
        blocks = slice(rows.start * n // BLOCK, -(-rows.stop * n // BLOCK))
        return Int8Weight(self.codes[rows], self.scale[blocks], self.offset[blocks], self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A floating copy, made a few rows at a time."""
        pieces = list(row_parts(self))
        if len(pieces) == 1:
            return decode(*self.stored).to(dtype or self.dtype)
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        for rows in pieces:
            out[rows].copy_(decode(*self.rows(rows).stored))
        return out

    def __repr__(self, **_: Any) -> str:
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "offset"], self.dtype

    @staticmethod
    def __tensor_unflatten__(stored: dict[str, Tensor], dtype: Any, outer_size: Any, outer_stride: Any) -> Int8Weight:
        return Int8Weight(stored["codes"], stored["scale"], stored["offset"], dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and isinstance(weight := args[1] if len(args) > 1 else kwargs["weight"], Int8Weight):
            return _linear(weight, False, *args[:1], *args[2:], **{key: value for key, value in kwargs.items() if key != "weight"})
        if func is torch.addmm and len(args) == 3 and not kwargs and isinstance(args[2], Int8Weight):  # transformers' Conv1D
            return _linear(args[2], True, args[1], args[0])
        if (method := _METHODS.get(func)) is not None and isinstance(args[0], Int8Weight):
            return method(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args else None
        if isinstance(weight, Int8Weight):
            if func in (aten.detach.default, aten.alias.default, aten.clone.default):
                codes, scale, offset = (func(tensor) for tensor in weight.stored)
                return Int8Weight(codes, scale, offset, weight.dtype)
            if func is aten._to_copy.default or (func is aten.empty_like.default and "device" in kwargs):  # the latter is Module.to_empty
                where = {key: kwargs[key] for key in ("device", "non_blocking") if key in kwargs}
                codes, scale, offset = (func(tensor, **where) for tensor in weight.stored)
                return Int8Weight(codes, scale, offset, kwargs.get("dtype") or weight.dtype)
            if func is aten.copy_.default:
                source = args[1] if isinstance(args[1], Int8Weight) else Int8Weight.quantize(args[1].to(weight.dtype).expand(weight.shape))
                for tensor, new in zip(weight.stored, source.stored, strict=True):
                    tensor.copy_(new)
                return weight
        if func is aten.split.Tensor:
            raise ValueError(
                "INT8 weights are not sharded yet: train with one process or DistributedDataParallel, or call fully_shard on a model "
                "without quantize_linears"
            )
        return _on_copies(func, args, kwargs)


class Int8View(torch.Tensor):
    """What a view of an INT8 weight is: a decoded copy that can be read like any tensor. Writing would not reach the weight: an error."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Int8View:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device, storage_offset=values.storage_offset()
        )

    def __init__(self, values: Tensor):
        self.values = values

    def __repr__(self, **_: Any) -> str:
        return f"Int8View({self.values!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved, and copied by `copy.deepcopy`, as the ordinary tensor that it reads like."""
        return self.values.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values.detach().clone()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(stored: dict[str, Tensor], _: Any, outer_size: Any, outer_stride: Any) -> Int8View:
        return Int8View(stored["values"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.untyped_storage:
            return args[0].values.untyped_storage()
        if (method := _READS.get(func)) is not None:
            return method(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_copies(func, args, kwargs or {})


def _on_copies(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on floating copies in the places of INT8 weights and of their views; refused where it writes to one."""
    for place, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and _holds_int8(args[place] if place < len(args) else kwargs.get(argument.name)):
            raise ValueError(
                f"{func} would write to an INT8 weight, and rounding would lose what is small: train it with an optimizer of "
                "galore_torch, such as QGaLoreAdamW8bit, set all of it by weight.copy_(values), or call "
                "galore_torch.dequantize_linears(model) first"
            )
    out = func(*_decoded(args), **_decoded(kwargs))
    is_view = any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)
    if not is_view:
        return out
    return type(out)(map(Int8View, out)) if isinstance(out, list | tuple) else Int8View(out)


def _holds_int8(value: Any) -> bool:
    return isinstance(value, Int8Weight | Int8View) or (isinstance(value, list | tuple) and any(map(_holds_int8, value)))


def _decoded(value: Any) -> Any:
    """The same nest with floating copies in the places of INT8 weights and their views."""
    if isinstance(value, Int8Weight):
        return value.dequantize()
    if isinstance(value, Int8View):
        return value.values
    if isinstance(value, list | tuple):
        return type(value)(map(_decoded, value))
    return {key: _decoded(item) for key, item in value.items()} if isinstance(value, dict) else value


# --- methods that torch does not dispatch -----------------------------------------------------------------------------------


def _contiguous(weight: Tensor, **_: Any) -> Tensor:
    """A floating copy: one run of numbers in memory, as safetensors and save_pretrained ask for before they write a file."""
    with torch._C.DisableTorchFunctionSubclass():
        return (weight * 1).contiguous()


def _on_copy(func: Any) -> Any:
    """The same method of a floating copy; an array of numpy that shares its memory cannot be written to."""

    def method(weight: Tensor, **options: Any) -> Any:
        found = func(_decoded(weight.detach()).requires_grad_(weight.requires_grad), **options)
        if func is torch.Tensor.numpy:
            found.setflags(write=False)
        return found

    return method


def _share_memory(weight: Int8Weight) -> Int8Weight:
    for tensor in weight.stored:
        tensor.share_memory_()
    return weight


def _set_data(weight: Int8Weight, values: Tensor) -> None:
    """``weight.data = values``: another INT8 weight's codes as they are, or ordinary values, which are rounded to nearest."""
    if (values.shape, values.device, values.dtype) != (weight.shape, weight.device, weight.dtype):
        raise ValueError(
            f"data of shape {tuple(values.shape)}, {values.dtype} on {values.device} cannot become that of an INT8 weight of shape "
            f"{tuple(weight.shape)}, {weight.dtype} on {weight.device}: convert it first; model.to(...) moves the weight itself"
        )
    source = values if isinstance(values, Int8Weight) else Int8Weight.quantize(values.detach())
    weight.codes, weight.scale, weight.offset = source.stored


class _Identity(torch.UntypedStorage):
    """An empty storage. safetensors and transformers see by the pointer which weights are one, and by the size that no floating numbers
    lie behind it."""

    codes: Tensor

    def data_ptr(self) -> int:
        return 0 if self.codes.is_meta else self.codes.data_ptr()


def _identity(weight: Int8Weight) -> _Identity:
    storage = _Identity(0)  # type: ignore[no-untyped-call]
    storage.codes = weight.codes
    return storage


_READS: dict[Any, Any] = {
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.numpy: _on_copy(torch.Tensor.numpy),
    torch.Tensor.tolist: _on_copy(torch.Tensor.tolist),
}
_METHODS: dict[Any, Any] = {
    **_READS,
    torch.Tensor.untyped_storage: _identity,
    torch.Tensor.is_contiguous: lambda weight, **_: False,  # there is no run of floating numbers that a file could be written from
    torch.Tensor.share_memory_: _share_memory,
    torch.Tensor.is_shared: lambda weight: all(tensor.is_shared() for tensor in weight.stored),
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}


# --- rows ------------------------------------------------------------------------------------------------------


def row_unit(weight: Tensor) -> int:
    """The least number of rows that cuts no block; 1 for an ordinary weight."""
    return BLOCK // gcd(weight.shape[1], BLOCK) if isinstance(weight, Int8Weight) else 1


def row_parts(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix that fit the cache, see `chunks.chunk_elements`."""
    unit, (m, n) = row_unit(weight), weight.shape
    for units in parts(-(-m // unit), chunk_elements(weight.device) // max(1, unit * n)):
        yield slice(units.start * unit, min(units.stop * unit, m))


def rows_of(weight: Tensor, rows: slice) -> Tensor:
    """A view of some rows of a matrix, INT8 or not."""
    return weight.rows(rows) if isinstance(weight, Int8Weight) else weight[rows]


# --- the layer ------------------------------------------------------------------------------------------------------------


def _linear(weight: Int8Weight, transposed: bool, input: Tensor, bias: Tensor | None = None) -> Tensor:
    """input W^T + bias, or input W + bias where the weight is stored transposed."""
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(input.dtype)
    out: Tensor = _Linear.apply(input, weight, transposed)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


def product(input: Tensor, weight: Int8Weight, transposed: bool) -> Tensor:
    """input W^T, or input W where ``transposed``, in the input's dtype; one floating copy of the weight, for as long as it takes."""
    dtype = product_dtype(input.dtype, input.device.type)
    W = weight.dequantize(dtype)
    return (input.to(dtype) @ (W if transposed else W.mT)).to(input.dtype)


def check_unwritten(weight: Tensor, version: int) -> None:
    """Raise RuntimeError, as autograd does for tensors it has saved, where the weight is not the one that the forward pass saw."""
    if weight._version != version:
        raise RuntimeError(
            f"a weight of shape {tuple(weight.shape)} has been modified by an inplace operation between the forward and the backward "
            "pass that needs it: call backward() before optimizer.step()"
        )


class _Linear(torch.autograd.Function):
    """input W^T, or input W, decoded for each product: one floating copy of one weight at a time, and none between the passes.

    Products run in the `product_dtype` of the input and come back in its own; the weight's gradient in the weight's. The weight is not
    among the saved tensors, whose hooks, such as `save_on_cpu`, would make floating copies.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Int8Weight, transposed: bool) -> Tensor:
        ctx.save_for_backward(input)
        ctx.weight, ctx.version, ctx.transposed = weight, weight._version, transposed
        return product(input, weight, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (input,), weight = ctx.saved_tensors, ctx.weight
        check_unwritten(weight, ctx.version)
        back = product(grad, weight, not ctx.transposed).to(input.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            dtype = product_dtype(input.dtype, input.device.type)
            flat = input.reshape(-1, input.shape[-1]).to(dtype)
            of_out = grad.reshape(-1, grad.shape[-1]).to(dtype)
            grad_weight = (flat.mT @ of_out if ctx.transposed else of_out.mT @ flat).to(weight.dtype)
        return back, grad_weight, None
