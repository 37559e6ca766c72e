"""Models, tokenizers and examples for tests of fine-tuning: tiny, made here, and learnable."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

NOUNS = [f"w{index}" for index in range(40)]
WORDS = [*NOUNS, "good", "bad", "even", "and", "user", "bot", ":", "a", "b"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"


def tokenizer(*, pad: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """A word is a token. With `pad` as BERT has it: [CLS] text [SEP], and pairs by type; without, as a decoder: nothing is added."""
    words = [*SPECIAL, *WORDS, "assistant"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pad:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    names: dict[str, Any] = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if pad else {"eos_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pad else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", model_input_names=inputs, chat_template=CHAT if chat else None, **names
    )


def bert(folder: Path, **changes: Any) -> str:
    """A BERT of width 32, saved with its tokenizer; without dropout unless `changes` says otherwise."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**{"vocab_size": 60, **sizes, **still, **changes})).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def llama(folder: Path, *, chat: bool = False, **changes: Any) -> str:
    """A LLaMA of width 32 and a tokenizer without a padding token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**{"vocab_size": 60, **sizes, "eos_token_id": 3, "bos_token_id": 2, **changes})).save_pretrained(folder)
    tokenizer(pad=False, chat=chat).save_pretrained(folder)
    return str(folder)


def roberta(folder: Path) -> str:
    """A RoBERTa of width 32: texts take the 64 positions behind number 1, which is its padding token's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 66}
    RobertaModel(RobertaConfig(vocab_size=60, type_vocab_size=2, pad_token_id=1, **sizes)).save_pretrained(folder)
    words = tokenizer()
    words.pad_token = "[UNK]"
    words.save_pretrained(folder)
    return str(folder)


def xlnet(folder: Path) -> str:
    """An XLNet of width 32, which has no bound of positions and answers by the last place."""
    torch.manual_seed(0)
    XLNetModel(XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=2, d_inner=48, dropout=0.0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def sentence(draw: random.Random) -> tuple[str, int]:
    """A sentence of 3 to 14 words, and 1 where it says good, 0 where it says bad, twice."""
    words = draw.choices(NOUNS[:8], k=draw.randint(1, 12))
    label = draw.randrange(2)
    for _ in range(2):
        words.insert(draw.randint(0, len(words)), ("bad", "good")[label])
    return " ".join(words), label


def examples(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as MRPC's: sentence1, sentence2, label, idx; the second sentence says which label it is."""
    draw = random.Random(seed)
    rows = []
    for index in range(number):
        text, label = sentence(draw)
        rows.append({"sentence1": " ".join(draw.choices(NOUNS[:8], k=2)), "sentence2": text, "label": label, "idx": index})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def glue(folder: Path, task: str = "mrpc", train: int = 64, dev: int = 24) -> str:
    """A folder with the files of one pair task."""
    write(folder / task / "train.jsonl", examples(train))
    write(folder / task / "dev.jsonl", examples(dev, seed=1))
    return str(folder)
