"""Optim: the torch.optim.Optimizer that every public class is a row of. Groups, step and an exact state_dict; no arithmetic."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor

from galore_torch.engine import step as engine
from galore_torch.engine.checks import check_group, plain_numbers, unread_keys
from galore_torch.engine.layout import AnyRule, ParamView
from galore_torch.engine.recipe import PROJECTION_DEFAULTS, Recipe, check_kept
from galore_torch.engine.sharding import local, local_grad
from galore_torch.engine.shared_gradient import SharedGradient
from galore_torch.engine.stored import state_spec
from galore_torch.engine.whole_rules import check_shared
from galore_torch.ops.outer import OuterProduct
from galore_torch.ops.write import is_plain
from galore_torch.optim.left_behind import left_behind, refuse_flattened
from galore_torch.optim.low_rank_grad import ConsumedGrad, LowRankGrad, dtype_of_grad, in_place_of, owner_of
from galore_torch.optim.param_groups import PLACE
from galore_torch.optim.parameter_checks import check_compiler, check_parameter, notes
from galore_torch.optim.quantize import refuse_replaced
from galore_torch.optim.shared_arguments import SHARED, Projection, signature
from galore_torch.optim.state import seal, unseal, whole_state
from galore_torch.slots.rules import RULES


def callers_level() -> int:
    """The stacklevel of a warning that is to point at the first frame outside this package and torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("galore_torch", "torch"):
        frame, level = frame.f_back, level + 1
    return max(level, 1)


def without_autocast(params: Iterable[Tensor]) -> AbstractContextManager[object]:
    """Arithmetic is fp32 inside, whatever precision the caller's ``torch.autocast`` asks of the model."""
    kinds = {p.device.type for p in params}
    kinds = {kind for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)}
    if not kinds:
        return nullcontext()
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


_NEW: weakref.WeakSet[LowRankOptimizer] = weakref.WeakSet()  # optimizers of one parameter, made since the last step of any
FEW = 8


class LowRankOptimizer(torch.optim.Optimizer):
    """Any inner optimizer in the low-rank subspace of each gradient (GaLore, arXiv 2403.03507, Alg. 1 and 2).

    A parameter with at least two dimensions in a group with ``rank`` is projected; all others take the same rule at full
    rank. State is made at construction, or when a frozen parameter meets its first gradient. See the zoo for the classes.
    """

    row: ClassVar[Recipe]
    fixed: ClassVar[dict[str, Any]] = {"capturable": False, "differentiable": False}  # settings with one value only
    _has_stepped = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the shared arguments in ``help`` and in ``inspect.signature``, which frameworks filter keyword arguments by."""
        super().__init_subclass__(**kwargs)
        cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n" + SHARED
        defaults = {**PROJECTION_DEFAULTS, **cls.row.group_keys()}
        cls.__signature__ = signature(cls.__init__, defaults, cls.row.rule == "torch")  # type: ignore[attr-defined]

    def __init__(self, params: Any, settings: dict[str, Any], projection: Projection, rule: AnyRule | None = None):
        self.of_ranked_groups: dict[str, Any] = {}  # beside the defaults, settings of groups with a rank that are added later
        self.attachments: list[Any] = []  # of `fused_backward`, which alone adds and removes them
        self.rule: AnyRule = RULES[self.row.rule] if rule is None else rule
        if unknown := projection.keys() - Projection.__annotations__.keys():
            raise TypeError(
                f"{type(self).__name__} got unexpected arguments {sorted(unknown)}; "
                f"beside its own it takes {sorted(Projection.__annotations__)}"
            )
        super().__init__(params, {**PROJECTION_DEFAULTS, **self.row.group_keys(), **settings, **projection})
        self._take_turns()

    def _take_turns(self) -> None:
        """Number the parameters: that decides on which step of the gap each refreshes.

        Those of `galore_param_groups` have their model's numbers, in whatever optimizer they land: ZeroRedundancyOptimizer gives each
        process an optimizer of some. Layer-wise frameworks make one optimizer a parameter, each of which would be the first. So those that
        are made one after the other, before any of them steps, are numbered through, but for the first few: those are compared, and have
        one schedule.
        """
        first = len(_NEW) if len(self._present) == 1 and len(_NEW) >= FEW else 0
        for p, place in self._places.items():
            if p in self.state:
                self.state[p]["index"] = getattr(p, PLACE, first + place)
        if len(self._present) == 1:
            _NEW.add(self)

    # --- groups ---------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it; nothing changes when it is refused."""
        own = self.of_ranked_groups if param_group.get("rank", self.defaults["rank"]) is not None else {}
        group = {**self.defaults, **own, **param_group}  # the caller's own dict stays as it is: it may serve another optimizer
        plain_numbers(group)
        if group.get("dim", 2) != 2 and "tensor" not in param_group:  # as galore-torch 1.0 asked for its tensor projector
            group["tensor"] = True
        self._check_group(group)
        unread = unread_keys(param_group, {*self.defaults, *self.fixed, "params", "param_names", "dim"})
        if unread:
            warnings.warn(
                f"{type(self).__name__} does not read the group keys {unread}: they have no effect. Leave them out, or choose among "
                f"{sorted(self.defaults)}",
                stacklevel=callers_level(),
            )
        super().add_param_group(group)
        try:
            for p in group["params"]:
                check_parameter(p, group, self.row, type(self).__name__)
            self._adopt()
        except BaseException:
            self.param_groups.pop()
            self._adopt()
            raise

    def _check_fixed(self, settings: Mapping[str, Any]) -> None:
        for key, only in self.fixed.items():
            if settings.get(key, only) != only:
                raise ValueError(f"{key}={settings[key]!r} is not supported by {type(self).__name__}; leave it {only!r}")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check_fixed(group)
        check_group(group, self.row)

    # --- the step -------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch._disable_dynamo  # as torch's own: a caller's torch.compile would trace every step anew, for its layout is Python
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient. ``closure`` re-evaluates the model and returns the loss."""
        _NEW.clear()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            plain_numbers(group)
            self._check_group(group)
            refuse_replaced(group["params"])
        for attachment in self.attachments:
            attachment.check()
        if not (self._has_stepped or self.attachments) and (said := left_behind(p for group in self.param_groups for p in group["params"])):
            warnings.warn(said, stacklevel=callers_level())
        self._has_stepped = True
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        alike: dict[Any, Any] = {}
        views = [self._check(p, group, alike) for p, group in pairs]  # every complaint comes before the first change
        with without_autocast(p for p, _ in pairs):
            for (p, _), view in zip(pairs, views, strict=True):
                if isinstance(local(p.grad), ConsumedGrad):
                    p.grad = None  # updated inside the backward pass: the mark has served
                else:
                    self._update(view, p.grad)
        return loss

    def _update(self, view: ParamView, grad: Tensor | None) -> None:
        assert grad is not None
        if isinstance(held := local(grad), LowRankGrad):
            engine.apply(view, held.low)
        else:
            engine.step(view, local_grad(grad, view.place))

    @torch.no_grad()
    def compress_gradient(self, p: Tensor, group: dict[str, Any]) -> None:
        """Replace ``p.grad`` by its projection, which accumulates further gradients of the same step."""
        view, grad = self._check(p, group), p.grad
        if view.layout.ranks and grad is not None and not isinstance(local(grad), LowRankGrad):
            check_kept(group)
            with without_autocast([p]):
                low = engine.compress(view, local_grad(grad, view.place))
            p.grad = in_place_of(view, self._low_rank_grad(p, low))

    @torch.no_grad()
    def add_low_rank(self, p: Tensor, low: Tensor | None, factors: OuterProduct | SharedGradient | None) -> None:
        """Add to ``p.grad`` what a backward pass has made without the gradient: R, and the factors of a part whose basis is due.

        The part may be shared with other processes, which then find its basis together.
        """
        group = self.group_of(p)
        view = self._check(p, group)
        if isinstance(held := local(p.grad), ConsumedGrad):
            held.refuse()
        if held is not None and not isinstance(held, LowRankGrad):
            self.compress_gradient(p, group)
            held = local(p.grad)
        assert held is None or isinstance(held, LowRankGrad)
        if factors is not None:
            with without_autocast([p]):
                more = engine.compress(view, factors, low is None and (held is None or held.empty))
            low = more if low is None else low + more
        assert low is not None
        if held is None:
            p.grad = in_place_of(view, self._low_rank_grad(p, low))
        else:
            held.low.add_(low)
            held.empty = False

    def _low_rank_grad(self, p: Tensor, low: Tensor) -> LowRankGrad:
        owner, place = owner_of(self), self._places[p]

        def project(more: Tensor, first: bool) -> Tensor:  # holds neither the parameter nor the optimizer
            return cast(LowRankOptimizer, owner())._project_more(place, more, first)

        return LowRankGrad(local(p), low, owner, project, dtype=dtype_of_grad(p))

    def _project_more(self, place: int, more: Tensor, first: bool) -> Tensor:
        """A further micro-batch; ``first``: it begins a step."""
        p, group = self._present[place]
        with without_autocast([p]):
            return engine.compress(self._view(p, group), more, first)

    def view_of(self, p: Tensor) -> ParamView:
        """One of this optimizer's parameters as a step sees it."""
        if not self.state.get(p):
            self._adopt(also=p)
        return self._view(p, self.group_of(p))

    def knows(self, p: Tensor) -> bool:
        """Whether the parameter is one of this optimizer's."""
        return p in self._places

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The group of one of this optimizer's parameters."""
        return self._present[self._places[p]][1]

    @torch.no_grad()
    def update_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        """One step on one parameter, whose gradient is consumed."""
        plain_numbers(group)
        view = self._check(p, group)
        with without_autocast([p]):
            self._update(view, p.grad)
        p.grad = in_place_of(view, ConsumedGrad(local(p), owner_of(self), dtype=dtype_of_grad(p)))

    def _view(self, p: Tensor, group: dict[str, Any]) -> ParamView:
        return engine.view_of(p, self.state[p], group, self.rule)

    def _check(self, p: Tensor, group: dict[str, Any], alike: dict[Any, Any] | None = None) -> ParamView:
        """Refuse what a step cannot use, make the state of a parameter that is new here, and see it as a step does.

        ``alike``: what one step has found of plain parameters, by shape: others are seen as they are.
        """
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient ({p.grad.layout}), which cannot be projected; build the "
                "layer with sparse=False (such as nn.Embedding(..., sparse=False)) or give it to torch.optim.SparseAdam"
            )
        if isinstance(stand_in := local(p.grad), LowRankGrad | ConsumedGrad):
            stand_in.check_owner(self)
        check_compiler(p, group)
        if not self.state.get(p):
            self._adopt(also=p)
        state, alike = self.state[p], {} if alike is None else alike
        kind = (p.shape, p.dtype, id(group)) if is_plain(p) else id(p)
        if kind not in alike:
            view = self._view(p, group)
            alike[kind] = view, state_spec(view.layout, group, self.rule)
        view, spec = alike[kind]
        if is_plain(p):
            view = ParamView(p, state, view.group, view.rule, view.layout)
        for key, tensor in spec.items():
            held = state.get(key)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                if held is None and key.endswith("momentum_buffer"):
                    raise ValueError(
                        f"momentum of a parameter of shape {tuple(p.shape)} is on now and was off when the optimizer was made, so there is "
                        "no buffer for it. OneCycleLR and CyclicLR turn it on: give them cycle_momentum=False, or make the optimizer with "
                        "a momentum above 0"
                    )
                raise ValueError(
                    f"the group of a parameter of shape {tuple(p.shape)} now asks for state {key} {tensor.shape} {tensor.dtype}, but it "
                    f"holds {'none' if held is None else (tuple(held.shape), held.dtype)}: rank, proj_type and codecs cannot change "
                    "during a run. Set them back, or make a new optimizer"
                )
            if not tensor.host and held.device != p.device:  # the model moved after the optimizer was made
                state[key] = held.to(p.device)
        return view

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State by index and groups: plain tensors and numbers, which torch.load reads with its defaults."""
        self._adopt()
        handle = self.register_state_dict_post_hook(_with_dtensors, prepend=True)  # the user's own hooks see what is saved
        try:
            whole = super().state_dict()
        finally:
            handle.remove()
        for place, (p, _) in enumerate(self._present):  # present and empty: a checkpoint without it is not whole
            if not self.state.get(p):
                whole["state"].setdefault(place, {})
        return whole

    def _adopt(self, also: Tensor | None = None) -> None:
        """Follow the groups: frameworks such as FSDP2 exchange the parameters in them after construction.

        Frozen parameters get no state until one of them (``also``) meets a gradient.
        """
        known = self.__dict__.get("_places", {})
        changed = [group for group in self.param_groups if any(p not in known for p in group["params"])]
        for group in changed:
            for p in group["params"]:
                check_shared(engine.layout_of(p, group), group, self.rule)
        present = [(p, group) for group in self.param_groups for p in group["params"]]
        places = {p: place for place, (p, _) in enumerate(present)}
        for group in changed:
            refuse_flattened(group, [p for p in known if p not in places])
        self._present, self._places = present, places
        for p in [p for p in self.state if p not in self._places]:
            del self.state[p]
        for p, group in self._present:
            if (p.requires_grad or p is also) and not self.state.get(p):
                self.state[p] = engine.new_state(p, group, self.rule, getattr(p, PLACE, self._places[p]))
        for group in changed:
            for note in notes(group, self.row, len(self._present) == 1):
                warnings.warn(note, stacklevel=callers_level())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state_dict exactly, dtypes included; those of galore-torch 1.0 are converted.

        Refuses, before anything changes, a checkpoint whose tensors do not fit this optimizer's parameters and groups.
        """
        # Registered last, so that it sees what the user's own hooks have made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(lambda _, checkpoint: seal(self, self.rule, self._check_group, checkpoint))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for attachment in self.attachments:
            attachment.follow_groups()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "of_ranked_groups": self.of_ranked_groups}  # torch lists what a copy keeps

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("attachments", [])  # a copy has none
        self.__dict__.setdefault("of_ranked_groups", {})
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        unseal(self)
        self._adopt()


def _with_dtensors(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """A state_dict as checkpoints hold it: with DTensors around what is cut between processes as its parameter is."""
    for place, (p, group) in enumerate(optimizer._present):
        if place in state_dict["state"]:
            state_dict["state"][place] = whole_state(p, state_dict["state"][place], group, optimizer.rule)
