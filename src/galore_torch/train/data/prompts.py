"""Supervised fine-tuning: prompts with their answers, or whole conversations, as tokens of which the answers' alone are targets."""

from __future__ import annotations

import heapq
from typing import Any

import torch

from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.own_files import own_rows
from galore_torch.train.data.readers import encodable
from galore_torch.train.data.sequences import Sequences
from galore_torch.train.data.tables import Row
from galore_torch.train.data.tasks import TaskData
from galore_torch.train.data.tokenizer import TextTokenizer, load_tokenizer
from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.loss import IGNORED

Example = tuple[list[int], list[int]]  # (tokens, the same with IGNORED in place of what is no answer)
_ANSWERS = ("response", "completion")


def load_prompts(config: FinetuneConfig) -> TaskData:
    """Read and tokenise --train_file and --validation_file: rows with prompt and response, or with messages."""
    rows = own_rows(config)
    tokenizer = load_tokenizer(config.tokenizer_name or "").within(config.shape.vocab_size)
    sets = {key: _sequences(found, tokenizer, config, "train" if key == "train" else "validation") for key, found in rows.items()}
    train = sets.pop("train")
    return TaskData(train, sets, tokenizer, config.shape.vocab_size, ", ".join(config.train_file), None)


def _sequences(rows: list[Row], tokenizer: TextTokenizer, config: FinetuneConfig, name: str) -> Sequences:
    length = config.max_length
    examples = [_cut(example(row, tokenizer), length) for row in rows]
    kept = [found for found in examples if any(target != IGNORED for target in found[1][1:])]
    if not kept:
        raise UserError(f"none of the {len(rows)} {name} examples has an answer within --max_length {length} tokens; give a larger one")
    groups = packed([len(ids) - 1 for ids, _ in kept], length) if config.packing else [[index] for index in range(len(kept))]
    inputs: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    lengths = [0]
    for group in groups:
        for index in group:
            ids, own = kept[index]
            inputs += ids[:-1]
            targets += own[1:]
            positions += range(len(ids) - 1)
        lengths.append(sum(len(kept[index][0]) - 1 for index in group))
    fields = {"input_ids": torch.tensor(inputs, dtype=torch.int32)}
    if config.packing:  # where they begin anew another example begins, which is what transformers masks by
        fields["position_ids"] = torch.tensor(positions, dtype=torch.int32)
    starts = torch.tensor(lengths).cumsum(0)
    # Causal attention: what is padded behind a text is not seen by it.
    return Sequences(fields, starts, torch.tensor(targets, dtype=torch.int32), dict.fromkeys(fields, 0), left_out=len(rows) - len(kept))


def example(row: Row, tokenizer: TextTokenizer) -> Example:
    """A row as tokens: by the tokenizer's chat template where there is one, else prompt, response and the end of the text."""
    where, cells = row
    fast, asked = tokenizer.fast, 0
    if "messages" in cells:
        messages = _messages(where, "messages", cells["messages"])
    else:
        answer = next((name for name in _ANSWERS if name in cells), None)
        if "prompt" not in cells or answer is None:
            raise UserError(f"{where} has {', '.join(map(repr, cells))}; a row needs prompt and response, or messages")
        if isinstance(cells["prompt"], list):  # a conversation, and how it goes on
            messages = _messages(where, "prompt", cells["prompt"], answered=False)
            asked = len(messages)
            messages += _messages(where, answer, cells[answer])
        else:
            prompt, response = _text(where, "prompt", cells["prompt"]), _text(where, answer, cells[answer])
            if not fast.chat_template:
                seam = "" if prompt[-1:].isspace() or response[:1].isspace() or not prompt else "\n"
                start = len(prompt + seam)
                return _tokens(fast, prompt + seam + response, [(start, start + len(response))], special=True, end=tokenizer.end_id)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    if not fast.chat_template:
        raise UserError(f"{where} has messages, but the tokenizer {tokenizer.source} has no chat template; give prompt and response")
    text, spans = _rendered(where, fast, messages, asked)
    return _tokens(fast, text, spans, special=False, end=None)


def packed(lengths: list[int], room: int) -> list[list[int]]:
    """Groups of examples by number whose `lengths` add up to `room` at most: the longest first, each to the group with most room."""
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (-room left, group)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if rooms and -rooms[0][0] >= lengths[index]:
            left, group = heapq.heappop(rooms)
            groups[group].append(index)
        else:
            left, group = -room, len(groups)
            groups.append([index])
        heapq.heappush(rooms, (left + lengths[index], group))
    return groups


def chat_text(where: str, fast: Any, messages: list[dict[str, str]], **how: Any) -> str:
    """The messages as the tokenizer's chat template writes them."""
    try:
        return str(fast.apply_chat_template(messages, tokenize=False, **how))
    except Exception as error:  # a template raises what it likes
        raise UserError(f"{where}: the chat template refuses the messages: {first_line(error)}") from error


def _rendered(where: str, fast: Any, messages: list[dict[str, str]], asked: int) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and from where to where the assistant speaks; the first `asked` messages are given to it."""
    text, spans = chat_text(where, fast, messages), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= asked:
            before = chat_text(where, fast, messages[:index], add_generation_prompt=True)
            through = chat_text(where, fast, messages[: index + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"{where}: the chat template changes earlier turns when a later one is added, so that answer {index} has no place of "
                    "its own; give one question and answer in a row"
                )
            begins = len(before)
            if before == chat_text(where, fast, messages[:index]):  # no prompt of the template's: what it writes first is no answer
                begins = max(begins, through.find(message["content"].strip(), begins))
            spans.append((begins, len(through)))
    return text, spans


def _tokens(fast: Any, text: str, spans: list[tuple[int, int]], *, special: bool, end: int | None) -> Example:
    text = encodable(text)
    found = fast(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    targets = [token if _holds_any(spans, *place) else IGNORED for token, place in zip(ids, found["offset_mapping"], strict=True)]
    if end is not None:
        if ids and ids[-1] == end and targets[-1] == IGNORED:  # the tokenizer has added it
            targets[-1] = end
        else:
            ids, targets = [*ids, end], [*targets, end]
    return ids, targets


def _holds_any(spans: list[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether the token of text[start:stop] holds a character of a span, be it only its last: " w" may be one token, and the space the
    prompt's. Tokenizers that trim spaces place a space of its own at (stop, stop), right behind it, and every special token at (0, 0).
    """
    return any(first < stop and min(start, stop - 1) < last for first, last in spans)


def _cut(found: Example, length: int) -> Example:
    return found[0][: length + 1], found[1][: length + 1]


def _messages(where: str, name: str, value: Any, *, answered: bool = True) -> list[dict[str, str]]:
    good = isinstance(value, list) and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)
    if not good or (answered and not any(one["role"] == "assistant" for one in value)):
        own = ", one of them the assistant's" if answered else ""
        raise UserError(f'{where}: {name} must be a list of {{"role": ..., "content": ...}}{own}')
    return [{"role": str(one["role"]), "content": _content(where, one["content"])} for one in value]


def _content(where: str, value: Any) -> str:
    """Text, or a list of parts that are text."""
    if not isinstance(value, list):
        return _text(where, "content", value)
    kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in value]
    if strange := next((kind for kind in kinds if kind != "text"), None):
        raise UserError(f"{where}: content has a part of type {strange!r}; only parts of type 'text' can be trained on")
    return "".join(_text(where, "text", part.get("text")) for part in value)


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {type(value).__name__}, not text")
    return value
