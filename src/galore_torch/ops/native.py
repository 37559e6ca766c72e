"""Ops: whole steps of Adam in one pass, for projectors without a product: a small C++ operator, built on first use by torch's own
`cpp_extension`; `ops.twins` has those of a GPU. The plain road is its oracle and its fall-back.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("adam_steps.cpp")
# By what torch finds the processor to have, and not -march=native: a home folder may be shared by different machines.
VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]

SIGNS = 3  # of `AdamStep.residual`


class AdamStep(NamedTuple):
    """What a step depends on but tensors. numbers: 1 - beta1, 1 - beta2, the step size with everything in it, eps, the factor of the
    weight, and -1 to climb, else 1. residual: what the subspace leaves of G is 0: not used, 1: put into both moments (FOAM, arXiv
    2512.07112), 2: put into the first one, while the second averages the block's mean square (`slots.recovery.fold`), 3: moved against by
    its sign alone (FRUGAL, arXiv 2411.07837), ``rest`` far. seed: that of stochastic rounding, or None."""

    numbers: tuple[float, ...]
    residual: int = 0
    seed: int | None = None
    rest: float = 0.0


# (weight, grad, the storage tensors of both moments and of the basis, how), as `block_means`.
OnePass = Callable[[Tensor, Tensor, tuple[Tensor, ...], AdamStep], "bool | None"]


@lru_cache(maxsize=1)
def library() -> Any:
    """The operator, or None where there is nothing to build it with. A build that fails warns, once."""
    from torch.utils import cpp_extension

    if sys.platform not in ("linux", "darwin") or not cpp_extension.is_ninja_available():
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*FLAGS, *VECTORS.get(capability, []), *(["-fopenmp"] if sys.platform == "linux" else [])]
    version = hashlib.sha256(SOURCE.read_bytes() + repr(flags).encode()).hexdigest()[:12]
    try:
        built = cpp_extension.load(
            f"galore_torch_{version}",
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"] if sys.platform == "linux" else [],
            is_python_module=False,
        )
        found = ctypes.CDLL(built)
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        found.galore_rows.argtypes = [pointer] * 4 + [count] * 4 + [number] * 7 + [ctypes.c_int]
        found.galore_block_means.argtypes = [pointer] * 4 + [count] * 4 + [number] * 6 + [ctypes.c_int] * 2
    except Exception as failure:  # whatever a compiler or a read-only folder may complain of
        warn_of("the C++ operator", failure)
        return None
    return found


def warn_of(what: str, failure: Exception) -> None:
    """Say that the plain road is taken, and why."""
    warnings.warn(
        f"{what} could not be built ({type(failure).__name__}: {str(failure).strip()[:200]}): steps take the plain road, which is slower "
        "and the same. compile=False asks for that road without a warning",
        stacklevel=3,
    )


def block_means(weight: Tensor, grad: Tensor, moments: tuple[Tensor, ...], how: AdamStep) -> bool | None:
    """One step of Adam on means of neighbours, in place, see `AdamStep`.

    True: done; False: the gradient is not finite, and nothing was changed; None: there is no operator here, or none for these tensors.
    weight and grad (m x n), moments m and v (m x r or r x n), all contiguous and on the CPU; in fp32, or there is none. A batch of matrices
    counts as a tall one.
    """
    found = library() if weight.dtype == grad.dtype == torch.float32 and how.residual != SIGNS else None
    if found is None:
        return None
    m, v = moments
    rows, columns = m.numel() // m.shape[-1], m.shape[-1]
    tall, wide = weight.shape[-2] // m.shape[-2], weight.shape[-1] // m.shape[-1]
    pointers = (each.data_ptr() for each in (weight, grad, m, v))
    done: int = found.galore_block_means(*pointers, rows, columns, tall, wide, *how.numbers, how.residual, torch.get_num_threads())
    return None if done < 0 else bool(done)


def rows(weight: Tensor, grad: Tensor, tensors: tuple[Tensor, ...], how: AdamStep) -> bool | None:
    """One step of Adam on the rows of a set that follow each other, in place, and of the sign on all others; otherwise as `block_means`.

    weight and grad (m x n); tensors: the moments (r x n) and the set (r), int64, of one matrix. A gradient counts as finite where its rows
    of the set are; of the others each element counts by itself.
    """
    m, v, index = tensors
    found = library() if weight.dtype == grad.dtype == torch.float32 and how.residual in (0, SIGNS) and index.dim() == 1 else None
    if found is None:
        return None
    first, last = int(index[0]), int(index[-1])
    if last - first != index.numel() - 1:  # a set of an older checkpoint may go on at the first row
        return None
    pointers = (each.data_ptr() for each in (weight, grad, m, v))
    rest = how.rest if how.residual else 0.0
    return bool(found.galore_rows(*pointers, *weight.shape, first, index.numel(), *how.numbers, rest, torch.get_num_threads()))
