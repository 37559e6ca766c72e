"""Q-GaLore through checkpoints, exports and changes of dtype and device: every code comes back."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.ops.int8_weight import Int8Weight
from support.q_galore_models import model, optimizer_of, same, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, "project", "update"])
def test_resume_is_bit_exact_through_torch_save_with_its_default_load(mode: str | None, dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, Any]:
        m = model(dtype)
        optimizer = optimizer_of(m)
        if mode:
            g.fused_backward(m, optimizer, mode)
        return m, optimizer

    straight, a = build()
    train(straight, a, range(11))
    first, b = build()
    train(first, b, range(6))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": b.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only is its default
    second, c = build()
    train(second, c, range(2))  # a used optimizer forgets what it was
    second.load_state_dict(saved["model"])
    c.load_state_dict(saved["optimizer"])
    train(second, c, range(6, 11))
    assert same(straight, second)
    for p, q in zip(straight.parameters(), second.parameters(), strict=True):
        for key, value in a.state[p].items():
            assert value == c.state[q][key] if isinstance(value, int) else torch.equal(value, c.state[q][key]), key


def test_parameters_and_seeds_make_the_rounding() -> None:
    """Two equal parameters round differently, two equal runs alike."""
    W = torch.randn(16, 256)
    runs = []
    for _ in range(2):
        pair = [nn.Parameter(Int8Weight.quantize(W)) for _ in range(2)]
        optimizer = g.QGaLoreAdamW8bit(pair, lr=0.01, rank=4)
        for p in pair:
            p.grad = W.cos()
        optimizer.step()
        runs.append([p.codes for p in pair])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(*runs[0])


def small(model_type: str = "llama", **config: Any) -> Any:
    """A quantised causal language model in bf16."""
    transformers = pytest.importorskip("transformers", reason="the files are read back with transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    made = transformers.AutoConfig.for_model(model_type, **{**sizes, **config})
    return g.quantize_linears(transformers.AutoModelForCausalLM.from_config(made).to(torch.bfloat16))


def assert_loads_as(m: nn.Module, folder: Any) -> Any:
    """`AutoModel` reads ordinary bf16 weights from the folder: those that the quantised model computes with."""
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for p, q in zip(m.parameters(), again.parameters(), strict=True):
        assert type(q) is nn.Parameter
        assert torch.equal(p.dequantize() if isinstance(p, Int8Weight) else p, q)
    return again


@pytest.mark.parametrize("made_floating", [False, True])
def test_a_model_exports_to_ordinary_safetensors_that_transformers_loads(tmp_path: Any, made_floating: bool) -> None:
    m = small(intermediate_size=88)
    coded = {name for name, p in m.named_parameters() if isinstance(p, Int8Weight)}
    assert len(coded) == 2 * 7
    assert all("self_attn" in name or "mlp" in name for name in coded)
    assert {type(m.get_output_embeddings().weight), type(m.get_input_embeddings().weight)} == {nn.Parameter}
    tokens = torch.randint(0, 64, (2, 16))
    optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(m, 8), lr=0.01)
    m(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    with torch.no_grad():
        expected = m(input_ids=tokens).logits
    (g.dequantize_linears(m) if made_floating else m).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = assert_loads_as(m, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, expected, atol=0.05, rtol=0.05)


def test_a_tied_model_saves_too(tmp_path: Any) -> None:
    """GPT-2: Conv1D layers, and a head that is the embedding."""
    m = small("gpt2", bos_token_id=0, eos_token_id=0)
    assert sum(isinstance(p, Int8Weight) for p in m.parameters()) == 2 * 4
    m.save_pretrained(tmp_path)
    assert_loads_as(m, tmp_path)


def test_safetensors_own_functions(tmp_path: Any) -> None:
    """save_model writes decoded weights, load_model quantises them again; save_file, which copies nothing, says what to do."""
    st = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    m = model()
    m.append(nn.Linear(6, 6))
    m.append(nn.Linear(6, 6))
    m[6].weight = m[5].weight
    g.quantize_linears(m, targets="^[56]$")
    st.save_model(m, tmp_path / "model.safetensors")
    saved = st.load_file(tmp_path / "model.safetensors")
    for name, p in m.named_parameters():
        assert torch.equal(saved[name], p.dequantize() if isinstance(p, Int8Weight) else p)
    nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in m.parameters())), m.parameters())
    m.load_state_dict(saved)
    for name, p in m.named_parameters():
        expected = Int8Weight.quantize(saved[name]).dequantize() if isinstance(p, Int8Weight) else saved[name]
        assert torch.equal(p.dequantize() if isinstance(p, Int8Weight) else p, expected)
    with pytest.raises(ValueError, match=r"non contiguous.*contiguous\(\)"):
        st.save_file(m.state_dict(), tmp_path / "other.safetensors")


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_checkpoints_of_the_hugging_face_trainer(tmp_path: Any) -> None:
    """A checkpoint is an ordinary bf16 model, and a run goes on from it with INT8 weights."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    m = small(intermediate_size=88)
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(0, 64, (16,))
    data = [{"input_ids": tokens, "labels": tokens}] * 8

    def trainer(steps: int) -> Any:
        optimizer = g.QGaLoreAdamW8bit(g.galore_param_groups(m, 8), lr=0.01)
        options = {"per_device_train_batch_size": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=steps, **options)
        return Trainer(model=m, args=arguments, train_dataset=data, optimizers=(optimizer, None))

    trainer(2).train()
    assert_loads_as(m, tmp_path / "checkpoint-2")
    trainer(4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum(isinstance(p, Int8Weight) for p in m.parameters()) == 2 * 7
    assert_loads_as(m, tmp_path / "checkpoint-4")


def test_changing_the_dtype_changes_no_code_and_the_same_optimizer_goes_on() -> None:
    m = model()
    optimizer = optimizer_of(m)
    train(m, optimizer, range(2))
    coded = [p for p in m.parameters() if isinstance(p, Int8Weight)]
    codes = [p.codes.clone() for p in coded]
    m.to(torch.bfloat16)
    assert all(p is q for p, q in zip(coded, (p for p in m.parameters() if p.dim() == 2), strict=True))
    assert all(p.dtype == torch.bfloat16 and torch.equal(p.codes, c) for p, c in zip(coded, codes, strict=True))
    train(m, optimizer, range(2, 4))
    assert not any(torch.equal(p.codes, c) for p, c in zip(coded, codes, strict=True))
