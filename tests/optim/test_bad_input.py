"""Bad input is refused with an error that names the value, its bound and the cure, and nothing is lost.

"Nothing lost": weights, state and groups after the error are, bit for bit, those before it. Misuse of fused_backward and of
galore_param_groups is in test_bad_input_model.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing import assert_close

from galore_torch import GaLore, GaLoreAdafactor, GaLoreAdagrad, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, QGaLoreAdamW8bit

CLASSES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (GaLoreAdamW, {}),
    (GaLoreAdamW8bit, {"min_8bit_size": 1}),
    (QGaLoreAdamW8bit, {"min_8bit_size": 1}),
    (GaLoreAdafactor, {"lr": 0.01}),
    (GaLoreAdagrad, {}),
    (GaLoreSGD, {"momentum": 0.9}),
]
each_class = pytest.mark.parametrize(("cls", "own"), CLASSES, ids=[cls.__name__ for cls, _ in CLASSES])

# key, value, words of the bound and of the cure
NUMBERS: list[tuple[str, Any, str]] = [
    *[("rank", value, "whole number from 1.*fraction.*between 0 and 1.*None") for value in (0, -1, 2.5, 1.0, 0.0, -0.5)],
    *[("rank", value, "whole number from 1") for value in (float("nan"), float("inf"), True, "128", [2], [0])],
    *[("update_proj_gap", value, "whole number from 1.*200") for value in (0, -5, 200.0, None, "200", True)],
    *[("scale", value, "finite number.*0.25") for value in (float("nan"), float("inf"), None, "0.25", 0, -0.25)],
]
NAMES: list[tuple[str, Any, str]] = [
    *[("proj_type", value, "'std', 'reverse_std', 'left', 'right', 'full'") for value in ("diagonal", None, ["std"], 0)],
    ("projector", "crystal ball", "'gram', 'svd'"),
    ("transport", "teleport", "'rotate'"),
    ("state_codec", "fp3", "'fp32', 'bf16', 'int8'"),
    ("basis_codec", "int9", "'fp32', 'bf16'"),
    ("decay", "sometimes", "'before', 'after'"),
]
ADAM: list[tuple[str, Any, str]] = [
    *[("lr", value, "lr") for value in (-1.0, float("nan"), None, "1e-3")],
    ("lr", torch.tensor([0.1, 0.2]), "2 elements.*1-element"),
    *[("betas", value, "beta") for value in ((1.0, 0.9), (-0.1, 0.9), (0.9, 1.5), (0.9,), 0.9)],
    *[("eps", value, "eps") for value in (-1e-8, float("nan"))],
    *[("weight_decay", value, "weight_decay") for value in (-0.1, float("nan"))],
]
ADAFACTOR: list[tuple[str, Any, str]] = [
    ("eps", 1e-8, "eps"),
    ("beta1", 1.5, "beta1"),
    ("beta1", -0.1, "beta1"),
    ("clip_threshold", 0.0, "clip_threshold"),
    ("clip_threshold", -1.0, "clip_threshold"),
    ("decay_rate", 0.8, "decay_rate"),
]
SLIPS = [("ranks", "rank"), ("update_proj_gaps", "update_proj_gap"), ("proj_typ", "proj_type"), ("weight_dcay", "weight_decay")]


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer: Optimizer, params: list[Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for place, p in enumerate(params):
            p.grad = weight(*p.shape, dtype=p.dtype, seed=1000 * place + step + 1).detach()
        optimizer.step()


def snapshot(optimizer: Optimizer) -> list[Any]:
    """Weights, state and group keys, as values."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return [weights, copy.deepcopy(optimizer.state_dict())]


@contextmanager
def refused(optimizer: Optimizer, pattern: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The body must raise, and leave the optimizer and its weights as they were."""
    before = snapshot(optimizer)
    with pytest.raises(error, match=pattern):
        yield
    after = snapshot(optimizer)
    assert_close(after[0], before[0], rtol=0.0, atol=0.0)
    assert_close(after[1]["state"], before[1]["state"], rtol=0.0, atol=0.0)
    assert after[1]["param_groups"] == before[1]["param_groups"]


@pytest.mark.parametrize(
    ("cls", "key", "value", "words"),
    [
        *[(GaLoreAdamW, *case) for case in NUMBERS + NAMES + ADAM],
        *[(GaLoreAdafactor, *case) for case in ADAFACTOR],
    ],
    ids=lambda x: getattr(x, "__name__", re.sub(r"\s", "", str(x))[:20]),
)
def test_settings_out_of_bounds(cls: type[Optimizer], key: str, value: Any, words: str) -> None:
    """As an argument, as a group's key, in a group added later: the same error, with the value, the bound and the cure."""
    own = {"lr": 0.01} if cls is GaLoreAdafactor else {}
    shown = "" if isinstance(value, Tensor | tuple) else re.escape(str(value))
    pattern = rf"(?s)(?=.*{key.rstrip('s')})(?=.*{shown})(?=.*{words})"
    with pytest.raises(ValueError, match=pattern):
        cls([weight(6, 4)], **{**own, "rank": 2, key: value})
    with pytest.raises(ValueError, match=pattern):
        cls([{"params": [weight(6, 4)], "rank": 2, key: value}], **own)
    optimizer = cls([weight(6, 4)], rank=2, **own)
    with refused(optimizer, pattern):
        optimizer.add_param_group({"params": [weight(6, 4)], "rank": 2, key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("rank", 3), ("update_proj_gap", 0), ("scale", float("nan"))] + [case[:2] for case in NAMES]
)
def test_bad_edits_of_a_running_group(key: str, value: Any) -> None:
    """The next step refuses them before it changes anything; set back, the run goes on."""
    params = [weight(6, 4), weight(12, 8)]
    optimizer = GaLoreAdamW([{"params": params[:1]}, {"params": params[1:], "rank": 2}], lr=0.1)
    train(optimizer, params, 1)
    good, optimizer.param_groups[1][key] = optimizer.param_groups[1][key], value
    with refused(optimizer, key):
        optimizer.step()
    optimizer.param_groups[1][key] = good
    before = snapshot(optimizer)[0]
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_groups_own_lr_is_not_ignored_by_adafactor() -> None:
    """It turns relative_step off as the constructor's does; both in one group are refused. Oracle: lr in the constructor."""
    a, b = weight(6, 4), weight(6, 4)
    train(GaLoreAdafactor([{"params": [a], "lr": 0.01}]), [a], 2)
    train(GaLoreAdafactor([b], lr=0.01), [b], 2)
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"lr.*relative_step"):
        GaLoreAdafactor([{"params": [a], "lr": 0.01, "relative_step": True}])


@each_class
@pytest.mark.parametrize(("key", "meant"), SLIPS)
def test_misspelled_group_keys(cls: type[Optimizer], own: dict[str, Any], key: str, meant: str) -> None:
    """A likely slip is an error that names the key meant; keys of others, such as a scheduler's, are left alone."""
    optimizer = cls([{"params": [weight(6, 4)], "name": "mine", "initial_lr": 0.1, "lr_mult": 2}], **own)
    assert optimizer.param_groups[0]["lr_mult"] == 2
    with refused(optimizer, f"'{key}' is not known; did you mean '{meant}'"):
        optimizer.add_param_group({"params": [weight(6, 4)], key: 1})


@each_class
def test_unknown_arguments(cls: type[Optimizer], own: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}.*ranks.*rank"):
        cls([weight(6, 4)], ranks=2, **own)


def test_unknown_arguments_of_the_base_class() -> None:
    with pytest.raises(ValueError, match=r"RMSprop.*alpa"):
        GaLore(torch.optim.RMSprop, [weight(6, 4)], alpa=0.9)
    for base in ("RMSprop", 3, nn.Linear):
        with pytest.raises(ValueError, match=r"torch.optim.*such as torch.optim.RMSprop"):
            GaLore(base, [weight(6, 4)])
    with pytest.raises(ValueError, match=r"LBFGS.*closure"):
        GaLore(torch.optim.LBFGS, [weight(6, 4)])


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_unsupported_modes(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}=True is not supported.*leave it"):
        GaLoreAdamW([weight(6, 4)], **{flag: True})
    optimizer = GaLoreAdamW([weight(6, 4)])
    with refused(optimizer, flag):
        optimizer.add_param_group({"params": [weight(6, 4)], flag: True})


@each_class
def test_complex_parameters(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """Projected as a matrix of real numbers; in a torch.optim class; at full rank elsewhere they train."""
    z = Parameter(torch.ones(4, 3, dtype=torch.complex64))
    wraps = issubclass(cls, GaLore)
    with pytest.raises(ValueError, match=r"\(4, 3\).*complex64.*another optimizer" if wraps else r"\(4, 3\).*complex64.*tensor=True"):
        cls([z], rank=2, **own)
    optimizer = cls([weight(6, 4)], **own)
    with refused(optimizer, "complex64"):
        optimizer.add_param_group({"params": [weight(2, 2), z], "rank": 1})
    if not wraps:
        z.grad = torch.full_like(z, 1j)
        cls([z], **own).step()
        assert (z.imag < 0).all()


def test_the_same_parameter_in_two_groups() -> None:
    p = weight(6, 4)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLoreAdamW([{"params": [p]}, {"params": [p], "rank": 2}])
    optimizer = GaLoreAdamW([p])
    with refused(optimizer, "more than one parameter group"):
        optimizer.add_param_group({"params": [p], "rank": 2})


@each_class
def test_sparse_gradients(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """Refused before any other parameter moves, whatever the order."""
    first, last, embedding = weight(6, 4), weight(6, 4, seed=1), nn.Embedding(10, 4, sparse=True)
    optimizer = cls([{"params": [first, embedding.weight, last], "rank": 2}], **own)
    (embedding(torch.tensor([1, 3])).square().sum() + first.sum() + last.sum()).backward()
    with refused(optimizer, r"\(10, 4\).*sparse.*sparse=False.*SparseAdam"):
        optimizer.step()


@each_class
def test_a_step_with_a_bad_gradient_spoils_no_other_parameter(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """One NaN in one gradient: the other parameters move as if it were not there. Oracle: a run without the bad one."""
    runs = []
    for bad in (True, False):
        params = [weight(12, 8), weight(12, 8, seed=5), weight(7)]
        optimizer = cls([{"params": params, "rank": 2}], **own)
        train(optimizer, params, 2)
        params[1].grad = torch.ones(12, 8)
        params[1].grad[3, 4] = float("nan") if bad else 1.0
        optimizer.step()
        assert params[1].isfinite().all()
        runs.append([params[0].detach(), params[2].detach()])
    assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e3), (torch.float16, 1e4), (torch.float32, 1e16)], ids=str)
def test_large_finite_gradients_are_used(dtype: torch.dtype, size: float, rank: int | None) -> None:
    """A gradient is skipped for what is not finite in fp32, squares included, and not for what its own dtype could not hold."""
    p = weight(200, 100, dtype=dtype)
    optimizer = GaLoreSGD([p], lr=0.1 / size, rank=rank, scale=1.0)
    p.grad = torch.full_like(p, size)
    optimizer.step()
    assert_close(p.detach(), weight(200, 100, dtype=dtype).detach() - 0.1, rtol=0.0, atol=2e-3)


@each_class
def test_a_frozen_parameter(cls: type[Optimizer], own: dict[str, Any]) -> None:
    """It has no state and does not move; unfrozen, it trains from then on. Oracle: an optimizer made at that time."""
    runs = []
    for early in (True, False):
        p, other = weight(12, 8), weight(7)
        p.requires_grad_(False)
        optimizer = cls([{"params": [p], "rank": 2}, {"params": [other]}], **own)
        assert {place for place, held in optimizer.state_dict()["state"].items() if held} == {1}
        if early:
            train(optimizer, [other], 2)
            assert torch.equal(p, weight(12, 8))
        p.requires_grad_(True)
        train(optimizer, [p], 3)
        runs.append(p.detach())
        restored = cls([{"params": [weight(12, 8)], "rank": 2}, {"params": [weight(7)]}], **own)
        restored.load_state_dict(optimizer.state_dict())
        assert_close(restored.state_dict()["state"], optimizer.state_dict()["state"], rtol=0.0, atol=0.0)
    assert torch.equal(runs[0], runs[1])


def other_models() -> Iterator[tuple[str, Any, str]]:
    def saved(shapes: list[tuple[int, ...]], cls: type[Optimizer] = GaLoreAdamW, **own: Any) -> dict[str, Any]:
        params = [weight(*shape) for shape in shapes]
        optimizer = cls([{"params": params[:1], "rank": 2}, {"params": params[1:]}], **own)
        train(optimizer, params, 1)
        return optimizer.state_dict()

    yield "another shape", saved([(12, 8), (9,)]), r"parameter 1.*\(9,\).*\(7,\).*another model"
    yield "another matrix", saved([(16, 8), (7,)]), r"parameter 0.*\(12, 8\).*another model"
    yield "one more parameter", saved([(12, 8), (7,), (7,)]), "size"
    yield "another optimizer", saved([(12, 8), (7,)], GaLoreAdafactor, lr=0.1), "optimizer class"
    missing = saved([(12, 8), (7,)])
    del missing["state"][1]["exp_avg_sq"]
    yield "a missing key", missing, "parameter 1.*exp_avg_sq"
    stepless = saved([(12, 8), (7,)])
    del stepless["state"][1]["step"]
    yield "no step", stepless, "parameter 1.*step"
    one_group = saved([(12, 8), (7,)])
    one_group["param_groups"].pop()
    yield "one group fewer", one_group, "group"
    bad_group = saved([(12, 8), (7,)])
    bad_group["param_groups"][0]["rank"] = 0
    yield "a bad group", bad_group, "rank=0"


@pytest.mark.parametrize(("name", "checkpoint", "pattern"), [pytest.param(*case, id=case[0]) for case in other_models()])
def test_a_checkpoint_of_another_model(name: str, checkpoint: dict[str, Any], pattern: str) -> None:
    """Refused before anything changes, also the parameters before the first that does not fit."""
    params = [weight(12, 8), weight(7)]
    optimizer = GaLoreAdamW([{"params": params[:1], "rank": 2}, {"params": params[1:]}], lr=0.1)
    train(optimizer, params, 3)
    with refused(optimizer, f"(?s){pattern}"):
        optimizer.load_state_dict(checkpoint)


@each_class
@pytest.mark.parametrize("rank", [8, 9, 1000])
def test_a_rank_that_is_not_smaller_trains_at_full_rank_with_one_warning(cls: type[Optimizer], own: dict[str, Any], rank: int) -> None:
    """The warning counts the matrices and names one; a matrix that is large enough stays projected. Oracle: no rank."""
    runs = []
    for given in (rank, None):
        params = [weight(12, 8), weight(6, 20), weight(7)]
        if given is None:
            optimizer = cls(params, **own)
        else:
            with pytest.warns(UserWarning, match="full rank") as warned:
                optimizer = cls([{"params": params, "rank": given, "scale": 1.0}], **own)
            assert len(warned) == 1
            assert re.match(rf"rank={given} is not smaller.*2 of 3.*\(6, 20\).*full rank.*smaller rank", str(warned[0].message))
        train(optimizer, params, 3)
        runs.append([p.detach() for p in params])
    assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)


@each_class
def test_the_warning_of_a_large_rank_points_at_the_callers_line(cls: type[Optimizer], own: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="full rank") as warned:
        cls([{"params": [weight(12, 8)], "rank": 8}], **own)
    assert [w.filename for w in warned] == [__file__]
