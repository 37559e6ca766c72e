"""Construction, state dicts, copies and hooks of every public class: they are ordinary torch.optim.Optimizers.

PyTorch's own OptimizerInfo machinery with bodies of our own. Oracle: the conventions that torch.optim's classes keep;
where two runs are compared, both are ours and must agree bit for bit. Steps are in test_torch_contract_steps.py.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase, parametrize

from support.optimizer_infos import (
    CLASSES,
    INFOS,
    NEWER_KEYS,
    assert_same,
    inputs_of,
    model,
    named,
    set_grads,
    through_a_file,
    train,
)


class TestTorchContract(TestCase):
    @optims(INFOS)
    def test_errors(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Bad arguments are refused at construction with torch's own type and words, or a ValueError that names the key."""
        for case in optim_info.optim_error_inputs_func(device, dtype):
            given = case.optimizer_error_input
            params = given.params if given.params is not None else model(device)
            kwargs = {**CLASSES[optim_info.optim_cls][0], **given.kwargs}
            catcher = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
            try:
                with catcher(case.error_type, match=f"(?i){case.error_regex}"):
                    optim_info.optim_cls(params, **kwargs)
            except BaseException as error:
                raise AssertionError(f"{given.desc}: {error}") from error

    @optims(INFOS, dtypes=[torch.float32, torch.float64, torch.bfloat16])
    def test_state_dict_deterministic(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A resumed run is the uninterrupted run, bit for bit, across a refresh; the loaded dict is left as it was."""
        for kwargs in inputs_of(optim_info, device):
            a = model(device, dtype)
            original = optim_info.optim_cls(a, **kwargs)
            train(original, a, range(2))
            b = [Parameter(p.detach().clone()) for p in a]
            resumed = optim_info.optim_cls(b, **kwargs)
            saved = copy.deepcopy(original.state_dict())
            given = copy.deepcopy(saved)
            resumed.load_state_dict(given)
            assert_same(given["state"], saved["state"])
            assert given["param_groups"] == saved["param_groups"]
            assert_same(resumed.state_dict()["state"], saved["state"])
            assert_same(train(resumed, b, range(2, 5)), train(original, a, range(2, 5)))
            assert_same(resumed.state_dict()["state"], original.state_dict()["state"])

    @parametrize("from_named", [True, False])
    @parametrize("to_named", [True, False])
    @optims(INFOS)
    def test_can_load_from_to_named_state_dict(
        self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo, from_named: bool, to_named: bool
    ) -> None:
        """Names change nothing in a run; as in torch, an optimizer keeps its own names or takes the checkpoint's."""
        for kwargs in inputs_of(optim_info, device):
            a = model(device)
            original = optim_info.optim_cls(named(a, from_named), **kwargs)
            train(original, a, range(2))
            b = [Parameter(p.detach().clone()) for p in a]
            resumed = optim_info.optim_cls(named(b, to_named), **kwargs)
            resumed.load_state_dict(original.state_dict())
            expected = [name for name, _ in named(a, True)] if from_named or to_named else None
            assert resumed.param_groups[0].get("param_names") == expected
            assert_same(train(resumed, b, range(2, 5)), train(original, a, range(2, 5)))

    @optims(INFOS)
    def test_can_load_older_state_dict(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A group saved before a key existed keeps the value it was constructed with, and goes on the same."""
        for kwargs in inputs_of(optim_info, device):
            a = model(device)
            original = optim_info.optim_cls(a, **kwargs)
            train(original, a, range(2))
            older = copy.deepcopy(original.state_dict())
            for key in NEWER_KEYS:
                older["param_groups"][0].pop(key, None)
            b = [Parameter(p.detach().clone()) for p in a]
            own = {key: kwargs.pop(key) for key in NEWER_KEYS if key in kwargs}
            resumed = optim_info.optim_cls([{"params": b, **own}], **kwargs)
            resumed.load_state_dict(older)
            ours, theirs = resumed.state_dict()["param_groups"], original.state_dict()["param_groups"]
            assert ours == theirs, f"{ours[0].items() ^ theirs[0].items()}"
            assert_same(train(resumed, b, range(2, 5)), train(original, a, range(2, 5)))

    @optims(INFOS, dtypes=[torch.float32, torch.bfloat16])
    def test_save_load_equality_with_weights_only(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """torch.save and torch.load with its defaults return the same state: plain tensors and numbers, no objects."""
        for kwargs in inputs_of(optim_info, device):
            params = model(device, dtype)
            optimizer = optim_info.optim_cls(params, **kwargs)
            train(optimizer, params, range(3))
            before = optimizer.state_dict()
            after = through_a_file(before)
            assert after["param_groups"] == before["param_groups"]
            assert_same(after["state"], before["state"])
            fresh = optim_info.optim_cls(model(device, dtype), **kwargs)
            fresh.load_state_dict(after)
            assert_same(fresh.state_dict()["state"], before["state"])

    @optims(INFOS)
    def test_load_nontensor_step(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """`step` may be a number or a tensor in the file, whichever this version writes itself."""
        for kwargs in inputs_of(optim_info, device):
            runs = []
            for convert in (int, float, torch.tensor, lambda n: torch.tensor(float(n))):
                params = model(device)
                optimizer = optim_info.optim_cls(params, **kwargs)
                train(optimizer, params, range(2))
                saved = copy.deepcopy(optimizer.state_dict())
                for state in saved["state"].values():
                    state["step"] = convert(int(state["step"]))
                optimizer.load_state_dict(saved)
                runs.append(train(optimizer, params, range(2, 5)))
            for a, b in pairwise(runs):
                assert_same(a, b)

    @optims(INFOS)
    def test_state_dict_hooks(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Pre and post hooks of state_dict and load_state_dict run once each, in order, and may replace the dict."""
        for kwargs in inputs_of(optim_info, device):
            params, calls = model(device), []
            optimizer = optim_info.optim_cls(params, **{**kwargs, "lr": 0.5})
            train(optimizer, params, range(1))

            def replace_lr(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
                return {**state_dict, "param_groups": [{**g, "lr": 0.25} for g in state_dict["param_groups"]]}

            hooks = [
                optimizer.register_state_dict_pre_hook(lambda o, seen=calls: seen.append("save")),
                optimizer.register_state_dict_post_hook(replace_lr),
                optimizer.register_state_dict_post_hook(lambda o, d, seen=calls: seen.append("saved"), prepend=True),
            ]
            saved = optimizer.state_dict()
            assert calls == ["save", "saved"]
            assert saved["param_groups"][0]["lr"] == 0.25
            for hook in hooks:
                hook.remove()
            assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
            calls.clear()
            optimizer.register_load_state_dict_pre_hook(lambda o, d, seen=calls: seen.append("load"))
            optimizer.register_load_state_dict_pre_hook(replace_lr)
            optimizer.register_load_state_dict_post_hook(lambda o, seen=calls: seen.append(o.param_groups[0]["lr"]))
            optimizer.load_state_dict(optimizer.state_dict())
            assert calls == ["load", 0.25]

    @optims(INFOS)
    def test_step_hooks(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Global and own step hooks run once a step around the update, and pre hooks may change its arguments."""
        for kwargs in inputs_of(optim_info, device):
            params, calls = model(device), []
            optimizer = optim_info.optim_cls(params, **kwargs)
            handles = [
                register_optimizer_step_pre_hook(lambda *_, seen=calls: seen.append("all pre")),
                register_optimizer_step_post_hook(lambda *_, seen=calls: seen.append("all post")),
                optimizer.register_step_pre_hook(lambda *_, seen=calls: seen.append("pre")),
                optimizer.register_step_post_hook(lambda *_, seen=calls: seen.append("post")),
                optimizer.register_step_pre_hook(lambda o, *_: ((o, lambda: torch.tensor(7.0)), {})),
            ]
            try:
                set_grads(params, 0)
                assert optimizer.step() == 7.0
                assert calls == ["all pre", "pre", "post", "all post"]
            finally:
                for handle in handles:
                    handle.remove()
            assert optimizer.step() is None
            assert len(calls) == 4

    @optims(INFOS)
    def test_deepcopy_copies_all_public_attrs(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A copy has every public attribute, its own parameters and state, and goes on like the original."""
        for kwargs in inputs_of(optim_info, device):
            params = model(device)
            optimizer = optim_info.optim_cls(params, **kwargs)
            train(optimizer, params, range(2))
            twin = copy.deepcopy(optimizer)
            assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(twin) if k[0] != "_"}
            theirs = [p for group in twin.param_groups for p in group["params"]]
            assert not {id(p) for p in theirs} & {id(p) for p in params}
            assert_same(train(twin, theirs, range(2, 5)), train(optimizer, params, range(2, 5)))
            assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])

    @optims(INFOS)
    def test_non_empty_state(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Every parameter has state, from construction on, and keys that begin and end the same run."""
        for kwargs in inputs_of(optim_info, device):
            params = model(device)
            optimizer = optim_info.optim_cls(params, **kwargs)
            born = {p: set(optimizer.state[p]) for p in params}
            assert all(born.values()), kwargs
            train(optimizer, params, range(2))
            assert {p: set(optimizer.state[p]) for p in params} == born
            assert set(optimizer.state_dict()["state"]) == set(range(len(params)))

    @optims(INFOS)
    def test_add_param_group(self, device: Any, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A group added later trains as one given at once, takes defaults for its missing keys, and is validated."""
        for kwargs in inputs_of(optim_info, device):
            a, b = model(device), model(device)
            at_once = optim_info.optim_cls([{"params": a[:2]}, {"params": a[2:], "lr": 0.02}], **kwargs)
            later = optim_info.optim_cls(b[:2], **kwargs)
            later.add_param_group({"params": b[2:], "lr": 0.02})
            assert later.param_groups[1].keys() == later.param_groups[0].keys()
            assert_same(train(later, b, range(5)), train(at_once, a, range(5)))
            with pytest.raises(ValueError, match="more than one parameter group"):
                later.add_param_group({"params": b[:1]})
            with pytest.raises(ValueError, match="rank"):
                later.add_param_group({"params": [Parameter(torch.ones(4, 4))], "rank": -3})
            assert len(later.param_groups) == 2


instantiate_device_type_tests(TestTorchContract, globals(), only_for="cpu")
