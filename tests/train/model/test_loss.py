"""The chunked loss against the whole one: the same numbers from one chunk's logits at a time, and the model left as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import TokenData
from galore_torch.train.errors import UserError
from galore_torch.train.loop.trainer import train
from galore_torch.train.model.chunked_loss import IGNORED, head_loss
from galore_torch.train.model.llama import ModelShape, build_model
from galore_torch.train.model.loss import TokenLoss
from support.memory import peak_bytes

Make = Callable[..., PretrainConfig]
SHAPE = ModelShape(16, 24, 2, 2, 64, 50)


class Watching:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, row: dict[str, Any], total: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def should_stop(self) -> bool:
        return False


def llama(shape: ModelShape = SHAPE, dtype: str = "float64", checkpointing: bool = False) -> Any:
    return build_model(shape, seed=0, dtype=dtype, bos_token_id=None, eos_token_id=None, activation_checkpointing=checkpointing)


def tokens(vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    """3 sequences of 11: (inputs, targets); the targets of some are padding, among them a whole chunk of 5."""
    ids = torch.randint(0, vocabulary, (3, 12))
    targets = ids[:, 1:].clone()
    targets[0, 3:] = IGNORED
    targets[2, 5] = IGNORED
    return ids[:, :-1], targets


def gradients(model: nn.Module, chunk: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradient of each parameter) of the mean loss: an upstream gradient other than 1."""
    model.zero_grad()
    loss = TokenLoss(model, chunk)(inputs, targets) / 20
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunk", [1, 5, 33, 100])
def test_head_loss_is_torchs_cross_entropy_in_float64(chunk: int) -> None:
    """The function alone, with gradients of both its inputs."""
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (33, 50))
    targets = tokens()[1].flatten()
    whole = nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    chunked = head_loss(hidden, weight, targets, chunk)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    for mine, theirs in zip(torch.autograd.grad(chunked, (hidden, weight)), torch.autograd.grad(whole, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_llama_are_those_of_whole_logits(tied: bool, checkpointing: bool) -> None:
    """All parameters, with padding, with activation checkpointing, and where embedding and head are one matrix."""
    shape = ModelShape(16, 24, 2, 2, 64, 50, extras=(("tie_word_embeddings", tied),))
    model = llama(shape, checkpointing=checkpointing)
    (loss, grads), (oracle, expected) = (gradients(model, chunk, *tokens_of) for tokens_of in [tokens()] for chunk in (5, 0))
    assert len(grads) == len(expected) == len(list(model.parameters()))
    torch.testing.assert_close(loss, oracle, rtol=1e-13, atol=0)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_that_of_whole_logits(dtype: str) -> None:
    """Against float64 of the same weights. Each gradient is a sum of at most 33 terms of which every one is rounded a few times: the
    chunked error is held to that of the whole computation plus 4 roundings of the largest entry."""
    torch.manual_seed(1)
    weight, hidden = torch.randn(300, 16), torch.randn(33, 16)
    targets = torch.randint(0, 300, (33,))

    def run(chunk: int, kind: torch.dtype) -> list[Tensor]:
        h, w = (x.to(getattr(torch, dtype)).to(kind).requires_grad_() for x in (hidden, weight))
        logits = (h @ w.T).to(torch.promote_types(kind, torch.float32)) if not chunk else None
        loss = head_loss(h, w, targets, chunk) if logits is None else nn.functional.cross_entropy(logits, targets, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss / 33, (h, w))]

    exact = run(0, torch.float64)
    eps = torch.finfo(getattr(torch, dtype)).eps
    chunked, whole = run(4, getattr(torch, dtype)), run(0, getattr(torch, dtype))
    assert chunked[0].dtype == torch.float32, "a sum of thousands of nats has no place in bfloat16"
    for mine, theirs, truth in zip(chunked, whole, exact, strict=True):
        error, allowed = (mine - truth).abs().max(), (theirs - truth).abs().max() + 4 * eps * truth.abs().max()
        assert error <= allowed


def test_the_heads_gradient_arrives_once() -> None:
    """What the hooks of per-layer updates need, tied or not."""
    for tied in (False, True):
        model = llama(ModelShape(16, 24, 1, 2, 64, 50, extras=(("tie_word_embeddings", tied),)))
        calls: list[Tensor] = []
        model.get_output_embeddings().weight.register_post_accumulate_grad_hook(calls.append)
        gradients(model, 5, *tokens())
        assert len(calls) == 1


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    targets = torch.tensor([1, 2, 3, 4, 5, 8])
    for trained, frozen in ((weight, hidden), (hidden, weight)):
        trained.requires_grad_(True)
        head_loss(hidden, weight, targets, 4).backward()
        assert trained.grad is not None
        assert frozen.grad is None
        trained.requires_grad_(False).grad = None
    with torch.no_grad():
        assert not head_loss(hidden.requires_grad_(), weight, targets, 4).requires_grad


def test_peak_memory_is_that_of_a_chunk() -> None:
    """On the allocator's log, vocabulary 4000, width 16, 512 tokens in chunks of 32: at most two chunks' logits and each gradient twice,
    far below whole logits."""
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(4000, 16, requires_grad=True)
    targets = torch.randint(0, 4000, (512,))

    def step(chunk: int) -> None:
        hidden.grad = weight.grad = None
        (head_loss(hidden, weight, targets, chunk) / 512).backward()

    step(32)
    logits, grads = 4 * 512 * 4000, 4 * (512 + 4000) * 16
    peak = peak_bytes(lambda: step(32))
    assert peak <= 2 * logits / 16 + 2 * grads + 100_000
    assert peak < logits / 4
    assert peak_bytes(lambda: step(512)) >= logits, "whole logits have to show for this test to see anything"


@pytest.mark.parametrize("settings", [{}, {"total_batch_size": 8}, {"grad_clipping": 0.1}])
@pytest.mark.parametrize(
    "name",
    ["adamw", "galore_adamw", "galore_adamw_per_layer", "galore_adamw8bit_per_layer", "qgalore_adamw8bit", "low_rank", "lora", "relora"],
)
def test_a_run_learns_the_same_in_chunks(
    name: str, settings: dict[str, Any], make_config: Make, token_data: TokenData, tmp_path: Path
) -> None:
    """Losses and validation losses of six steps, chunks of 7 tokens beside whole logits; all modes of per-layer updates."""
    if name == "relora":
        settings = settings | {"cycle_length": 3, "warmup_steps": 1}
    results = []
    for chunk in (7, 0):
        config = make_config(optimizer=name, rank=4, loss_chunk=chunk, lr=0.01, **settings)
        result, _ = train(config, name, 0.01, token_data, tmp_path, Watching())
        assert result.status == "finished"
        results.append([loss for _, loss in result.losses + result.evals])
    # 8-bit moments may take the neighbouring code
    assert results[0] == pytest.approx(results[1], rel=1e-3 if "8bit" in name else 2e-5)


def test_small_logits_are_whole_and_bit_equal_to_before(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """The default: 256 MiB of float32 logits are far more than this batch has, so nothing has changed."""
    lines = []
    for chunk in (None, 0, 64):  # 64 is all the tokens of a forward pass
        train(make_config(loss_chunk=chunk), "adamw", 0.01, token_data, tmp_path, Watching())
        lines.append([json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line])
    assert lines[0] == lines[1] == lines[2]
    model = llama(ModelShape(8, 8, 1, 2, 64, 32000), "float32")
    assert TokenLoss(model, None, 2**28 // (4 * 32000)).chunk == 0
    assert TokenLoss(model, None, 4096).chunk == 2**28 // (4 * 32000) == 2097


def test_looking_at_the_head_changes_nothing() -> None:
    """Neither the mode of the model nor the random numbers that dropout will draw."""
    model = llama().train()
    before = torch.get_rng_state()
    assert TokenLoss(model, 4).chunk == 4
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def odd_heads() -> dict[str, Any]:
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    biased = llama(dtype="float32")
    biased.lm_head = nn.Linear(16, 50)
    return {
        "changes the logits after its head": Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, pad_token_id=0)),
        "CohereForCausalLM changes": CohereForCausalLM(CohereConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        "a Linear with a bias": biased,
    }


def test_heads_that_do_more_keep_whole_logits_and_say_so(
    make_config: Make, token_data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps its logits, Cohere scales them, a bias shifts them: the loss stays the model's own."""
    for said, model in odd_heads().items():
        chunked, (inputs, targets) = TokenLoss(model, 4), tokens()
        assert said in chunked.whole_because
        assert torch.equal(chunked(inputs, targets), TokenLoss(copy.deepcopy(model), 0)(inputs, targets))
    monkeypatch.setattr("galore_torch.train.model.loss._why_not_linear", lambda *_: "it is odd")
    watcher = Watching()
    train(make_config(loss_chunk=4), "adamw", 0.01, token_data, tmp_path, watcher)
    assert watcher.warnings == ["all logits of a forward pass exist at once, for it is odd"]


def test_negative_chunk_is_refused() -> None:
    with pytest.raises(UserError, match=r"--loss_chunk -1 is out of bounds: give a number at least 0"):
        PretrainConfig(loss_chunk=-1)


def mixture(vocab_size: int = 50, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("mixtral", vocab_size=vocab_size, router_aux_loss_coef=0.5, **shape, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_training_adds_the_balancing_loss_that_the_config_asks_for() -> None:
    """The oracle is the model's own loss with labels, which holds it; the evaluated loss is cross-entropy alone."""
    model, ids = mixture(output_router_logits=True), torch.randint(0, 50, (3, 12))
    own = model(input_ids=ids[:, :-1], labels=ids[:, :-1])  # balancing depends on the inputs alone
    plain = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss = TokenLoss(model, 5, 33).train()
    assert "balancing" in loss.whole_because
    summed = loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(summed, plain + 33 * 0.5 * own.aux_loss)
    torch.testing.assert_close(loss.auxiliary, 33 * 0.5 * own.aux_loss.detach())
    summed.backward()
    router = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    assert router.grad.abs().max() > 0
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(loss.train(mode)(ids[:, :-1], ids[:, 1:]), plain)


def test_no_balancing_loss_where_the_config_does_not_ask() -> None:
    loss = TokenLoss(mixture(), 5, 33)
    assert loss.auxiliary_weight == 0
    assert loss.chunk == 5


def test_balancing_loss_has_a_row_of_its_own(make_config: Make, token_data: TokenData, tmp_path: Path) -> None:
    """metrics.jsonl: loss is the cross-entropy, aux_loss what was trained on beside it."""
    folder = tmp_path / "moe"
    mixture(300, output_router_logits=True).save_pretrained(folder)
    config = make_config(model_config="demo", hf_model=str(folder), num_training_steps=1, batch_size=2, total_batch_size=4)
    (tmp_path / "run").mkdir()
    train(config, "adamw", 1e-3, token_data, tmp_path / "run", Watching())
    before, row = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][:2]
    assert row["loss"] == pytest.approx(before["eval_loss"], abs=0.1)  # both near log 300, as no token has been learnt
    assert 0.5 <= row["aux_loss"] / 2 < 1.5  # 0.5 times what is 2 where the 2 of 8 experts are chosen evenly
