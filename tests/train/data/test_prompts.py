"""Prompts with answers: which tokens are targets, what is packed, and that packed examples do not see each other."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from galore_torch import cli
from galore_torch.train.commands.finetune import finetune, read
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.prompts import example, load_prompts, packed
from galore_torch.train.data.sequences import Sequences
from galore_torch.train.data.tokenizer import load_tokenizer, trained_tokenizer
from galore_torch.train.errors import UserError
from galore_torch.train.loop.evaluate import held_out_loss
from galore_torch.train.loop.tasks import task_for
from galore_torch.train.model.loss import IGNORED, TokenLoss, attends_across, counted
from galore_torch.train.plan.answer import plan_request
from support import tasks
from support.whole_runs import assert_same_run, rows

Make = Callable[..., FinetuneConfig]


def questions(number: int) -> list[dict[str, Any]]:
    """The answer is the prompt's first word, once or twice."""
    draw = random.Random(0)
    found = []
    for _ in range(number):
        words = draw.choices(tasks.NOUNS[:8], k=draw.randint(1, 6))
        found.append({"prompt": " ".join(words), "response": " ".join([words[0]] * draw.randint(1, 2))})
    return found


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def config(examples: list[dict[str, Any]], *, chat: bool = False, **changes: Any) -> FinetuneConfig:
        path = tasks.write(tmp_path / "train.jsonl", examples)
        settings: dict[str, Any] = {"hf_model": tasks.llama(tmp_path / "llama", chat=chat), "task_name": "prompts", "device": "cpu"}
        settings |= {"train_file": (path,), "max_length": 32, "batch_size": 8, "rank": 4, "save_dir": str(tmp_path / "run")}
        return FinetuneConfig(**(settings | changes))

    return config


def spoken(config: FinetuneConfig, cells: dict[str, Any]) -> tuple[str, str]:
    """(all of an example, what of it is a target) as text."""
    tokenizer = load_tokenizer(config.hf_model or "")
    ids, targets = example(("line 1", cells), tokenizer)
    names = tokenizer.fast.convert_ids_to_tokens
    return " ".join(names(ids)), " ".join(names([target for target in targets if target != IGNORED]))


def test_answer_and_the_end_are_the_targets(make: Make) -> None:
    config = make(questions(4))
    assert spoken(config, {"prompt": "w1 w2", "response": "w3 w4"}) == ("w1 w2 w3 w4 [SEP]", "w3 w4 [SEP]")
    assert spoken(config, {"prompt": "", "completion": "w3"}) == ("w3 [SEP]", "w3 [SEP]")


def test_chat_template_makes_the_text(make: Make) -> None:
    """Of several turns each of the assistant's is a target, with the mark that ends it."""
    config = make(questions(4), chat=True)
    assert spoken(config, {"prompt": "w1", "response": "w2"}) == ("user : w1 [SEP] assistant : w2 [SEP]", "w2 [SEP]")
    turns = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, targets = spoken(config, {"messages": messages})
    assert text == "user : w1 [SEP] assistant : w2 w3 [SEP] user : w4 [SEP] assistant : w5 [SEP]"
    assert targets == "w2 w3 [SEP] w5 [SEP]"


def test_a_template_without_a_generation_prompt_keeps_its_header_out_of_the_loss(make: Make) -> None:
    """Oracle: the same template with one."""
    config = make(questions(4), chat=True)
    tokenizer = load_tokenizer(config.hf_model or "")
    plain = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
    turns = [
        {"role": role, "content": content}
        for role, content in (("user", "w1"), ("assistant", "w2 w3"), ("user", "w2"), ("assistant", "w2"))
    ]
    found = []
    for template in (plain, plain + "{% if add_generation_prompt %}assistant : {% endif %}"):
        tokenizer.fast.chat_template = template
        found.append(example(("line 1", {"messages": turns}), tokenizer))
    assert found[0] == found[1]
    assert sum(target != IGNORED for target in found[0][1]) == len(["w2", "w3", "[SEP]", "w2", "[SEP]"])


def test_conversations_in_two_parts_and_content_in_parts(make: Make) -> None:
    """Answers in the prompt are given, not targets."""
    config = make(questions(4), chat=True)
    told = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]
    said = [{"role": "assistant", "content": [{"type": "text", "text": "w4 "}, {"type": "text", "text": "w5"}]}]
    text, targets = spoken(config, {"prompt": told, "completion": said})
    assert text == "user : w1 [SEP] assistant : w2 [SEP] user : w3 [SEP] assistant : w4 w5 [SEP]"
    assert targets == "w4 w5 [SEP]"


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", ["the cat ", "the cat", "the cat:\n", ""])
@pytest.mark.parametrize("answer", ["sat", " sat  on ", "\n  é sat", "the"])
def test_every_token_with_a_character_of_the_answer_is_a_target(prompt: str, answer: str, chat: bool, trimmed: bool) -> None:
    """Where a space and the word behind it are one token too, as in byte-level tokenizers, whether or not they say so in their offsets.

    Oracle: the tokens' lengths in bytes, added up; a token's name has one letter a byte.
    """
    from tokenizers import processors

    tokenizer = trained_tokenizer(["the cat sat on the mat . user: assistant: "] * 9, 300)
    fast = tokenizer.fast
    fast.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trimmed)
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}" if chat else None
    if fast.chat_template:
        fast.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    ids, targets = example(("line 1", {"prompt": prompt, "response": answer}), tokenizer)
    seam = "" if prompt[-1:].isspace() or answer[:1].isspace() or not prompt else "\n"
    before = f"user: {prompt}<|endoftext|>assistant: " if chat else prompt + seam
    first, stop = len(before.encode()), 0
    for token, target in zip(ids, targets, strict=True):
        stop += len(fast.convert_ids_to_tokens(token))
        assert (target != IGNORED) == (stop > first), f"{fast.convert_ids_to_tokens(token)} up to {stop}"
    assert fast.decode(ids).startswith(before + answer)
    assert stop == first + len(f"{answer}<|endoftext|>".encode())
    assert targets[-1] == tokenizer.end_id


@pytest.mark.parametrize(
    ("cells", "chat", "says"),
    [
        ({"prompt": "w1"}, False, "a row needs prompt and response, or messages"),
        ({"prompt": 1, "response": "w2"}, False, "prompt is int, not text"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, False, "has no chat template; give prompt and response"),
        ({"messages": "w1"}, True, "messages must be a list of"),
        ({"prompt": [{"role": "user", "content": "w1"}], "completion": "w2"}, True, "completion must be a list of"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "w2"}, True, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "w1"}]}, True, "one of them the assistant's"),
    ],
)
def test_bad_row_says_where(cells: dict[str, Any], chat: bool, says: str, make: Make) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl line 2") as caught:
        load_prompts(make([{"prompt": "w1", "response": "w2"}, cells, {"prompt": "w1", "response": "w2"}], chat=chat))
    assert says in str(caught.value)


def test_template_that_rewrites_earlier_turns_is_refused(make: Make) -> None:
    config = make(questions(2), chat=True)
    tokenizer = load_tokenizer(config.hf_model or "")
    tokenizer.fast.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="has no place of its own"):
        example(("line 1", {"prompt": "w1", "response": "w2"}), tokenizer)


def test_long_examples_are_cut_and_those_without_an_answer_left_out(make: Make) -> None:
    examples = [{"prompt": "w1 " * 40, "response": "w2"}, *questions(3), {"prompt": "w1", "response": "w2 " * 50}]
    data = load_prompts(
        make(examples, validation_file=(tasks.write(Path(make(examples).train_file[0]).with_name("dev.jsonl"), questions(2)),))
    )
    assert (len(data.train), data.train.left_out) == (4, 1)
    assert max(data.train.lengths) == 32
    with pytest.raises(UserError, match="none of the 9 train examples has an answer within --max_length 32"):
        load_prompts(make([{"prompt": "w1 " * 40, "response": "w2"}] * 10))


def test_long_contexts_are_no_matter_of_the_tokens_to_evaluate_on(make: Make, tmp_path: Path) -> None:
    """--eval_tokens is no flag of galore finetune: it evaluates on examples."""
    long = tasks.llama(tmp_path / "long", max_position_embeddings=131072)
    assert make(questions(4), hf_model=long, max_length=70000).max_length == 70000


def test_packed_groups_fill_the_room_and_hold_each_once() -> None:
    sizes = torch.randint(1, 30, (200,)).tolist()
    groups = packed(sizes, 32)
    assert sorted(index for group in groups for index in group) == list(range(200))
    fills = [sum(sizes[index] for index in group) for group in groups]
    assert max(fills) <= 32
    assert sum(fills) / (32 * len(groups)) > 0.85


def gradients(model: nn.Module, examples: Sequences) -> tuple[float, dict[str, torch.Tensor]]:
    loss = TokenLoss(model)
    model.zero_grad()
    inputs, targets = examples.batch(range(len(examples)))
    total = loss(inputs, targets)
    total.backward()
    return total.item() / counted(targets), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("eval_batch_size", [2, 32])
def test_evaluation_has_no_more_logits_at_once_than_the_setting(eval_batch_size: int, make: Make) -> None:
    """Its batches may be larger than those of training; the plan is of the same loss."""
    config, data = read(make(questions(60), batch_size=2, max_length=16, eval_batch_size=eval_batch_size, loss_chunk=40))
    model = AutoModelForCausalLM.from_pretrained(config.hf_model, use_cache=False)
    loss, whole = task_for(config, data).loss(model), TokenLoss(model)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    evaluated = held_out_loss(loss, data.held_out[""].in_order(eval_batch_size), "cpu")
    assert max(rows, default=0) <= 40
    assert evaluated == pytest.approx(held_out_loss(whole, data.held_out[""].in_order(eval_batch_size), "cpu"), rel=1e-5)
    assert plan_request(config, device="cpu").chunk == loss.chunk == (0 if eval_batch_size == 2 else 40)


def test_packed_examples_do_not_see_each_other(make: Make) -> None:
    """The loss and every gradient of packed sequences are those of the examples one by one."""
    apart, together = (load_prompts(make(questions(30), packing=packing)) for packing in (False, True))
    assert len(together.train) < len(apart.train) / 2
    model = AutoModelForCausalLM.from_pretrained(make(questions(30)).hf_model, use_cache=False)
    assert not attends_across(model)
    (loss, mine), (expected, theirs) = gradients(model, together.train), gradients(model, apart.train)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_model_that_would_let_them_is_refused(make: Make, tmp_path: Path) -> None:
    """OPT counts positions by its mask: texts in one sequence are one text to it."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    OPTForCausalLM(OPTConfig(vocab_size=60, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "opt")
    tasks.tokenizer(pad=False).save_pretrained(tmp_path / "opt")
    config, _ = read(make(questions(20), packing=True, hf_model=str(tmp_path / "opt")))
    if not attends_across(AutoModelForCausalLM.from_pretrained(tmp_path / "opt")):
        pytest.skip("this transformers tells them apart in OPT too")
    with pytest.raises(UserError, match="the examples of one sequence see each other"):
        finetune(config, Console(file=io.StringIO()))


def test_encoder_is_no_language_model(make: Make, tmp_path: Path) -> None:
    """transformers loads it as one, and it would read each answer that it is to predict."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=60, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "bert")
    tasks.tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"bert is no causal language model: BertLMHeadModel sees the tokens .*; give a decoder"):
        finetune(make(questions(20), hf_model=str(tmp_path / "bert")), Console(file=io.StringIO()))


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_answers_are_learnt_and_a_run_goes_on(packing: bool, make: Make, tmp_path: Path) -> None:
    """The validation loss is of answers alone; stopped at half way and resumed the run is the same."""
    from galore_torch.train.loop.trainer import train
    from support.whole_runs import Silent

    common: dict[str, Any] = {"packing": packing, "lr": 1e-2, "num_training_steps": 40, "eval_every": 10, "update_proj_gap": 5}
    assert finetune(make(questions(60), **common, save_dir=str(tmp_path / "whole")), Console(file=io.StringIO())) == 0
    found = [row for row in rows(tmp_path / "whole") if "eval_loss" in row]
    assert found[-1]["eval_loss"] < 0.7 * found[0]["eval_loss"]

    class Until(Silent):
        at = 0

        def step(self, row: dict[str, Any], total: int) -> None:
            self.at = row["step"]

        def should_stop(self) -> bool:
            return self.at >= 15

    config, data = read(make(questions(60), **common, save_dir=str(tmp_path / "parts"), resume="auto"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "config.json").write_text("{}")
    train(config, "galore_adamw", 1e-2, data, tmp_path / "parts", Until())
    assert finetune(config, Console(file=io.StringIO())) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert cli.main(["generate", str(tmp_path / "whole"), "--prompt", "w1 w2", "--max_new_tokens", "4"]) == 0


@pytest.mark.parametrize("source", ["", "model", "checkpoints/step-000001"])
@pytest.mark.parametrize("how", ["first token", "chat"])
def test_generate_asks_as_the_run_was_trained(
    how: str, source: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the token that begins a text, or in the user's turn of the chat template. Oracle: an example's tokens before its answer."""
    from tokenizers import processors
    from transformers import LlamaForCausalLM

    config = make(questions(8), chat=how == "chat", num_training_steps=1)
    tokenizer = tasks.tokenizer(pad=False, chat=how == "chat")
    if how == "first token":
        tokenizer.bos_token = "[CLS]"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", 2)])
        tokenizer.save_pretrained(config.hf_model or "")
    assert finetune(config, Console(file=io.StringIO())) == 0
    ids, targets = example(("line 1", {"prompt": "w1 w2", "response": "w3"}), load_tokenizer(config.hf_model or ""))
    asked = [token for token, target in zip(ids, targets, strict=True) if target == IGNORED]
    seen: list[list[int]] = []
    answer = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda self, prompt, **how: seen.append(prompt[0].tolist()) or answer(self, prompt, **how)
    )
    assert cli.main(["generate", str(tmp_path / "run" / source), "--prompt", "w1 w2", "--max_new_tokens", "2"]) == 0
    assert seen == [asked]
    assert capsys.readouterr().out.startswith("user : w1 w2" if how == "chat" else "w1 w2")
    assert len(asked) == (7 if how == "chat" else 3)
