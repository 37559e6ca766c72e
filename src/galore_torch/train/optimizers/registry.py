"""Optimizers by name: which flags each one can use, and how it is built.

The table is plain data, so the command line can read it without importing torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from galore_torch.optim.methods import METHODS
from galore_torch.train.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from galore_torch import FusedBackward

_CODECS = ("state_codec", "basis_codec")
METHOD_FLAGS = frozenset({"carry_codec", "random_after"})  # of some methods
MATRIX_FLAGS = frozenset({"targets", "scale_parameter"})  # of all that have a group of the matrices
LOW_RANK_FLAGS = MATRIX_FLAGS | {"rank", "update_proj_gap", "gap_range", "galore_scale", "proj_type", "gradients", *_CODECS}
USUAL_RMS = 0.02  # of weights at the start of a training, as transformers' models have it
COMMON_FLAGS = frozenset({"weight_decay", "beta1"})
ADAM_FLAGS = COMMON_FLAGS | {"beta2_half_life"}
GRADIENTS = ("direct", "project", "full")  # how the matrices' gradients reach a low-rank optimizer


Settings = tuple[tuple[str, Any], ...]  # pairs of name and value


@dataclass(frozen=True)
class OptimizerSpec:
    """One row: `class_name` is looked up in `home`, a module; in one of this package's own it is a function of the model."""

    class_name: str
    home: str
    default_lr: float  # for a start; AdamW's and GaLoreAdamW's are from small sweeps on `demo`
    flags: frozenset[str] = COMMON_FLAGS
    per_layer: bool = False
    extra: tuple[tuple[str, Any], ...] = ()  # further arguments
    keys: tuple[tuple[str, Any], ...] = ()  # of the group of the matrices
    rank: str | int | None = None  # the one that its matrices have where --rank is not given
    gap: int = 50  # where --update_proj_gap is not given, and --galore_scale
    scale: float = 0.25
    usual: bool = False  # whether a command may have another gap and scale for it: they are no paper's
    adaptive: bool = True  # whether its step has the size of Adam's, so that Adam's rates suit it

    @property
    def low_rank(self) -> bool:
        """Whether gradients of the layers' matrices are projected."""
        return self.home == "galore_torch" and "rank" in self.flags

    @property
    def low_rank_gradients(self) -> bool:
        """Whether low-rank gradients are all it needs of the layers' matrices."""
        return "gradients" in self.flags

    @property
    def has_matrices(self) -> bool:
        """Whether the layers' matrices have a group of their own, projected or not."""
        return self.home == "galore_torch" and "targets" in self.flags

    @property
    def quantized(self) -> bool:
        """Whether the layers' matrices are held as INT8."""
        return self.class_name == "QGaLoreAdamW8bit"

    @property
    def why_not_sharded(self) -> str:
        """Why it cannot train a model that `fully_shard` has cut, and the cure; "" where it can."""
        if self.quantized:
            return "weights held as INT8 are not cut; choose galore_adamw8bit"
        if self.home == _BASELINES:
            return "it exchanges layers of the model, which are cut before there is an optimizer; choose adamw, or --parallel ddp"
        if self.home == "transformers.optimization":
            return "transformers' class takes whole weights alone; choose galore_adafactor, or --parallel ddp"
        return ""


def _galore(class_name: str, lr: float, flags: frozenset[str] = COMMON_FLAGS, adaptive: bool = True) -> OptimizerSpec:
    return OptimizerSpec(class_name, "galore_torch", lr, flags | LOW_RANK_FLAGS, usual=True, adaptive=adaptive)


def _method(name: str) -> OptimizerSpec:
    """A method of `METHODS`. A flag that has no effect on it is none of its flags."""
    method = METHODS[name]
    keys = dict(method.settings)
    gap, scale = keys.pop("update_proj_gap", None), keys.pop("scale")
    flags = ADAM_FLAGS | LOW_RANK_FLAGS
    if "recovery" in keys or "carry" in keys:  # it reads whole gradients, so it has no choice of them
        flags -= {"gradients"}
    if keys.get("projector") in ("gaussian", "rows", "block_mean"):
        flags -= {"basis_codec", "gap_range", *(["proj_type"] if keys["projector"] == "rows" else [])}
    flags |= {"carry_codec"} if "carry" in keys else set()
    flags |= {method.needs} if method.needs else set()
    flags -= {"gap_range"} if method.needs == "random_after" else set()
    if gap is None:
        flags -= {"update_proj_gap"}
    return OptimizerSpec(
        method.class_name, "galore_torch", method.lr, flags, keys=tuple(keys.items()), rank=method.rank, gap=gap or 50, scale=scale
    )


_ADAFACTOR = (("scale_parameter", False), ("relative_step", False), ("warmup_init", False))  # the published choice: a plain lr
_BASELINES = "galore_torch.train.model.baselines"
_FUSED = (("fused", True),)  # one pass and no copy of a moment; torch's default on a CPU takes several times as long

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adam": OptimizerSpec("Adam", "torch.optim", 3e-3, ADAM_FLAGS, extra=_FUSED),
    "adamw": OptimizerSpec("AdamW", "torch.optim", 3e-3, ADAM_FLAGS, extra=_FUSED),
    "sgd": OptimizerSpec("SGD", "torch.optim", 0.3, adaptive=False),
    "adafactor": OptimizerSpec("Adafactor", "transformers.optimization", 3e-3, extra=_ADAFACTOR),
    "adagrad": OptimizerSpec("Adagrad", "torch.optim", 1e-2, frozenset({"weight_decay"}), adaptive=False),
    # Without a rank GaLoreAdamW8bit is plain AdamW with 8-bit moments: no bitsandbytes, any device, decoupled weight decay.
    "adam8bit": OptimizerSpec("GaLoreAdamW8bit", "galore_torch", 3e-3, ADAM_FLAGS, extra=(("eps", 1e-8),)),
    # The first moments of Muon's matrices are a momentum of its own, and its AdamW's are not worth a flag.
    "muon": OptimizerSpec(
        "GaLoreMuon", "galore_torch", 3e-3, MATRIX_FLAGS | {"weight_decay", "state_codec"}, rank="full", gap=1, scale=0.2
    ),
    "galore_adamw": _galore("GaLoreAdamW", 1e-2, ADAM_FLAGS),
    "galore_adamw8bit": _galore("GaLoreAdamW8bit", 1e-2, ADAM_FLAGS),
    "qgalore_adamw8bit": _galore("QGaLoreAdamW8bit", 1e-2, ADAM_FLAGS),  # its layers' weights are INT8
    "galore_adafactor": _galore("GaLoreAdafactor", 1e-2),
    "galore_adagrad": _galore("GaLoreAdagrad", 1e-2, frozenset({"weight_decay"}), adaptive=False),
    "galore_sgd": _galore("GaLoreSGD", 0.3, adaptive=False),
    # It reads whole gradients, so it has no choice of them.
    "galore_muon": OptimizerSpec(
        "GaLoreMuon", "galore_torch", 3e-3, frozenset({"weight_decay"}) | LOW_RANK_FLAGS - {"gradients"}, gap=1, scale=0.2
    ),
    **{name: _method(name) for name in METHODS},
    # The paper's baselines: they change the layers, not the optimizer, which is torch's AdamW.
    "low_rank": OptimizerSpec("low_rank", _BASELINES, 3e-3, ADAM_FLAGS | {"rank"}, extra=_FUSED, adaptive=False),
    "lora": OptimizerSpec("lora", _BASELINES, 3e-3, ADAM_FLAGS | {"rank"}, extra=_FUSED),
    "relora": OptimizerSpec("relora", _BASELINES, 3e-3, ADAM_FLAGS | {"rank"}, extra=_FUSED, adaptive=False),
}
# Full-rank AdamW and Adafactor inside the backward pass, as in the paper's table 11: this package's classes without a rank.
_PER_LAYER = {
    "adamw": OptimizerSpec("GaLoreAdamW", "galore_torch", 3e-3, ADAM_FLAGS, extra=(("eps", 1e-8),)),
    "adafactor": OptimizerSpec("GaLoreAdafactor", "galore_torch", 3e-3, extra=_ADAFACTOR),
}
# Every one of this package's optimizers can step a layer inside the backward pass.
OPTIMIZERS |= {
    f"{name}_per_layer": replace(row, per_layer=True) for name, row in (OPTIMIZERS | _PER_LAYER).items() if row.home == "galore_torch"
}


def optimizer_spec(name: str) -> OptimizerSpec:
    """The row for `name` in any case; UserError lists the names otherwise."""
    try:
        return OPTIMIZERS[name.lower()]
    except KeyError:
        raise UserError(
            f"optimizer {name!r} is not known; {did_you_mean(name, OPTIMIZERS)}choose one of: {', '.join(OPTIMIZERS)}"
        ) from None


def check_shardable(name: str, parallel: str) -> None:
    """UserError where the optimizer `name` cannot train a model that `fully_shard` has cut."""
    if why := optimizer_spec(name).why_not_sharded:
        raise UserError(f"{name} does not train under --parallel {parallel}: {why}")


def unused_flags(name: str, given: Iterable[str]) -> list[str]:
    """Those of the `given` flags that the optimizer `name` cannot use, sorted."""
    owned = LOW_RANK_FLAGS | METHOD_FLAGS | ADAM_FLAGS
    return sorted((set(given) & owned) - optimizer_spec(name).flags)


def build_optimizer(name: str, model: nn.Module, *, lr: float, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build the optimizer `name` for every trainable parameter of `model`, whose layers a baseline or Q-GaLore changes first.

    `settings` holds rank, update_proj_gap, gap_range, galore_scale, proj_type, targets, weight_decay, beta1, state_codec, basis_codec
    (gap, scale, beta1 and codecs None: the optimizer's own), cycle_length, and where they are wished beta2, carry_codec, random_after,
    usual (`own_settings`) and rank_is_given, without which a method with a rank of its own has that. A ValueError of the optimizer
    becomes a UserError: its text is for users.
    """
    import importlib

    spec = optimizer_spec(name)
    kwargs: dict[str, Any] = {"lr": lr, "weight_decay": settings["weight_decay"], **dict(spec.extra)}
    if "beta1" in spec.flags:
        kwargs |= _beta1_argument(spec.class_name, settings)
    # Of every parameter, projected or not.
    kwargs |= {name: codec for name in _CODECS if name in spec.flags and (codec := settings.get(name)) is not None}
    try:
        make = getattr(importlib.import_module(spec.home), spec.class_name)
        if spec.home.startswith("galore_torch.train."):
            optimizer: torch.optim.Optimizer = make(model, settings, **kwargs)
        else:
            optimizer = make(_parameters(spec, model, settings), **kwargs)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return optimizer


def _parameters(spec: OptimizerSpec, model: nn.Module, settings: Mapping[str, Any]) -> Any:
    if not spec.has_matrices:
        return [p for p in model.parameters() if p.requires_grad]
    from galore_torch import galore_param_groups, quantize_linears

    targets = as_targets(settings.get("targets"))
    settings = settled_settings(spec, settings)
    if not spec.low_rank:
        assert spec.rank is not None
        return galore_param_groups(model, spec.rank, targets=targets, scale=spec.scale, **group_keys(spec, settings))
    if spec.quantized:
        if getattr(getattr(model, "config", None), "rescale_every", 0) > 0:  # RWKV
            raise UserError(
                "INT8 weights cannot be divided in place, as this model does to its layers before each evaluation: "
                'set "rescale_every": 0 in its config.json, or choose another optimizer'
            )
        quantize_linears(model, targets=targets)
    own = {} if spec.quantized and settings["gap_range"] is None else {"gap_range": settings["gap_range"]}  # Q-GaLore adapts its gap
    own |= group_keys(spec, settings)
    return galore_param_groups(
        model,
        settings["rank"],
        targets=targets,
        update_proj_gap=settings["update_proj_gap"] if "update_proj_gap" in spec.flags else None,
        scale=settings["galore_scale"],
        proj_type=settings["proj_type"],
        **own,
    )


def group_keys(spec: OptimizerSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the group of the matrices has beside the settings of GaLore: the method's keys, with the flags that are given over them."""
    keys = dict(spec.keys)
    if "betas" in keys:
        keys |= _betas(keys["betas"], settings)
    keys |= {name: settings[name] for name in METHOD_FLAGS & spec.flags if settings.get(name) is not None}
    if "scale_parameter" in spec.flags and settings.get("scale_parameter"):
        keys["scale_parameter"] = True
    return keys


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of all groups; where it is relative to the weights, for those of `USUAL_RMS` the same."""
    for group in optimizer.param_groups:
        group["lr"] = lr / USUAL_RMS if group.get("scale_parameter") else lr


def as_targets(given: tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """The words after --targets as `galore_param_groups` takes them: "all-linear" is a word, not a pattern."""
    return given[0] if given is not None and len(given) == 1 else given


def _beta1_argument(class_name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    beta1 = settings["beta1"]
    if "SGD" in class_name:
        return {} if beta1 is None else {"momentum": beta1}
    if "Adafactor" in class_name:
        return {} if beta1 is None else {"beta1": beta1 or None}  # 0 is no first moment, which is also no memory for one
    return _betas((0.9, 0.999), settings)


def _betas(own: tuple[float, float], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Adam's two, where one of them is given."""
    given = settings["beta1"], settings.get("beta2")
    return {} if given == (None, None) else {"betas": tuple(mine if beta is None else beta for mine, beta in zip(own, given, strict=True))}


def own_settings(name: str, dtype: str, usual: Settings) -> dict[str, Any]:
    """What the optimizer `name` takes for weights of `dtype` where beta1, codecs, gap and scale are not given. beta1 0 is none.

    `usual`: the command's own gap and scale, of the optimizers whose own are no paper's.
    """
    import importlib
    import inspect

    spec = optimizer_spec(name)
    own: dict[str, Any] = {"beta1": 0.9}  # of torch's AdamW, which trains the baselines
    if not spec.home.startswith("galore_torch.train."):
        made = getattr(importlib.import_module(spec.home), spec.class_name)
        defaults = {key: parameter.default for key, parameter in inspect.signature(made).parameters.items()}
        defaults |= dict(spec.keys)
        own["beta1"] = defaults.get("betas", (defaults.get("momentum", defaults.get("beta1")),))[0] or 0.0
        own |= {codec: getattr(made.row, codec) for codec in _CODECS if codec in spec.flags}
        if own.get("basis_codec") == "weight":
            own["basis_codec"] = "bf16" if dtype == "bfloat16" else "fp32"
    return own | _gap_and_scale(spec, usual)


def settled_settings(spec: OptimizerSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the gap and the scale in use where they are None."""
    own = _gap_and_scale(spec, settings.get("usual", ()))
    settled = {**settings, **{key: value for key, value in own.items() if settings.get(key) is None}}
    if spec.low_rank and spec.rank is not None and not settings.get("rank_is_given"):
        settled["rank"] = spec.rank
    return settled


def _gap_and_scale(spec: OptimizerSpec, usual: Settings) -> dict[str, Any]:
    return {"update_proj_gap": spec.gap, "galore_scale": spec.scale} | (dict(usual) if spec.usual else {})


def settled_gradients(name: str, gradients: str | None, sharded: bool = False) -> str:
    """One of GRADIENTS for the optimizer `name`, where --gradients says `gradients`; `sharded`: `fully_shard` has cut the model.

    A cut weight has parts of gradients, whole rows, which are kept until the step unless the settings or the optimizer say otherwise.
    """
    spec = optimizer_spec(name)
    if not spec.low_rank_gradients:
        return "full"
    if sharded:
        return gradients or ("project" if spec.per_layer else "full")
    return gradients or "direct"


def backward_mode(name: str, gradients: str, *, deferred: bool) -> str | None:
    """The mode of `fused_backward` for settled `gradients`; None: an ordinary backward pass.

    `deferred` (accumulation or clipping is on): the backward pass keeps a low-rank gradient and `step()` applies it. Otherwise those
    named `_per_layer` update each weight inside the backward pass.
    """
    if not optimizer_spec(name).per_layer:
        return None if gradients == "full" else gradients
    if deferred and not optimizer_spec(name).low_rank_gradients:
        return None  # nothing low-rank could be kept of them
    if deferred:
        return "direct" if gradients == "direct" else "project"
    return "direct_update" if gradients == "direct" else "update"


def fused_pass(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, deferred: bool, gradients: str | None = None
) -> contextlib.AbstractContextManager[FusedBackward | None]:
    """Attach the optimizer to the model's backward pass in the mode of `backward_mode`, where there is one; leaving it detaches."""
    mode = backward_mode(name, settled_gradients(name, gradients), deferred=deferred)
    if mode is None:
        return contextlib.nullcontext()
    from galore_torch import fused_backward

    low_rank: Any = optimizer  # the table says so, the checker cannot know
    try:
        return fused_backward(model, low_rank, mode)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of memory that the optimizer's state holds in this process: each storage once, whole, views or not.

    Also of tensors in an object, such as the projector of galore-torch 1.0.
    """
    import torch

    storages: dict[tuple[str, int], int] = {}
    objects: set[int] = set()

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            for part in stored_parts(value):
                storage = part.untyped_storage()
                storages[(str(part.device), storage.data_ptr())] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and id(value) not in objects:
            objects.add(id(value))
            visit(vars(value))

    visit(optimizer.state)
    return sum(storages.values())


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors of this process that hold its memory: a weight in INT8, or one cut between processes, has no storage of its own."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    from galore_torch.engine.sharding import local

    own: Any = local(tensor)
    return [getattr(own, name) for name in own.__tensor_flatten__()[0]] if is_traceable_wrapper_subclass(own) else [own]


def adamw_state_bytes(model: nn.Module) -> int:
    """Measured bytes of torch.optim.AdamW's state for what this process holds of `model`.

    One parameter at a time: a zero stand-in takes one real step, its state is measured and freed,
    so the comparison never needs more memory than the largest parameter.
    """
    import torch

    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            stand_in = torch.zeros_like(parameter, requires_grad=True)
            stand_in.grad = torch.zeros_like(parameter)
            adamw = torch.optim.AdamW([stand_in], lr=0.0)
            adamw.step()
            total += state_bytes(adamw)
    return total
