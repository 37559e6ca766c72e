"""Code written for galore-torch 1.0 runs unchanged: its README, its constructors, its group keys, its submodules.

Also the calls that frameworks make of it. Oracles: the published signatures, written out here, and plain linear algebra.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing import assert_close

import galore_torch
from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, galore_param_groups
from galore_torch.galore_projector import GaLoreProjector

# The published constructors: names and order.
SIGNATURES: dict[type[Optimizer], list[str]] = {
    GaLoreAdamW: ["params", "lr", "betas", "eps", "weight_decay", "correct_bias", "no_deprecation_warning"],
    GaLoreAdamW8bit: [
        *["params", "lr", "betas", "eps", "weight_decay", "amsgrad", "optim_bits", "args", "min_8bit_size"],
        *["percentile_clipping", "block_wise", "is_paged"],
    ],
    GaLoreAdafactor: [
        *["params", "lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay"],
        *["scale_parameter", "relative_step", "warmup_init"],
    ],
}
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}  # as every README of 1.0 has it, and the defaults
PUBLISHED = list(SIGNATURES)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.attn, self.mlp, self.norm = nn.Linear(160, 160, bias=False), nn.Linear(160, 192), nn.LayerNorm(192)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(self.attn(x).tanh())).square().sum(-1).sub(3.0).square().mean()


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 8, 160, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("cls", PUBLISHED)
def test_readme_two_groups(cls: type[Optimizer]) -> None:
    """The first snippet of the published README, with each of its three classes; 1.0's Adafactor refused it."""
    model = Net()
    galore_params = [model.attn.weight, model.mlp.weight]
    non_galore_params = [model.mlp.bias, *model.norm.parameters()]
    # fmt: off
    param_groups = [{'params': non_galore_params},
                    {'params': galore_params, 'rank': 128, 'update_proj_gap': 200, 'scale': 0.25, 'proj_type': 'std'}]
    optimizer = cls(param_groups, lr=0.01)
    # fmt: on
    losses = []
    for x in batches(1) * 6:
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[model.mlp.weight]["basis"].shape == (160, 128)


@pytest.mark.parametrize("cls", PUBLISHED)
@pytest.mark.filterwarnings("ignore:rank=128 is not smaller:UserWarning")
def test_readme_one_optimizer_a_parameter(cls: type[Optimizer]) -> None:
    """The published per-layer snippet, which gives every parameter a rank: 1.0 stopped at the first vector.

    Oracle: one optimizer over all parameters, stepped after the backward pass.
    """
    model, twin = Net(), Net()
    together = cls([{"params": list(twin.parameters()), **GALORE}], lr=0.01)
    # fmt: off
    optimizer_dict = {}
    for p in model.parameters():
        if p.requires_grad:
            optimizer_dict[p] = cls([{'params': p, 'rank': 128, 'update_proj_gap': 200, 'scale': 0.25, 'proj_type': 'std'}], lr=0.01)

    def optimizer_hook(p):
        if p.grad is None:
            return
        optimizer_dict[p].step()
        optimizer_dict[p].zero_grad()

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(optimizer_hook)
    # fmt: on
    for x in batches(3):
        model(x).backward()
        assert all(p.grad is None for p in model.parameters())
        twin(x).backward()
        together.step()
        together.zero_grad()
    assert_close(list(model.parameters()), list(twin.parameters()), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("cls", PUBLISHED)
def test_positional_arguments_keep_their_order(cls: type[Optimizer]) -> None:
    """Every published argument at its place, with its published default but for those that differences.md lists."""
    ours = inspect.signature(cls).parameters
    positional = [name for name, p in ours.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[cls]
    published = dict(
        betas=(0.9, 0.999),
        correct_bias=True,
        amsgrad=False,
        args=None,
        min_8bit_size=4096,
        percentile_clipping=100,
        block_wise=True,
        is_paged=False,
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=None,
        warmup_init=False,
        **({"lr": None, "eps": (1e-30, 1e-3), "weight_decay": 0.0} if cls is GaLoreAdafactor else {"lr": 1e-3}),
        **({"eps": 1e-6, "weight_decay": 0.0} if cls is GaLoreAdamW else {}),
    )
    assert {name: ours[name].default for name in ours if name in published} == {n: v for n, v in published.items() if n in ours}


def test_positional_arguments_arrive() -> None:
    p = [Parameter(torch.randn(6, 4))]
    group = GaLoreAdamW(p, 0.1, (0.8, 0.9), 1e-5, 0.3, False, True).param_groups[0]
    assert {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "correct_bias")} == {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-5,
        "weight_decay": 0.3,
        "correct_bias": False,
    }
    group = GaLoreAdamW8bit(p, 0.1, (0.8, 0.9), 1e-5, 0.3, False, 8, None, 16, 100, True, False).param_groups[0]
    assert (group["eps"], group["weight_decay"], group["state_codec"], group["min_8bit_size"]) == (1e-5, 0.3, "int8", 16)
    group = GaLoreAdafactor(p, 0.1, (1e-20, 1e-2), 2.0, -0.5, 0.9, 0.3, True, False, False).param_groups[0]
    names = (
        "lr",
        "eps",
        "clip_threshold",
        "decay_rate",
        "beta1",
        "weight_decay",
        "scale_parameter",
        "relative_step",
        "warmup_init",
    )
    assert tuple(group[k] for k in names) == (0.1, (1e-20, 1e-2), 2.0, -0.5, 0.9, 0.3, True, False, False)


@pytest.mark.parametrize("cls", PUBLISHED)
def test_the_signature_shows_the_projection(cls: type[Optimizer]) -> None:
    """Frameworks keep the keyword arguments that inspect.signature names and drop the others."""
    shown = inspect.signature(cls).parameters
    assert {"rank", "update_proj_gap", "scale", "proj_type", "foreach", "fused"} <= shown.keys()
    assert not [p for p in shown.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    given = {"lr": 0.1, "rank": 2, "epochs": 3}
    cls([Parameter(torch.randn(6, 4))], **{k: v for k, v in given.items() if k in shown})


@pytest.mark.parametrize("cls", PUBLISHED)
@pytest.mark.parametrize("extra", [{}, {"scale_parameter": False, "relative_step": False}, {"optim_bits": 8, "is_paged": False}], ids=str)
def test_calls_of_frameworks(cls: type[Optimizer], extra: dict[str, Any]) -> None:
    """transformers' Trainer: groups and lr, its per-layer form one parameter a group; LLaMA-Factory: optim_bits, is_paged, decay."""
    if extra.keys() - inspect.signature(cls).parameters.keys():
        pytest.skip("not passed to this class")
    p, bias = Parameter(torch.randn(160, 192)), Parameter(torch.randn(192))
    for groups in ([{"params": [bias]}, {"params": [p], **GALORE}], [{"params": [p], "weight_decay": 0.1, **GALORE}]):
        optimizer = cls(groups, lr=0.01, **extra)
        assert not optimizer.param_groups[0].get("relative_step")
        before = p.detach().clone()
        p.grad, bias.grad = torch.randn_like(p), torch.randn_like(bias)
        optimizer.step()
        assert not torch.equal(p, before)


def test_submodules_and_names() -> None:
    """from galore_torch.adamw import AdamW, and the like."""
    for module, name, ours in (
        ("adamw", "AdamW", GaLoreAdamW),
        ("adamw8bit", "AdamW8bit", GaLoreAdamW8bit),
        ("adafactor", "Adafactor", GaLoreAdafactor),
        ("galore_projector", "GaLoreProjector", GaLoreProjector),
    ):
        assert getattr(importlib.import_module(f"galore_torch.{module}"), name) is ours
    assert importlib.import_module("galore_torch.galore_projector_tensor").GaLoreProjectorTensor
    assert {"GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"} <= set(galore_torch.__all__)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12), (9, 1), (1, 9)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_projector_against_the_svd(proj_type: str, shape: tuple[int, int]) -> None:
    """project and project_back give scale x the best approximation of rank r; between refreshes, that of the old subspace."""
    rank, gap = min(3, *shape), 4
    projector = GaLoreProjector(rank, verbose=True, update_proj_gap=gap, scale=0.5, proj_type=proj_type)
    G, H = torch.randn(shape, dtype=torch.float64).float(), torch.randn(shape)
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    U, s, Vh = U[:, :rank].float(), s[:rank].float(), Vh[:rank].float()
    low = projector.project(G, 0)
    assert_close(projector.project_back(low), 0.5 * U @ torch.diag(s) @ Vh, rtol=1e-4, atol=1e-4)
    tall = shape[0] >= shape[1]
    left = proj_type in ("left", "full") or proj_type == ("reverse_std" if tall else "std")
    right = proj_type in ("right", "full") or not left
    assert low.shape == (rank if left else shape[0], rank if right else shape[1])
    kept = U @ U.T @ H if left else H
    kept = kept @ Vh.T @ Vh if right else kept
    assert_close(projector.project_back(projector.project(H, gap - 1)), 0.5 * kept, rtol=1e-4, atol=1e-4)
    projector.project(H, gap)
    fresh = GaLoreProjector(rank, proj_type=proj_type)
    assert_close(2 * projector.project_back(projector.project(H, gap + 1)), fresh.project_back(fresh.project(H, 0)), rtol=1e-4, atol=1e-4)


def test_projector_survives_a_file() -> None:
    """torch.load with its defaults accepts it, and it can project back at once."""
    projector = GaLoreProjector(2)
    low = projector.project(torch.randn(8, 5), 0)
    torch.save(projector, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file).project_back(low), projector.project_back(low))


@pytest.mark.parametrize("cls", PUBLISHED)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"])
def test_optimizers_can_be_copied(cls: type[Optimizer], copier: Any) -> None:
    """A copy goes on as the original does."""
    p = Parameter(torch.randn(12, 8))
    optimizer = cls([{"params": [p], "rank": 2}], lr=0.01)
    p.grad = torch.ones(12, 8)
    optimizer.step()
    twin = copier(optimizer)
    (q,) = twin.param_groups[0]["params"]
    for w, o in ((p, optimizer), (q, twin)):
        w.grad = torch.ones(12, 8).tril()
        o.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("cls", PUBLISHED)
def test_parameters_may_be_exchanged_before_the_first_step(cls: type[Optimizer]) -> None:
    """accelerate's FSDP2 does so: it writes new parameters into the groups. Oracle: an optimizer made on the new ones."""
    old, new, twin = (Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(i))) for i in (0, 1, 1))
    optimizer, fresh = cls([{"params": [old], "rank": 2}], lr=0.01), cls([{"params": [twin], "rank": 2}], lr=0.01)
    optimizer.param_groups[0]["params"] = [new]
    for p, o in ((new, optimizer), (twin, fresh)):
        p.grad = torch.ones(12, 8)
        o.step()
    assert torch.equal(new, twin)
    assert_close(optimizer.state_dict()["state"], fresh.state_dict()["state"], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("cls", PUBLISHED)
def test_flat_and_named_parameters(cls: type[Optimizer]) -> None:
    """A flat list, a generator, named parameters, and named groups train alike; names are kept."""
    runs = []
    for form in ("list", "generator", "named", "named groups"):
        model = Net()
        params: Any = {"list": list(model.parameters()), "generator": model.parameters()}.get(form, model.named_parameters())
        if form == "named groups":
            params = [{"params": list(model.named_parameters()), "rank": 16}]
        optimizer = cls(params, lr=0.01, rank=16)
        assert ("param_names" in optimizer.param_groups[0]) is form.startswith("named")
        for x in batches(2):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    for other in runs[1:]:
        assert_close(other, runs[0], rtol=0.0, atol=0.0)


TINY = {"vocab_size": 32, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("config", "model", "kwargs", "expected"),
    [
        ("LlamaConfig", "LlamaForCausalLM", {**TINY, "tie_word_embeddings": False}, 2 * 7),
        ("LlamaConfig", "LlamaForCausalLM", {**TINY, "tie_word_embeddings": True}, 2 * 7),
        ("BertConfig", "BertModel", TINY, 2 * 6),
        ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 32, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8}, 2 * 4),
    ],
    ids=["llama", "llama, tied", "bert", "gpt2"],
)
def test_groups_of_model_families(config: str, model: str, kwargs: dict[str, Any], expected: int, capsys: Any) -> None:
    """Each attention and MLP matrix is projected, nothing else is, and every parameter is in exactly one group."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    net = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
    rest, projected = galore_param_groups(net, 4, transport="keep", show=True)
    names = [name for name, _ in projected["params"]]
    assert len(names) == expected
    assert all(p.dim() == 2 for _, p in projected["params"])
    assert not [n for n in names if "embed" in n or "norm" in n.lower() or "head" in n or n.startswith("pooler")]
    assert sorted(names + [name for name, _ in rest["params"]]) == sorted(name for name, _ in net.named_parameters())
    assert {k: projected[k] for k in projected if k != "params"} == {"rank": 4, "proj_type": "std", "transport": "keep"}
    optimizer = GaLoreAdamW([rest, projected], lr=0.01)
    assert {k: optimizer.param_groups[1][k] for k in [*GALORE, "transport"]} == {**GALORE, "rank": 4, "transport": "keep"}
    assert sum("basis" in state for state in optimizer.state.values()) == expected
    ids = torch.arange(8).view(1, 8)
    output = net(input_ids=ids)
    (output.logits if hasattr(output, "logits") else output.last_hidden_state).square().mean().backward()
    optimizer.step()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["shape", "count", "elements", "trained"]
    cells = [re.fullmatch(r" *([\d x]+?) +(\d+) +([\d,]+)  (rank 4|full rank)", row).groups() for row in rows]
    assert sum(int(count) for _, count, _, how in cells if how == "rank 4") == expected
    assert sum(int(elements.replace(",", "")) for *_, elements, _ in cells) == sum(p.numel() for p in net.parameters())


def test_no_table_unless_asked(capsys: Any) -> None:
    galore_param_groups(Net(), 4)
    assert capsys.readouterr().out == ""
