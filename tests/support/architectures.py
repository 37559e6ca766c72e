"""Small models of many architectures, and one function that takes a command through one of them: works, or refused in one line.

Shared by tests/train/test_architectures.py and benchmarks/architectures/run.py, which writes docs/architectures.md.
"""

from __future__ import annotations

import io
import json
import shutil
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from support.texts import document

VOCABULARY = 300
# Of every config; keys that a class does not know stay attributes without effect.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
    "gpt_bigcode": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon": {"head_dim": None},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "olmo": {},
    "olmo2": {},
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1], **_MAMBA2},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2, **_MAMBA2}
    | {"shared_intermediate_size": 48, "position_embedding_type": "rope"},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2},
    "deepseek_v3": {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    | {
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "chunk_size": 16}
    | {"ssm_state_size": 8},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1, "n_mamba_heads": 4}
    | {"mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 16, "use_mamba_kernels": False, "attention_hidden_size": 64}
    | {"attention_head_dim": 32, "kv_channels": 16, "adapter_rank": 8},
    "hunyuan_v1_dense": {},
    "ernie4_5": {},
    "glm4": {"partial_rotary_factor": 0.5},
}
OPTIMIZERS = ("adamw", "galore_adamw", "galore_adamw8bit", "qgalore_adamw8bit", "galore_adamw_per_layer", "muon", "lora")
STEPS = ("plan", "pretrain", "checkpointing", "resume", "export", "generate")


class Outcome(NamedTuple):
    """What a command did. ``words``: the one line of a refusal, or the first of what went wrong."""

    status: str  # works, refused, fails, or skipped: what it needs was refused before
    words: str = ""
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.status != "fails"


def make_model(name: str, folder: Path) -> Path:
    """A folder with an untrained model and a tokenizer of 300 tokens, as `--hf_model` takes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    keys = {
        key: value
        for key, value in {**_COMMON, **ARCHITECTURES[name]}.items()
        if value is not None or key in ("bos_token_id", "pad_token_id")
    }
    config = AutoConfig.for_model(name, **keys)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator([document(i) for i in range(40)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": document(i)}) for i in range(40)))
    return folder


def try_steps(model: Path, optimizer: str, runs: Path) -> dict[str, Outcome]:
    """Each step of `STEPS` with this model and optimizer, through the command line; what is written stays in ``runs``."""
    run, again, text = runs / optimizer, runs / f"{optimizer}-recomputed", str(model / "text.jsonl")
    train = ["pretrain", "--hf_model", str(model), "--data", text, "--optimizer", optimizer, "--num_training_steps", "2", "--device", "cpu"]
    train += [
        "--max_length",
        "16",
        "--batch_size",
        "2",
        "--eval_every",
        "0",
        "--eval_tokens",
        "64",
        "--warmup_steps",
        "1",
        "--lr",
        "1e-3",
        "--save_every",
        "1",
    ]
    rank = [] if optimizer in ("adamw", "muon") else ["--rank", "4"]
    outcomes = {"plan": command("plan", "--model", str(model), "--optimizer", optimizer, "--max_length", "16", *rank)}
    outcomes["pretrain"] = command(*train, *rank, "--save_dir", str(run))
    outcomes["checkpointing"] = command(*train, *rank, "--activation_checkpointing", "--save_dir", str(again))
    if outcomes["pretrain"].status != "works":
        return outcomes | {step: Outcome("skipped") for step in ("resume", "export", "generate")}
    trained = _weights(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    shutil.rmtree(run / "model")
    outcomes["resume"] = _same(command(*train, *rank, "--save_dir", str(run), "--resume", "auto"), trained, run / "model")
    exported = runs / f"{optimizer}-exported"
    outcomes["export"] = _same(command("export", str(run), str(exported)), trained, exported)
    outcomes["generate"] = command("generate", str(run), "--prompt", "the cat", "--max_new_tokens", "4", "--device", "cpu")
    return outcomes


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same(outcome: Outcome, trained: dict[str, Any], folder: Path) -> Outcome:
    """Resuming and exporting work where the weights are, bit for bit, those that the run had ended with."""
    if outcome.status != "works":
        return outcome
    found = _weights(folder)
    other = [name for name in trained if name not in found or not found[name].equal(trained[name])]
    return Outcome("fails", f"{len(other)} of {len(trained)} weights differ, such as {other[0]}") if other else outcome


def command(*words: str) -> Outcome:
    """Run `galore` in this process. A refusal is exit code 2 and one line on stderr; anything else than that or 0 fails."""
    from galore_torch import cli

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(action="ignore"):
            code = cli.main(list(words))
    except Exception as error:
        return Outcome("fails", f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())
    said = [line for line in err.getvalue().splitlines() if line.strip()]
    if code == 0:
        return Outcome("works")
    if code == 2 and said and said[-1].startswith("galore: "):
        return Outcome("refused", said[-1].removeprefix("galore: "))
    return Outcome("fails", f"exit code {code}: {said[-1] if said else 'nothing said'}", err.getvalue())
