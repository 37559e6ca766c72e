"""Optim: the public classes. Each is one row of the recipe table with its own arguments; the shared ones are `Projection`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from galore_torch.engine.recipe import RECIPES
from galore_torch.engine.whole_rules import rms_of
from galore_torch.optim.base import LowRankOptimizer
from galore_torch.optim.shared_arguments import Projection
from galore_torch.slots.projectors import PROJECTORS
from galore_torch.slots.rules import adafactor_lr
from galore_torch.slots.torch_rule import BaseRule

LAZY = "lazy"  # QGaLoreAdamW8bit's gap_range until a group says what its gap is
OF_BASE = ("maximize", "scale_parameter")  # shared arguments that GaLore(base) leaves to the class

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GaLoreAdamW(LowRankOptimizer):
    """AdamW in the low-rank subspace of each gradient (GaLore, arXiv 2403.03507, Alg. 2).

    Args:
        lr, betas, eps, weight_decay: as torch.optim.AdamW, but eps defaults to 1e-6 and is added to the root of the
            uncorrected second moment, as galore-torch 1.0 does; weight decay is decoupled and acts on the whole weight.
        correct_bias: whether moments are corrected for their start at zero.
        no_deprecation_warning: accepted for galore-torch 1.0; there is no warning.
    """

    row = RECIPES["galore_adamw"]

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        **projection: Unpack[Projection],
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, settings, projection)


class GaLoreAdamW8bit(GaLoreAdamW):
    """GaLoreAdamW with 8-bit moments and a bf16 basis; needs neither bitsandbytes nor CUDA.

    Args:
        lr, betas, eps, weight_decay: as GaLoreAdamW.
        amsgrad, percentile_clipping, block_wise, args: accepted at their defaults for galore-torch 1.0; refused at any other.
        optim_bits: 8, or 32 for fp32 moments.
        min_8bit_size: moments with fewer elements stay fp32.
        is_paged: True is accepted with a warning: state stays where the parameter is.
    """

    row = RECIPES["galore_adamw8bit"]
    fixed: ClassVar[dict[str, Any]] = {
        **GaLoreAdamW.fixed,
        "amsgrad": False,
        "percentile_clipping": 100,
        "block_wise": True,
        "args": None,
        "optim_bits": 8,  # in a group; as an argument 32 is state_codec="fp32"
    }

    def __init__(  # type: ignore[misc]  # min_8bit_size stands by name here too: the published arguments have an order
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int = 8,
        args: None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        **projection: Unpack[Projection],
    ):
        given = {"amsgrad": amsgrad, "percentile_clipping": percentile_clipping, "block_wise": block_wise, "args": args}
        self._check_fixed(given)
        if optim_bits not in (8, 32):
            raise ValueError(f"optim_bits={optim_bits!r} must be 8 or 32")
        if is_paged:
            warnings.warn("is_paged=True has no effect: GaLoreAdamW8bit keeps its state on the parameter's device", stacklevel=2)
        projection.setdefault("state_codec", "int8" if optim_bits == 8 else "fp32")
        projection.setdefault("min_8bit_size", min_8bit_size)
        super().__init__(params, lr, betas, eps, weight_decay, **projection)


class QGaLoreAdamW8bit(GaLoreAdamW8bit):
    """GaLoreAdamW8bit with an INT4 basis and lazy refreshes, for weights in INT8 (Q-GaLore, arXiv 2407.08296).

    ``quantize_linears(model)`` makes the weights INT8, before ``galore_param_groups``; others train in their own dtype. INT8 weights are
    rounded at random, right on average, and no floating copy of them is kept.

    Args:
        lr, betas, eps, weight_decay: as GaLoreAdamW.
        gap_range: "lazy" is (update_proj_gap, 8 * update_proj_gap), for each group its own; None for a gap that stays.
    """

    row = RECIPES["q_galore_adamw8bit"]

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        gap_range: tuple[int, int] | str | None = LAZY,
        **projection: Any,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, gap_range=gap_range, **projection)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group's own gap has a range of its own."""
        group = {**self.defaults, **param_group}
        if group["gap_range"] == LAZY:
            gap = group["update_proj_gap"]
            projector = PROJECTORS.get(group["projector"])
            blind = projector is not None and not projector.looks
            fixed = blind or not isinstance(gap, int)  # the check of the group says what is wrong with a gap or a projector
            param_group = {**param_group, "gap_range": None if fixed else (gap, 8 * gap)}
        super().add_param_group(param_group)


class TensorGaLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW on tensors of any order, real and complex, with a factor for each dimension (Tensor-GaLore, arXiv 2501.02379).

    ``TensorGaLoreAdamW(model.parameters(), rank=0.25)`` keeps moments of a quarter of a spectral weight's or a kernel's elements; matrices
    keep to the short side, vectors train at full rank. It is GaLoreAdamW with another default.

    Args:
        lr, betas, eps, weight_decay: as GaLoreAdamW.
        tensor: "auto", or True for a factor on both sides of matrices too.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        tensor: bool | str = "auto",
        **projection: Any,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, tensor=tensor, **projection)


class GaLoreAdafactor(LowRankOptimizer):
    """Adafactor in the low-rank subspace of each gradient.

    Args:
        lr: the step size; giving one turns ``relative_step`` and ``scale_parameter`` off unless they are asked for.
        eps: added to squared gradients; lower bound of the parameter's scale.
        clip_threshold: bound of the update's root mean square.
        decay_rate: exponent of the second moment's averaging time.
        beta1: decay of a first moment, or None for none.
        weight_decay: decoupled, on the whole weight.
        scale_parameter: multiply the step by the parameter's root mean square. Default: only without ``lr``.
        relative_step: a step size that falls with time, in place of ``lr``. Default: only without ``lr``.
        warmup_init: a relative step that starts small.
    """

    row = RECIPES["galore_adafactor"]

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **projection: Any,
    ):
        relative_step = lr is None if relative_step is None else relative_step
        if lr is not None and relative_step:
            raise ValueError(f"lr={lr} cannot be combined with relative_step=True: leave out one of them")
        if lr is None and not relative_step:
            raise ValueError("relative_step=False needs a step size: give lr (such as 1e-3)")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init=True needs relative_step=True: leave lr out, or warmup_init")
        settings = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, settings, cast("Projection", projection))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group's own lr means what the constructor's does."""
        lr = param_group.get("lr", self.defaults["lr"])
        if lr is not None and self.defaults["lr"] is None:
            if param_group.get("relative_step"):
                raise ValueError(f"lr={lr} cannot be combined with relative_step=True: leave out one of them")
            param_group = {**param_group, "relative_step": False}
        if param_group.get("scale_parameter", self.defaults["scale_parameter"]) is None:
            param_group = {**param_group, "scale_parameter": lr is None}
        super().add_param_group(param_group)

    @torch.no_grad()
    def _get_lr(self, group: dict[str, Any], state: dict[str, Any]) -> Any:
        """The step size at the parameter whose ``state`` this is; transformers' ``AdafactorSchedule`` reads it."""
        p = next(p for p in group["params"] if self.state[p] is state)
        return float(adafactor_lr(partial(rms_of, self.view_of(p)), group, max(1, state["step"])))


class GaLoreAdagrad(LowRankOptimizer):
    """Adagrad in the low-rank subspace of each gradient.

    Args:
        lr, lr_decay, initial_accumulator_value, eps: as torch.optim.Adagrad.
        weight_decay: decoupled, on the whole weight.
    """

    row = RECIPES["galore_adagrad"]

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **projection: Unpack[Projection],
    ):
        settings = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, settings, projection)


class GaLoreSGD(LowRankOptimizer):
    """SGD with momentum in the low-rank subspace of each gradient.

    Args:
        lr, momentum, dampening, nesterov: as torch.optim.SGD.
        weight_decay: decoupled, on the whole weight (without momentum the same as torch.optim.SGD's).
    """

    row = RECIPES["galore_sgd"]

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **projection: Unpack[Projection],
    ):
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, settings, projection)


class GaLoreMuon(LowRankOptimizer):
    """Muon on the matrices of groups with a rank, AdamW on all other parameters.

    The momentum M lives in a subspace P that follows it, and one orthogonalisation sees it and the gradient outside of the subspace:
    A = G + momentum P M; P <- orth(A A^T P); M <- P^T A;
    W <- W - lr scale sqrt(max(m, n)) NS5(P (momentum M + P^T G) + (G - P P^T G)).
    With rank="full" nothing is projected: M <- G + momentum M; W <- W - lr scale sqrt(max(m, n)) NS5(G + momentum M), which is Muon (Jordan
    et al., 2024, kellerjordan.github.io/posts/muon) with the step of Liu et al. (arXiv 2502.16982, eq. 4). NS5 are five steps of
    Newton-Schulz in fp64 for fp64 weights, else in bf16, or in fp32 where the device has no fast bf16 products.

    Take `galore_param_groups(model, rank)` for the groups: embeddings, head and vectors then train by AdamW at the same lr. Matrices that a
    rank does not shorten train as with rank="full". Moments are 8-bit unless ``state_codec`` says otherwise.

    Args:
        lr: of both rules; the factor sqrt(max(m, n)) gives an orthogonalised step the size of AdamW's.
        momentum: how much of M stays from step to step, in [0, 1).
        betas, eps, weight_decay, correct_bias: as GaLoreAdamW, of the other parameters; the decay is of all.
    """

    row = RECIPES["galore_muon"]

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        **projection: Unpack[Projection],
    ):
        settings = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, settings, projection)
        matrices = [p for group in self.param_groups for p in group["params"] if p.dim() > 1]
        if len(matrices) > 1 and all(group["rank"] is None for group in self.param_groups):
            warnings.warn(
                f"no group has a rank, so all {len(matrices)} matrices train by AdamW: give galore_param_groups(model, rank=128), or "
                "rank='full' for Muon without a projection",
                stacklevel=2,
            )


class GaLore(LowRankOptimizer):
    """Any torch.optim class in the low-rank subspace: ``GaLore(torch.optim.RMSprop, groups, lr=1e-3, alpha=0.9)``.

    The class runs on the coordinates x = basis^T W of each projected weight, whose gradient is basis^T G; the weight moves by
    scale * basis (change of x). Unprojected parameters are stepped by the class itself. The weight decay of classes that
    decouple it (AdamW, or decoupled_weight_decay=True) acts on the whole weight; that of the others is part of the gradient.

    Args:
        base: a torch.optim.Optimizer class that steps without a closure and keeps its state in tensors.
        kwargs: its own arguments, and the projection's.
    """

    row = RECIPES["galore"]

    def __init__(self, base: type[torch.optim.Optimizer], params: Any, **kwargs: Any):
        if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)):
            raise ValueError(f"base={base!r} is not a torch.optim.Optimizer class: pass the class, such as torch.optim.RMSprop")
        projection: Any = {key: kwargs.pop(key) for key in tuple(kwargs) if key in Projection.__annotations__}
        for key in (*OF_BASE, "foreach", "fused"):  # the base class has its own
            if key in projection:
                kwargs[key] = projection.pop(key)
        # These mean in a base class what they mean here.
        shared = {*OF_BASE, "foreach", "fused", "capturable", "differentiable"}
        rule = BaseRule(base, kwargs, Projection.__annotations__.keys() - shared)
        super().__init__(params, {"weight_decay": 0.0, **rule.defaults}, projection, rule)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        assert isinstance(self.rule, BaseRule)
        for key in OF_BASE:
            if group[key] and key not in self.rule.defaults:
                raise ValueError(
                    f"{key}={group[key]!r} is no argument of base={self.rule.base.__name__}: leave it out, or use a class with it"
                )
        super()._check_group(group)
