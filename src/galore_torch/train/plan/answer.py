"""From a checked config to a plan: the request, its phases, and their peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.llama import ModelShape, build_model, model_shape
from galore_torch.train.optimizers.registry import as_targets, check_shardable, optimizer_spec, settled_gradients, settled_settings
from galore_torch.train.plan.analytic import Phase, PlanRequest, phases

# What is no tensor, for a GPU: the CUDA context and cuBLAS's workspaces, and what the allocator cannot use between its blocks.
# An assumption from common practice, not measured by this project. On a CPU the process has its libraries.
RESERVE = {"cuda": (700 * 10**6, 0.03), "cpu": (500 * 10**6, 0.02)}


@dataclass(frozen=True)
class Plan:
    """Bytes: what lasts, the phases of the step in which most is held, and the reserve.

    ``ordinary``: the most bytes of tensors in a step that makes few bases, where that is another step.
    """

    request: PlanRequest
    weights: int
    basis: int
    moments: int
    phases: tuple[Phase, ...]
    traced: bool
    untraced: str = ""  # why a trace that was asked for is missing
    ordinary: int | None = None

    @property
    def at_peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """The most bytes of tensors at once."""
        return self.weights + self.basis + self.moments + self.at_peak.total

    @property
    def reserve(self) -> int:
        constant, share = RESERVE[self.request.device]
        return constant + round(share * self.peak)

    @property
    def needed(self) -> int:
        return self.peak + self.reserve

    @property
    def on_disk(self) -> int:
        """Bytes of one checkpoint: weights, floating ones beside INT8 ones, and the optimizer's state."""
        request = self.request
        decoded = sum(part.elements for part in request.sizes.parts if part.quantizable) * request.itemsize
        return self.weights + self.basis + self.moments + (decoded if optimizer_spec(request.optimizer).quantized else 0)

    @property
    def on_host(self) -> int:
        """Bytes that a GPU's run needs in the host's memory: its weights are made there, and a checkpoint's state passes through it."""
        constant, share = RESERVE["cpu"]
        most = max(self.request.sizes.parameters * self.request.itemsize, self.basis + self.moments)
        return constant + round((1 + share) * most)

    def update_flops(self) -> float:
        """Operations of one step: forward and backward passes, a recomputed forward pass counted; not the optimizer's."""
        request = self.request
        tokens = request.tokens * request.accumulation
        return request.sizes.flops_per_token(request.length) * tokens * (4 / 3 if request.checkpointing else 1)

    def largest(self, field: str) -> int:
        """The most that a field of Phase reaches in any phase."""
        return max(getattr(phase, field) for phase in self.phases)


def plan_request(
    config: PretrainConfig, *, device: str, optimizer: str | None = None, vocab_size: int | None = None, shards: int | None = None
) -> PlanRequest:
    """The memory side of a config, for its first optimizer or for another.

    ``shards``: how many processes share every parameter, as under `fully_shard`; None: as many as those of the config. UserError for an
    optimizer that cannot train so.
    """
    from galore_torch.train.model.loss import settled_chunk

    name = (optimizer or config.contenders[0][0]).lower()
    targets = as_targets(config.targets) if optimizer_spec(name).has_matrices else None
    sizes = config.sizes(targets, vocab_size)
    shards = config.shards if shards is None else shards
    if shards > 1:
        check_shardable(name, "fsdp")
    _check_codecs(name, config)
    return PlanRequest(
        sizes=sizes,
        optimizer=name,
        dtype=config.torch_dtype,
        length=config.max_length,
        batch=config.batch_size,
        accumulation=config.accumulation,
        deferred=config.deferred,
        checkpointing=config.activation_checkpointing,
        chunk=settled_chunk(config.loss_chunk, sizes.vocabulary, config.tokens_at_once),
        device=device,
        settings=settled_settings(optimizer_spec(name), config.optimizer_settings),
        model=config.hf_model or config.model_config,
        pretrained=config.hf_model is not None,
        targets=targets,
        gradients=settled_gradients(name, config.gradients, config.sharded or shards > 1),
        shards=shards,
    )


def _check_codecs(name: str, config: PretrainConfig) -> None:
    """Refuse a codec that the optimizer's rule cannot have, as the optimizer does when it is built."""
    spec = optimizer_spec(name)
    given = {key: codec for key in ("state_codec", "basis_codec") if key in spec.flags and (codec := getattr(config, key)) is not None}
    if given:
        import galore_torch

        try:
            replace(getattr(galore_torch, spec.class_name).row, **given)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


def planned(request: PlanRequest, *, traced: bool) -> Plan:
    """The plan by formulas, or with the model's passes traced where this torch and the model let them.

    Of the first step, which makes every basis; or where linear layers keep their inputs projected after it, and those are larger than the
    inputs that they share, of a step after that.
    """
    if not request.direct:
        return _planned(request, traced)
    first, ordinary = (_planned(each, False) for each in (request, replace(request, refreshing=False)))
    worst = max(first, ordinary, key=lambda plan: plan.peak)
    return replace(_planned(worst.request, traced), ordinary=None if worst is ordinary else ordinary.peak)


def _planned(request: PlanRequest, traced: bool) -> Plan:
    found, untraced = _traced(request) if traced and request.shards == 1 else (None, "")
    weights, basis, moments = (request.total(each) for each in ("weight", "basis", "moments"))
    return Plan(request, weights, basis, moments, found or tuple(phases(request)), found is not None, untraced)


def _traced(request: PlanRequest) -> tuple[tuple[Phase, ...] | None, str]:
    """The phases by a trace; or None, and why there is none."""
    from galore_torch.train.plan.traced import can_trace, traced_phases

    if not can_trace():
        return None, "this torch has no MemTracker"
    if request.sizes.recurrent:  # and take minutes, token by token
        return None, f"the reference code of {request.model}'s recurrent layers does not hold what their kernels hold"
    if request.mode and request.targets is not None:
        return None, "--targets can choose other matrices from layer to layer"
    try:
        return tuple(traced_phases(request, _builder(request))), ""
    except UserError:
        raise
    except Exception as error:  # a model's own code, on two layers and on tensors without values
        return None, f"the passes of {request.model} cannot be traced, {first_line(error)}"


def planned_peak_bytes(config: PretrainConfig, vocab_size: int, name: str) -> int | None:
    """The most bytes of tensors that a run of `config` with the optimizer `name` holds at once, by formulas, within milliseconds.

    None for a model whose layers the formulas do not know, or that cannot be planned. A process holds its libraries beside them.
    """
    from galore_torch.train.device import pick_device

    try:
        request = plan_request(config, device=pick_device(config.device), optimizer=name, vocab_size=vocab_size)
        return planned(request, traced=False).peak if request.sizes.like_llama else None
    except UserError:
        return None


def _builder(request: PlanRequest) -> Callable[[int], Any]:
    """layers -> the model without memory, changed where a baseline changes it."""
    import torch

    from galore_torch.train.optimizers.registry import build_optimizer
    from galore_torch.train.plan.methods import FACTORED

    def build(layers: int) -> Any:
        with torch.device("meta"):
            model = _hf_model(request, layers) if request.pretrained else _llama_model(request, layers)
        if request.optimizer in FACTORED:
            build_optimizer(request.optimizer, model, lr=1e-3, settings=request.settings)
        return model.train()

    return build


def _llama_model(request: PlanRequest, layers: int) -> Any:
    shape: ModelShape = replace(model_shape(request.model), num_hidden_layers=layers, vocab_size=request.sizes.vocabulary)
    return build_model(
        shape,
        seed=0,
        dtype=request.dtype,
        bos_token_id=None,
        eos_token_id=None,
        activation_checkpointing=request.checkpointing,
    )


def _hf_model(request: PlanRequest, layers: int) -> Any:
    from galore_torch.train.model.pretrained import load_model

    return load_model(request.model, dtype=request.dtype, activation_checkpointing=request.checkpointing, layers=layers)
