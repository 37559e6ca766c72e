"""Optim: the arguments that all public classes share: their types, their help, and how a class's signature shows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, TypedDict, get_type_hints


class Projection(TypedDict, total=False):
    """The arguments, and group keys, that all classes share; their defaults are in `recipe.PROJECTION_DEFAULTS` and `RECIPES`."""

    rank: int | float | str | list[int | None] | None
    update_proj_gap: int
    gap_range: tuple[int, int] | None
    overlap_range: tuple[float, float]
    scale: float
    proj_type: str
    random_after: int | None
    carry_codec: str
    batch_dims: int | None
    tensor: bool | str
    sparse: float | None
    sparse_scale: float
    projector: str
    transport: str
    recovery: str
    carry: str | None
    state_codec: str
    basis_codec: str
    stochastic_rounding: bool
    scale_parameter: bool
    decay: str
    min_8bit_size: int
    maximize: bool
    compile: bool | None
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


SHARED = """
    Shared by all classes, each also a group key:
        params: parameters, (name, parameter) pairs, or groups of either, such as `galore_param_groups` builds.
        rank: None trains at full rank; a whole number from 1, or a fraction of the short side. Vectors, and matrices whose
            short side is not above the rank, train at full rank. Default None: only groups with a rank are projected. Of tensors, see
            ``tensor``. "full", for GaLoreMuon: the group's matrices train as such without a projection.
        update_proj_gap: steps between two refreshes of the basis. Default 200, GaLoreMuon 1.
        gap_range: None keeps that gap; (least, most) lets each matrix find its own from there: doubled at a refresh that kept at
            least the upper share of ``overlap_range`` of the subspace, halved at one that kept less than the lower. Default None.
        overlap_range: those two shares. A gradient's subspace overlaps that of the next batch by 0.5 to 0.7. Default (0.4, 0.6).
        scale: factor of the projected update (alpha in arXiv 2403.03507). Default 0.25, GaLoreMuon 0.2.
        proj_type: "std" projects the short side, "reverse_std" the long one, "left", "right", "full" both. Default "std".
        projector: how the basis is found. "power" (default) takes one warm-started step and spreads the refreshes over the gap;
            "momentum" takes it on the first moment, which the basis then follows (arXiv 2410.16103); "rsvd" starts anew each time; "gram"
            and "svd" are exact, and "svd" refreshes all at once, as galore-torch 1.0; "random" looks at no gradient; "rows" trains so
            many rows at a time, other ones after each gap, without a GEMM; "block_mean" takes the means of 2^l neighbours, the largest
            2^l that divides the side and leaves at least ``rank`` means: no GEMM, no basis and no refresh (arXiv 2512.07112); "gaussian"
            multiplies by random numbers that a seed makes at every step, and keeps the seed (arXiv 2412.05270); "switch" keeps the
            strongest directions and draws the others anew from their complement (arXiv 2502.07752).
        random_after: from this step on refreshes take random bases in place of the gradient's (arXiv 2410.11289). Default None: never.
        batch_dims: how many leading dimensions count matrices, each with a basis of its own. None is 1 for E x m x n weights with m and n
            from 16, as experts have, and 0 for others, such as kernels of convolutions: one matrix, (first, rest). Default None.
        tensor: True projects each dimension of a parameter with a factor of its own, a Tucker decomposition (arXiv 2501.02379), real or
            complex: convolutions, spectral weights. "auto" does so where a parameter is no matrix and no batch of matrices, as `batch_dims`
            tells them, and where it is complex; real matrices keep to the other settings. rank is then a fraction of the elements that
            the core keeps, a number for every dimension, or a list with a number or None (whole) for each; a fraction or a number leaves
            dimensions of size 1 to 4 whole. The factors follow one warm sweep of HOOI at a refresh. A complex weight has the second
            moment of |R|^2, a real number. Default False: tensors are projected as matrices.
        sparse: of a tensor's gradient this share of its elements, the largest at each refresh, keeps moments of its own, and the factors
            see the rest (TensorGRaD, arXiv 2501.02379v2; there 0.05 beside rank=0.2). Default None. sparse_scale: factor of their update,
            in the place of ``scale``. Default 1.0.
        transport: what happens to the moments when the basis changes, "rotate", "keep" or "reset", or "predict", which takes Adam's for
            mean and variance (arXiv 2410.16103).
        recovery: how the update reaches the weight. "project_back" writes what lies in the subspace; all others read the full gradient.
            "fira" (arXiv 2410.01623) adds what lies outside, scaled as the rule scaled each column; "apollo" and "apollo_mini" (arXiv
            2412.05270) write the whole gradient so scaled, by columns or as one; "sign" (arXiv 2411.07837) and "rms" add the sign of what
            lies outside, or that divided by its root mean square; "alice" (arXiv 2502.07752) divides it by its own running energy; "foam"
            (arXiv 2512.07112) and "fold" add it to both moments, or the first one, of block means. "orthogonal" is GaLoreMuon's.
        carry: None, or "error_feedback", which adds what the projection dropped to the next gradient and remembers as much as a weight
            holds, or "momentum_feedback", which remembers what the momentum loses at a refresh too (arXiv 2410.16103). Both read the full
            gradient. carry_codec: it is stored in "fp32", "bf16", "int8" or "int4", or as the "weight", as of a basis.
        state_codec: moments in "fp32", "bf16" or "int8"; "mulaw4" has four bits for GaLoreMuon's momentum and int8 for the rest.
            basis_codec: basis in "fp32", "bf16" or "int4", or as the "weight": in bf16 where that has 16 bits, else in fp32.
        stochastic_rounding: round bf16 and INT8 weights up or down at random, so that small updates are not lost. Default True.
        scale_parameter: multiply ``lr`` by the root mean square of each weight, 0.001 at least: a step is a share of the weight, as
            Adafactor's (arXiv 1804.04235, section 8), and so is what a weight decay takes. Give it to the groups with a rank, with an
            ``lr`` about 50 times as large, for weights begin with a root mean square near 0.02. Experts count as one weight, but for
            GaLoreAdafactor, whose rule sees one matrix at a time. Default False; GaLoreAdafactor's own is above, and GaLore(base) leaves
            it to the class.
        decay: weight decay "before" the update, as torch.optim.AdamW, or "after" it, as galore-torch 1.0.
        min_8bit_size: moments with fewer elements stay fp32 under "int8" and "mulaw4". Default 4096.
        compile: fuse the elementwise part of a step by torch.compile's Inductor. None does so where it pays (from 2^15 elements, when a
            compiler is found, once the steps of a shape have cost what compiling it does), True at once, False never. Compiling takes
            some seconds for each shape. Block means in fp32 take a C++ operator instead, built once, and on a GPU, as
            rows do, a Triton kernel (without scale_parameter). TORCH_COMPILE_DISABLE=1 turns it off.
        maximize: climb instead. foreach, fused: hints without effect. capturable, differentiable: must be False.

    Raises:
        ValueError: an argument or group key out of its bounds, with the value, the bound and the cure.
    """


def signature(init: Any, defaults: Mapping[str, Any], takes_more: bool) -> inspect.Signature:
    """The signature of a class: the arguments of its own ``__init__``, then the shared ones by keyword, with their defaults.

    ``takes_more``: whether it hands further keyword arguments on.
    """
    own = _resolved(init)
    taken = {p.name for p in own}
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in get_type_hints(Projection).items()
        if name not in taken
    ]
    positional = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD and takes_more]
    return inspect.Signature([*positional, *shared, *rest])


def _resolved(init: Any) -> list[inspect.Parameter]:
    """The parameters of an ``__init__`` with types for annotations, where the source has strings; ``Unpack`` is for type checkers alone."""
    parameters = [p for p in inspect.signature(init).parameters.values() if p.name != "self"]
    strings = {p.name: p.annotation for p in parameters if p.annotation != p.empty and "Unpack" not in str(p.annotation)}
    hints = get_type_hints(SimpleNamespace(__annotations__=strings), globalns=init.__globals__)
    return [p.replace(annotation=hints.get(p.name, p.empty)) for p in parameters]
