"""Which parameters `galore_param_groups` projects, and how much of a model's body that is.

Oracle: the parameters' own names and shapes, listed by hand for each family; shares counted on all parameters.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from galore_torch import GaLoreAdamW, galore_param_groups
from galore_torch.optim.param_groups import coverage

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def projected(model: nn.Module, **keys: Any) -> list[str]:
    """Names, with numbers as *, each once."""
    names = (re.sub(r"\b\d+\b", "*", name) for name, _ in galore_param_groups(model, 2, **keys)[-1]["params"])
    return list(dict.fromkeys(names))


def family(model_type: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **{**SMALL, **config}))


# --- families ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mixtral", {"intermediate_size": 48, "num_local_experts": 4}),
        ("qwen3_moe", {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16}),
        ("gpt_oss", {"intermediate_size": 48, "num_local_experts": 4, "head_dim": 16}),
        ("deepseek_v3", {"moe_intermediate_size": 24, "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
    ],
)
def test_experts_are_projected_and_routers_are_not(model_type: str, config: dict[str, Any]) -> None:
    """transformers keeps experts as 3-D parameters of no linear layer; a router's matrix has one row an expert."""
    model = family(model_type, **config)
    names = projected(model)
    assert {"model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"} <= set(names)
    assert not [name for name in names if "router" in name or "mlp.gate" in name or "bias" in name or "embed" in name or "head" in name]
    found = coverage(model, galore_param_groups(model, 2))
    assert found.share == 1
    assert str(found) == f"{found.matrices} of {found.matrices} matrices, 100 % of the body"


def test_each_expert_trains_in_a_subspace_of_its_own() -> None:
    """Small ones too, which their shape does not tell from a convolution. Oracle: the experts as matrices of one optimizer."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 12))

    model = nn.ModuleDict({"mlp": Experts()})
    stack = model["mlp"].gate_up_proj
    alone = [nn.Parameter(W.clone()) for W in stack.detach()]
    how: dict[str, Any] = {"update_proj_gap": 2, "scale": 0.25, "projector": "svd"}
    together = GaLoreAdamW(galore_param_groups(model, 2, **how), lr=0.05)
    apart = GaLoreAdamW([{"params": alone, "rank": 2, **how}], lr=0.05)
    assert together.state[stack]["exp_avg"].shape == (3, 2, 12)
    for step in range(5):
        stack.grad = (torch.randn(3, 8, 2) @ torch.randn(3, 2, 12)).add(0.1 * step)
        for W, G in zip(alone, stack.grad, strict=True):
            W.grad = G.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([W.detach() for W in alone]), rtol=1e-4, atol=1e-5)


def test_a_router_that_is_a_linear_layer_beside_its_experts() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = [nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)) for _ in range(4)]
            self.gate, self.experts = nn.Linear(16, 4), nn.ModuleList(expert)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp()}) for mlp in (Mixture, Gated)])})
    assert projected(model) == [
        "layers.*.mlp.experts.*.*.weight",
        "layers.*.mlp.gate.weight",
        "layers.*.mlp.up.weight",
        "layers.*.mlp.down.weight",
    ]
    gates = [name for name, _ in galore_param_groups(model, 2)[-1]["params"] if "gate" in name]
    assert gates == ["layers.1.mlp.gate.weight"]  # one of an MLP, not the one that chooses experts


def test_torchs_own_transformer_with_its_fused_q_k_v() -> None:
    """Also where its name says nothing, and where the three have weights of their own."""
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    assert projected(layer) == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert projected(layer, targets="in_proj") == ["self_attn.in_proj_weight"]
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(16, 2, kdim=12, vdim=8), "read": nn.Linear(16, 2)})
    assert projected(model) == ["mix.q_proj_weight", "mix.k_proj_weight", "mix.v_proj_weight", "mix.out_proj.weight"]


def test_t5_whose_attention_is_written_with_capitals() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and "shared" not in name and "bias" not in name}
    assert {name for name, _ in galore_param_groups(model, 2)[-1]["params"]} == matrices - {"lm_head.weight"}
    assert len(matrices - {"lm_head.weight"}) == 2 * (4 + 2) + 2 * (8 + 2)


HYBRIDS = [
    ("jamba", {"intermediate_size": 48, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    ("bamba", {"intermediate_size": 48, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}),
    ("falcon_h1", {"intermediate_size": 48, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "head_dim": 16}),
    ("recurrent_gemma", {"intermediate_size": 96, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 16}),
    ("lfm2", {"intermediate_size": 48, "layer_types": ["conv", "full_attention"]}),
    (
        "granitemoehybrid",
        {"intermediate_size": 48, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    ),
]


@pytest.mark.parametrize(("model_type", "config"), HYBRIDS, ids=[name for name, _ in HYBRIDS])
def test_hybrids_keep_no_layer_at_full_rank(model_type: str, config: dict[str, Any]) -> None:
    """Every linear layer and expert inside the layers; what is left there are convolutions, vectors and routers."""
    model = family(model_type, **config)
    rest, low = galore_param_groups(model, 2)
    inside = {name for name, p in rest["params"] if ".layers." in name and p.dim() > 1 and min(p.shape) > 1}
    assert not [name for name in inside if not re.search(r"router|bias|A_log|conv1d|conv\.conv", name)]
    assert coverage(model, [rest, low]).share == 1


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_model_without_known_names_gets_its_linear_layers_and_a_note(model_type: str) -> None:
    extra = {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1} if model_type == "mamba2" else {}
    model = family(model_type, state_size=8, **extra)
    with pytest.warns(UserWarning, match=r"no layer of Mamba.* attention or MLP.*layers\.\*\.mixer\.in_proj.*targets") as notes:
        names = projected(model)
    assert len(notes) == 1
    assert {"backbone.layers.*.mixer.in_proj.weight", "backbone.layers.*.mixer.out_proj.weight"} <= set(names)
    assert not [name for name in names if "conv" in name or "A_log" in name or "embed" in name]
    assert projected(model, targets="in_proj") == ["backbone.layers.*.mixer.in_proj.weight"]  # no note: the caller has chosen


def test_repeated_layers_are_the_body_whatever_their_names() -> None:
    """A list of blocks, or a chain that repeats one; what comes before and after is not theirs."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.scale = nn.Linear(16, 16), nn.Linear(16, 1)

    for container in (nn.ModuleList, lambda blocks: nn.Sequential(*blocks)):
        model = nn.ModuleDict({"first": nn.Linear(2, 16), "body": container([Block(), Block()]), "read": nn.Linear(16, 2)})
        with pytest.warns(UserWarning, match="all its 2 linear layers"):
            assert projected(model) == ["body.*.mix.weight"]
    with pytest.warns(UserWarning, match=r"all its 2 linear layers .*\(\*\)"):
        assert projected(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))) == ["*.weight"]


# --- heads, computed weights, frozen layers -----------------------------------------------------------------------------------


def test_a_head_tied_to_the_embedding_is_the_embedding() -> None:
    """Left at full rank by None and "all-linear"; an untied one is a linear layer for "all-linear"; a pattern may name either."""
    for tied in (True, False):
        model = family("llama", intermediate_size=48, tie_word_embeddings=tied)
        assert not [name for name in projected(model) if "lm_head" in name or "embed" in name]
        everything = projected(model, targets="all-linear")
        assert ("lm_head.weight" in everything) is not tied
        assert "model.embed_tokens.weight" not in everything
        assert projected(model, targets="lm_head") == ["model.embed_tokens.weight" if tied else "lm_head.weight"]


def old_weight_norm(layer: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original"),
    "old weight_norm": (old_weight_norm, "weight_v"),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "weight_orig"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_the_matrix_behind_a_computed_weight_is_projected_and_trains(name: str) -> None:
    """It falls as an ordinary layer's: thirty steps take a third off the loss."""
    wrap, parameter = COMPUTED[name]
    model = nn.ModuleDict({"q_proj": wrap(nn.Linear(12, 8)), "head": nn.Linear(8, 3)})
    groups = galore_param_groups(model, 4)
    assert [key for key, _ in groups[-1]["params"]] == [f"q_proj.{parameter}"]
    optimizer = GaLoreAdamW(groups, lr=0.05, scale=1.0)
    X, Y = torch.randn(20, 12), torch.randn(20, 3)
    losses = []
    for _ in range(30):
        loss = (model["head"](model["q_proj"](X)) - Y).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert "basis" in optimizer.state[optimizer.param_groups[-1]["params"][0]]


def test_a_layer_that_is_frozen_at_first_trains_once_it_is_thawed() -> None:
    """As LISA does (arXiv 2403.17919): the groups hold frozen parameters, which have no state until they meet a gradient."""
    model = nn.ModuleDict({"q_proj": nn.Linear(12, 8), "up_proj": nn.Linear(8, 6)})
    model["q_proj"].requires_grad_(False)
    frozen = model["q_proj"].weight
    rest, low = galore_param_groups(model, 2)
    assert [name for name, _ in low["params"]] == ["q_proj.weight", "up_proj.weight"]
    optimizer = GaLoreAdamW([rest, low], lr=0.05)
    before = frozen.clone()

    def step() -> None:
        optimizer.zero_grad()
        model["up_proj"](model["q_proj"](torch.ones(4, 12))).square().mean().backward()
        optimizer.step()

    step()
    assert torch.equal(frozen, before)
    assert not optimizer.state.get(frozen)
    frozen.requires_grad_(True)
    step()
    assert not torch.equal(frozen, before)
    assert "basis" in optimizer.state[frozen]


def test_integers_are_in_no_group() -> None:
    """A frozen weight of packed 4-bit codes, as bitsandbytes keeps it, can never be trained."""
    model = nn.ModuleDict({"q_proj": nn.Linear(12, 8), "up_proj": nn.Linear(8, 6)})
    model["q_proj"].weight = nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)
    assert "q_proj.weight" not in [name for group in galore_param_groups(model, 2) for name, _ in group["params"]]


# --- coverage -----------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer whose widest weight is a bare matrix of an unknown name."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.table, self.A_log = nn.Linear(16, 16), nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) @ self.table


def test_coverage_counts_what_is_left_out_and_the_default_warns_below_80_percent() -> None:
    model = nn.ModuleList([Odd(), Odd()])
    with pytest.warns(UserWarning, match=r"2 of 4 matrices, 50 % of the body: the rest of ModuleList.*0\.table"):
        groups = galore_param_groups(model, 2)
    found = coverage(model, groups)
    assert (found.projected, found.matrices, found.share, found.enough) == (2, 4, 0.5, False)
    assert found.left_out == ("0.table", "1.table")
    assert coverage(model, GaLoreAdamW(groups).param_groups) == found
    some = coverage(model, galore_param_groups(model, 2, targets="0"))  # silent: the caller has chosen
    assert str(some) == "1 of 4 matrices, 25 % of the body"
    by_hand = coverage(model, [{"params": model.parameters(), "rank": 2}])
    assert (str(by_hand), by_hand.enough) == ("4 of 4 matrices, 100 % of the body", True)
    assert str(coverage(model, [{"params": model.parameters()}])) == "0 of 4 matrices, 0 % of the body"


def test_coverage_counts_linear_layers_outside_of_the_layers_but_no_head() -> None:
    """Here a projection of the input; the head is a layer as large as the embedding, where the model does not say which one it is."""
    block = nn.ModuleDict({"mlp": nn.Linear(16, 16)})
    model = nn.ModuleDict({"embed": nn.Embedding(40, 16), "project": nn.Linear(4, 16), "layers": nn.ModuleList([block])})
    model["head"] = nn.Linear(16, 40)
    found = coverage(model, galore_param_groups(model, 2))
    assert (str(found), found.left_out) == ("1 of 2 matrices, 80 % of the body", ("project.weight",))


def test_a_convolutional_model_hears_that_little_of_it_is_projected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 4))
    with pytest.warns(UserWarning, match="no layer of Sequential|1 of 3 matrices") as notes:
        galore_param_groups(model, 2)
    assert [str(note.message)[:31] for note in notes] == ["no layer of Sequential is named", "1 of 3 matrices, 9 % of the bod"]


class Named(nn.Module):
    """One block with a query, a value and a down projection."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        for name in ("q_proj", "v_proj", "down_proj"):
            setattr(block, name, nn.Linear(32, 32, bias=False))
        self.layers = nn.ModuleList([block])


def test_rank_factors_move_rank_between_layers_and_the_first_pattern_counts(capsys: pytest.CaptureFixture[str]) -> None:
    groups = galore_param_groups(Named(), 8, rank_factors={"q_proj": 0.5, "down|q": 2.0}, show=True)
    assert {name: group["rank"] for group in groups for name, _ in group["params"]} == {
        "layers.0.q_proj.weight": 4,
        "layers.0.v_proj.weight": 8,
        "layers.0.down_proj.weight": 16,
    }
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["rank 4", "rank 8", "rank 16"]
    fractions = galore_param_groups(Named(), 0.25, rank_factors={"down": 2})
    assert sorted(group["rank"] for group in fractions) == [0.25, 0.5]
    optimizer = GaLoreAdamW(groups, lr=0.01)
    assert sorted(optimizer.state[p]["basis"].shape[1] for p in optimizer.state) == [4, 8, 16]


@pytest.mark.parametrize(
    ("rank", "factors", "words"),
    [
        (8, {"k_proj": 0.5}, "'k_proj' matches none of the projected layers"),
        (8, {"proj": 0.5, "q_proj": 2}, "'q_proj' matches none .* that no pattern before it has matched"),
        (8, {"q_proj": 0}, "makes no rank of rank=8"),
        (8, {"q_proj": "half"}, "makes no rank of rank=8"),
        (0.5, {"q_proj": 2}, "makes no rank of rank=0.5"),
        ("full", {"q_proj": 2}, "makes no rank of rank='full'"),
    ],
)
def test_rank_factors_that_cannot_be_are_refused(rank: Any, factors: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        galore_param_groups(Named(), rank, rank_factors=factors)
