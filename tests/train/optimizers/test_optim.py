"""Every name builds its optimizer with every flag it claims; sizes are those of storages."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.model.llama import build_model, model_shape
from galore_torch.train.optimizers.registry import (
    OPTIMIZERS,
    adamw_state_bytes,
    backward_mode,
    build_optimizer,
    fused_pass,
    set_lr,
    settled_gradients,
    state_bytes,
    unused_flags,
)

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "update_proj_gap": 2,
    "galore_scale": 0.5,
    "gap_range": None,
    "cycle_length": 4,
    "proj_type": "std",
    "weight_decay": 0.125,
    "beta1": None,
}


@pytest.fixture
def model(model_file: Path) -> nn.Module:
    settings: dict[str, Any] = {"dtype": "float32", "bos_token_id": None, "eos_token_id": 0, "activation_checkpointing": False}
    return build_model(model_shape(str(model_file)), seed=0, **settings)


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(32).view(2, 16)
    logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def need(name: str) -> None:
    if name in ("lora", "relora"):
        pytest.importorskip("peft", reason="lora and relora need the extra peft")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_learns(name: str, model: nn.Module) -> None:
    need(name)
    optimizer = build_optimizer(name.upper(), model, lr=OPTIMIZERS[name].default_lr, settings=SETTINGS)
    before = loss_of(model).item()
    with fused_pass(name, model, optimizer, deferred=False):
        for _ in range(10):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss_of(model).item() < before - 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flags_reach_the_groups(name: str, model: nn.Module) -> None:
    need(name)
    spec = OPTIMIZERS[name]
    beta1 = 0.75 if "beta1" in spec.flags else None
    groups = build_optimizer(name, model, lr=0.01, settings={**SETTINGS, "beta1": beta1}).param_groups
    assert all(group["weight_decay"] == 0.125 and group["lr"] == 0.01 for group in groups)
    if beta1:
        found = [group.get("momentum", group.get("beta1", group.get("betas", (None,))[0])) for group in groups]
        assert found == [0.75] * len(groups)
    projected = [group for group in groups if group.get("rank")]
    assert bool(projected) == (spec.low_rank or spec.rank is not None)
    gap = 2 if "update_proj_gap" in spec.flags else 200  # of means of neighbours, which never change
    given = (spec.rank or 4, gap, 0.5, "std") if spec.low_rank else (spec.rank, spec.gap, spec.scale, "std")
    for group in projected:
        assert (group["rank"], group["update_proj_gap"], group["scale"], group["proj_type"]) == given
        assert len(group["params"]) == 7, "q, k, v, o, gate, up and down of the one layer"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_one_group(name: str, model: nn.Module) -> None:
    need(name)
    groups = build_optimizer(name, model, lr=0.01, settings=SETTINGS).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_adafactor_has_no_relative_step(model: nn.Module) -> None:
    for name in ("adafactor", "galore_adafactor"):
        for group in build_optimizer(name, model, lr=0.01, settings=SETTINGS).param_groups:
            assert not group["relative_step"]
            assert not group["scale_parameter"]


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "scale_parameter" in spec.flags and not spec.per_layer])
def test_a_matrix_of_the_usual_size_steps_by_the_rate_itself(name: str, model: nn.Module) -> None:
    """--scale_parameter is of the matrices alone, and --lr means what it meant."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 0.02 / p.data.square().mean().sqrt()
    twin, moved = copy.deepcopy(model), []
    for one, relative in ((model, True), (twin, False)):
        before = {key: p.detach().clone() for key, p in one.named_parameters()}
        optimizer = build_optimizer(name, one, lr=0.25, settings={**SETTINGS, "weight_decay": 0.0, "scale_parameter": relative})
        assert [group["scale_parameter"] for group in optimizer.param_groups] == [
            relative and group["rank"] is not None for group in optimizer.param_groups
        ]
        set_lr(optimizer, 1e-3)
        loss_of(one).backward()
        optimizer.step()
        moved.append({key: p.detach().clone() - before[key].to(p.dtype) for key, p in one.named_parameters()})
    for mine, theirs in zip(moved[0].values(), moved[1].values(), strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(mine.norm(), theirs.norm(), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("name", ["adafactor", "galore_adafactor"])
def test_adafactor_with_beta1_0_keeps_no_first_moment(name: str, model: nn.Module) -> None:
    """The published script's convention, and its default."""
    optimizer = build_optimizer(name, model, lr=0.01, settings={**SETTINGS, "beta1": 0.0})
    assert [group["beta1"] for group in optimizer.param_groups] == [None] * len(optimizer.param_groups)


def test_adam8bit_is_adamw_with_8_bit_moments(model: nn.Module) -> None:
    """Nothing is projected; matrices of 4096 elements and more have 8-bit state, and three steps go where AdamW's go."""
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = build_optimizer("adam8bit", model, lr=0.01, settings=SETTINGS)
    adamw = build_optimizer("adamw", twin, lr=0.01, settings=SETTINGS)
    for one, chosen in ((model, optimizer), (twin, adamw)):
        for _ in range(3):
            loss_of(one).backward()
            chosen.step()
            chosen.zero_grad()
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert {"exp_avg_codes", "exp_avg_scale"} <= set(optimizer.state[embedding])
    for first, mine, theirs in zip(start.parameters(), model.parameters(), twin.parameters(), strict=True):
        assert torch.cosine_similarity((mine - first).flatten(), (theirs - first).flatten(), dim=0) > 0.99


def test_gap_range_reaches_the_projected_group(model: nn.Module) -> None:
    *_, projected = build_optimizer("galore_adamw", model, lr=0.01, settings={**SETTINGS, "gap_range": (1, 8)}).param_groups
    assert projected["gap_range"] == (1, 8)


def test_codecs_reach_every_group_and_are_the_size_of_the_state(model: nn.Module) -> None:
    """Of projected and of other weights; None is what the class has."""

    def state(name: str, **codecs: str | None) -> tuple[set[str], int]:
        optimizer = build_optimizer(name, model, lr=0.01, settings=SETTINGS | codecs)
        loss_of(model).backward()
        optimizer.step()
        return {f"{group['state_codec']} {group['basis_codec']}" for group in optimizer.param_groups}, state_bytes(optimizer)

    own, size = state("galore_adamw")
    assert own == {"fp32 weight"}
    assert state("galore_adamw", state_codec="fp32", basis_codec=None) == (own, size)
    assert state("galore_adamw", state_codec="bf16", basis_codec="bf16")[0] == {"bf16 bf16"}
    assert state("galore_adamw", state_codec="bf16", basis_codec="bf16")[1] == pytest.approx(size / 2, rel=0.03)
    assert state("galore_adamw8bit", state_codec="bf16")[0] == {"bf16 bf16"}
    assert state("galore_adamw8bit")[0] == {"int8 bf16"}


def test_docs_have_the_sizes_of_the_published_60m_run(parsed: Callable[[str], PretrainConfig]) -> None:
    """Every row of its table, from tensors without memory; shares are those of AdamW's moments, twice the weights."""
    config = parsed("--config 60m")
    shape: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "activation_checkpointing": False, "seed": 0}
    lines = (Path(__file__).parents[3] / "docs" / "memory.md").read_text().partition("| `--optimizer` |")[2].splitlines()[2:]
    table = [[cell.strip().split(" ")[0] for cell in line.strip("|").split("|")] for line in itertools.takewhile(str.strip, lines)]
    assert len(table) == 5
    for name, state_codec, basis_codec, size, of_bf16, of_fp32 in table:
        with torch.device("meta"):
            model = build_model(model_shape("60m"), dtype=config.torch_dtype, **shape)
        elements = sum(p.numel() for p in model.parameters())
        held = 4 * elements
        if name != "adamw":
            codecs = {"state_codec": state_codec, "basis_codec": basis_codec}
            optimizer = build_optimizer(name, model, lr=0.01, settings=config.optimizer_settings | codecs)
            held = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
        assert float(size) == pytest.approx(held / 1e6, abs=0.05)
        assert (float(of_bf16), float(of_fp32)) == pytest.approx((25 * held / elements, 12.5 * held / elements), abs=0.51)


@pytest.mark.parametrize(("name", "rank"), [("muon", "full"), ("galore_muon", 4)])
def test_muon_moves_the_matrices_and_adamw_the_rest(name: str, rank: object, model: nn.Module) -> None:
    optimizer = build_optimizer(name, model, lr=0.01, settings=SETTINGS | {"update_proj_gap": None, "galore_scale": None})
    assert isinstance(optimizer, galore_torch.GaLoreMuon)
    rest, matrices = optimizer.param_groups
    assert {tuple(p.shape) for p in matrices["params"]} == {(16, 16), (24, 16), (16, 24)}
    assert (matrices["rank"], rest["rank"]) == (rank, None)
    assert (matrices["update_proj_gap"], matrices["scale"]) == (1, 0.2), "its own, not those of GaLore"
    for words, group in (("momentum_buffer", matrices), ("exp_avg_sq", rest)):
        assert all(any(key.startswith(words) for key in optimizer.state[p]) for p in group["params"])


@pytest.mark.parametrize("name", ["muon", "galore_muon"])
def test_stacks_of_expert_weights_are_batches_of_muons_matrices(name: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    optimizer = build_optimizer(name, mixture, lr=0.01, settings=SETTINGS)
    stacks = [p for p in optimizer.param_groups[-1]["params"] if p.dim() == 3]
    before = [p.detach().clone() for p in stacks]
    loss_of(mixture).backward()
    optimizer.step()
    assert len(stacks) == 2
    assert all((p != start).any() for p, start in zip(stacks, before, strict=True))


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_stacks_of_expert_weights_are_refused_by_what_cannot_take_them(name: str) -> None:
    """peft's adapters stand beside linear layers; 98 % of such a model would train otherwise."""
    from transformers import MixtralConfig, MixtralForCausalLM

    need(name)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    with pytest.raises(UserError, match=r"2 weights of this model are .*model\.layers\.0\.mlp\.experts\.gate_up_proj.*choose galore_adamw"):
        build_optimizer(name, mixture, lr=0.01, settings=SETTINGS)


def test_int8_weights_and_a_model_that_divides_its_own() -> None:
    """RWKV rescales its layers in place before an evaluation; without that it trains."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, rescale_every=1)
    with pytest.raises(UserError, match=r'divided in place.*"rescale_every": 0'):
        build_optimizer("qgalore_adamw8bit", RwkvForCausalLM(config), lr=0.01, settings=SETTINGS)
    config.rescale_every = 0
    model = RwkvForCausalLM(config)
    build_optimizer("qgalore_adamw8bit", model, lr=0.01, settings=SETTINGS)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8).view(1, 8))


def test_muons_checkpoint_goes_on_exactly(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    one = build_optimizer("muon", model, lr=0.01, settings=SETTINGS)
    two = build_optimizer("muon", twin, lr=0.01, settings=SETTINGS)
    loss_of(model).backward()
    one.step()
    saved = one.state_dict()
    numbers = [index for group in saved["param_groups"] for index in group["params"]]
    assert numbers == sorted(saved["state"]) == list(range(len(list(model.parameters())))), "the form of one optimizer"
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for chosen, optimizer in ((model, one), (twin, two)):
        optimizer.zero_grad()
        loss_of(chosen).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_optimizers_own_complaint_is_a_user_error(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"galore_adamw: .*-1"):
        build_optimizer("galore_adamw", model, lr=0.01, settings={**SETTINGS, "rank": -1})


def test_per_layer_updates_move_weights_in_the_backward_pass_unless_deferred(model: nn.Module) -> None:
    optimizer = build_optimizer("galore_adamw_per_layer", model, lr=0.01, settings=SETTINGS)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    for deferred in (True, False):
        before = weight.detach().clone()
        with fused_pass("galore_adamw_per_layer", model, optimizer, deferred=deferred):
            loss_of(model).backward()
            assert torch.equal(weight, before) == deferred
            optimizer.step()
            assert not torch.equal(weight, before)
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "gradients", "modes"),
    [
        ("adamw", "direct", (None, None)),
        ("adam8bit_per_layer", None, ("update", None)),
        ("galore_muon", None, (None, None)),
        ("galore_muon", "direct", (None, None)),
        ("muon_per_layer", None, ("update", None)),
        ("galore_muon_per_layer", "project", ("update", None)),
        ("galore_adamw", None, ("direct", "direct")),
        ("galore_adamw", "project", ("project", "project")),
        ("galore_adamw", "full", (None, None)),
        ("qgalore_adamw8bit_per_layer", None, ("direct_update", "direct")),
        ("galore_adamw_per_layer", "project", ("update", "project")),
    ],
)
def test_mode_of_the_backward_pass(name: str, gradients: str | None, modes: tuple[str | None, str | None]) -> None:
    """Without and with accumulation or clipping."""
    settled = settled_gradients(name, gradients)
    assert tuple(backward_mode(name, settled, deferred=deferred) for deferred in (False, True)) == modes


def test_flags_an_optimizer_cannot_use() -> None:
    assert unused_flags("adamw", ["rank", "proj_type", "beta1", "batch_size"]) == ["proj_type", "rank"]
    assert unused_flags("galore_adamw8bit", ["rank", "proj_type", "beta1"]) == []
    assert unused_flags("galore_adagrad", ["rank", "beta1"]) == ["beta1"]
    assert unused_flags("galore_muon", ["rank", "gradients", "update_proj_gap", "beta1", "state_codec"]) == ["beta1", "gradients"]
    assert unused_flags("muon", ["rank", "targets", "state_codec", "basis_codec"]) == ["basis_codec", "rank"]


def test_state_bytes_counts_a_storage_once_and_whole() -> None:
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    big = torch.zeros(1000)  # 4000 bytes
    nested = [torch.zeros(5, dtype=torch.int8), {"x": torch.zeros(2)}]
    optimizer.state[parameter] = {"view": big[:3], "same": big[3:6], "nested": nested, "step": 7}
    assert state_bytes(optimizer) == 4000 + 5 + 8
    peer = SimpleNamespace(basis=torch.zeros(3), whole=big)  # as galore-torch 1.0 keeps its projector
    peer.itself = peer
    optimizer.state[parameter]["projector"] = peer
    assert state_bytes(optimizer) == 4000 + 5 + 8 + 12


def test_adamw_bytes_are_those_of_adamw(model: nn.Module) -> None:
    adamw = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    adamw.step()
    parameters = list(model.parameters())
    expected = 2 * 4 * sum(p.numel() for p in parameters) + 4 * len(parameters)  # two moments and a step in fp32
    assert adamw_state_bytes(model) == state_bytes(adamw) == expected


def test_galore_state_is_smaller_than_adamws(model: nn.Module) -> None:
    sizes = {}
    for name in ("galore_adamw", "galore_adafactor", "galore_sgd"):
        optimizer = build_optimizer(name, model, lr=0.01, settings=SETTINGS)
        loss_of(model).backward()
        optimizer.step()
        sizes[name] = state_bytes(optimizer)
    assert sizes["galore_adamw"] < adamw_state_bytes(model)
    assert sizes["galore_adafactor"] < sizes["galore_adamw"]
