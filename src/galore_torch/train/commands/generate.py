"""`galore generate`: text from a model, for a look at what it has learnt. Generating is transformers' own."""

from __future__ import annotations

from typing import Any

from galore_torch.train.checkpoint.saved_model import is_of_run, load_tokenizer, load_weights, settings_of_run, weights_folder
from galore_torch.train.config.bounds import check_number
from galore_torch.train.data.prompts import chat_text
from galore_torch.train.device import pick_device
from galore_torch.train.errors import UserError

_LEAST = 1e-3  # of temperatures above 0: the model's logits, divided by much less, are beyond a float


def generate(
    source: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    count: int = 1,
    device: str = "auto",
) -> list[str]:
    """`count` texts that go on from `prompt`, which each begins with; a text ends early where the model ends it.

    Of a run that `galore finetune` has trained on prompts by a chat template, `prompt` is what the user says, and a text is the whole
    conversation.

    temperature 0 always takes the likeliest token. top_k: only the k likeliest tokens are drawn from, 0: all of them. The same
    seed gives the same texts, on the same device with the same versions.
    """
    import torch
    from transformers import GenerationConfig

    _check(max_new_tokens, temperature, top_k, seed, count)
    device = pick_device(device)
    folder = weights_folder(source)
    model, tokenizer = load_weights(folder), load_tokenizer(folder)
    trained = settings_of_run(folder)
    asked = trained.get("task_name") == "prompts" and bool(tokenizer.chat_template)
    if asked:  # as each prompt of the run's examples
        prompt = chat_text("--prompt", tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    bare = asked or (is_of_run(folder) and "task_name" not in trained)
    ids = torch.tensor([_prompt_ids(tokenizer, prompt, bare=bare)])
    if (past := int(ids.max())) >= (rows := model.get_input_embeddings().num_embeddings):
        what = tokenizer.convert_ids_to_tokens(past)
        raise UserError(f"--prompt spells the token {what}, number {past}, but the model has {rows} rows; leave it out")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and ids.shape[1] + max_new_tokens > positions:
        raise UserError(
            f"the {ids.shape[1]} tokens of --prompt and --max_new_tokens {max_new_tokens} are more than the {positions} positions "
            "of the model; give fewer"
        )
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0} if temperature else {"do_sample": False}
    end = model.generation_config.eos_token_id
    settings = GenerationConfig(
        **how,
        max_new_tokens=max_new_tokens,
        num_return_sequences=count,
        eos_token_id=end,
        pad_token_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        use_cache=True,  # a checkpoint's config says no, as training has no use for it
    )
    torch.manual_seed(seed)
    ids = ids.to(device)
    texts = model.to(device).generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [tokenizer.decode(text, skip_special_tokens=True) for text in texts]


def _check(max_new_tokens: int, temperature: float, top_k: int, seed: int, count: int) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("top_k", top_k, 0), ("count", count, 1)):
        check_number(name, value, at_least=least)
    check_number("temperature", temperature, at_least=0)
    if 0 < temperature < _LEAST:
        raise UserError(f"--temperature {temperature} is out of bounds: give a number at least {_LEAST}, or 0 for the likeliest token")
    check_number("seed", seed, at_least=0, at_most=2**63 - 1)
    if count > 1 and not temperature:
        raise UserError(f"--count {count} at --temperature 0 would be one text {count} times; give a temperature above 0, or no --count")


def _prompt_ids(tokenizer: Any, prompt: str, *, bare: bool) -> list[int]:
    """The prompt's tokens. `bare`: without special tokens, which a model of `galore pretrain` has not seen, and which a chat template has
    written already; others get their first one."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    first = tokenizer.bos_token_id
    if not bare and first is not None and tokenizer(prompt).input_ids[:1] == [first]:
        return [first, *ids]
    if ids:
        return ids
    if tokenizer.eos_token_id is None:
        raise UserError("--prompt has no tokens, and the tokenizer has none that begins a text; give some words")
    return [tokenizer.eos_token_id]  # in training a new document follows it
