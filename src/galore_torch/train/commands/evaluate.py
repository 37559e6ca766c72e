"""`galore eval`: the perplexity of any saved model on any text, read and tokenised as in training; and tasks of the harness."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from galore_torch.train.checkpoint.saved_model import hold_as_trained, load_weights, settings_of_run, weights_folder
from galore_torch.train.config.bounds import check_choice, check_number
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.settings import DTYPES
from galore_torch.train.data.check import check_data
from galore_torch.train.data.loader import TokenData, load_data, windows_in_order
from galore_torch.train.device import pick_device
from galore_torch.train.errors import UserError
from galore_torch.train.loop.result import perplexity

_ALL = 2**62  # tokens: more than any text has


@dataclass(frozen=True)
class Score:
    """What a model makes of a text: `loss` in nats per token, `bits_per_byte` of the text as the tokenizer gives it back."""

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float


def evaluate(
    source: str,
    *,
    data: tuple[str, ...] = (),
    text_field: str | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    eval_tokens: int | None = None,
    harness: tuple[str, ...] = (),
    limit: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Figures of the model that `source` means, as JSON has them: of the text `data`, and of each of the tasks `harness`.

    `max_length`: tokens in one window, each of which is predicted from those before it in its window; a tail shorter than one is left
    out. None: as the run was trained, 256 for a model that is of no run. `text_field` alike; of a run with --pad_documents a window is one
    document, cut or padded.
    `eval_tokens`: of the text, at most. `limit`: examples of a task, at most. `dtype`: None, as it was saved.
    """
    if not data and not harness:
        raise UserError("galore eval has nothing to do; give a text with --data FILE, or tasks with --harness TASKS")
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("eval_tokens", eval_tokens), ("limit", limit)):
        check_number(name, value, at_least=1)
    check_choice("dtype", dtype, DTYPES)
    if limit is not None and not harness:
        raise UserError(f"--limit {limit} has no effect without --harness; leave it out, or shorten the text with --eval_tokens")
    device = pick_device(device)
    folder = weights_folder(source)
    trained = settings_of_run(folder)
    max_length = max_length or trained.get("max_length") or 256
    text = _read(folder, data, trained, text_field, max_length, eval_tokens) if data else None
    if harness:
        from galore_torch.train.commands.lm_eval import check_harness

        check_harness()
    model = _model(folder, dtype, device)
    found: dict[str, Any] = {"model": str(folder), "dtype": str(model.dtype).removeprefix("torch."), "device": device}
    if text is not None:
        figures = asdict(score(model, text, max_length, batch_size, device))
        found |= {"data": list(data), "max_length": max_length, "pad_documents": text.held_out.dim() == 2, **figures}
    if harness:
        from galore_torch.train.commands.lm_eval import run_harness

        found["harness"] = run_harness(model, folder, harness, batch_size, limit)
    return found


def score(model: Any, text: TokenData, length: int, batch_size: int, device: str) -> Score:
    """The validation tokens of `text`, evaluated as in training: the sum of their losses over their number."""
    import torch

    from galore_torch.train.loop.evaluate import held_out_loss
    from galore_torch.train.model.loss import IGNORED, TokenLoss

    windows = list(windows_in_order(text.held_out, length, batch_size))
    found = held_out_loss(TokenLoss(model, None, batch_size * length), windows, device)
    assert found is not None, "nobody asks it to stop"
    loss, tokens = found
    ids = torch.cat([targets[targets != IGNORED] for _, targets in windows])
    written = text.tokenizer.fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Score(loss, perplexity(loss), tokens, loss * tokens / math.log(2) / max(1, len(written.encode())))


def _read(
    folder: Path, data: tuple[str, ...], trained: dict[str, Any], text_field: str | None, max_length: int, eval_tokens: int | None
) -> TokenData:
    """The text as `galore pretrain --eval_data` reads it; also as training text, of which one sequence is enough."""
    config = PretrainConfig(
        hf_model=str(folder),
        data=data,
        eval_data=data,
        text_field=text_field or trained.get("text_field") or "text",
        pad_documents=bool(trained.get("pad_documents")),
        max_length=max_length,
        batch_size=1,
        num_training_steps=1,
        eval_tokens=_ALL if eval_tokens is None else eval_tokens,
        given=frozenset({"text_field"} if text_field else ()),
    )
    check_data(config)
    return load_data(config)


def _model(folder: Path, dtype: str | None, device: str) -> Any:
    import torch

    model = load_weights(folder)
    if dtype is None:
        hold_as_trained(model, folder)
    else:
        for p in model.parameters():  # not the buffers: the angles of positions stay exact
            p.data = p.data.to(getattr(torch, DTYPES[dtype]))
    return model.to(device)


def show(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"model          {found['model']} ({found['dtype']} on {found['device']})"]
    if "loss" in found:
        places = "padded documents" if found["pad_documents"] else "windows"
        lines += [
            f"text           {', '.join(found['data'])}",
            f"tokens         {found['tokens']:,} in {places} of {found['max_length']}",
            f"loss           {found['loss']:.4f} nats per token",
            f"perplexity     {found['perplexity']:,.3f}",
            f"bits per byte  {found['bits_per_byte']:.4f}",
        ]
    for task, metrics in found.get("harness", {}).items():
        lines += [f"{task:14} {name} {value:.4f}" for name, value in metrics.items()]
    return "\n".join(lines)
