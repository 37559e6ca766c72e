"""`galore export`: a run's weights as an ordinary transformers folder, which nothing of this package is needed to load."""

from __future__ import annotations

import re
from pathlib import Path

from galore_torch.train.checkpoint.saved_model import is_of_run, load_tokenizer, load_weights, weights_folder
from galore_torch.train.checkpoint.storage import plain_failures, whole_folder
from galore_torch.train.config.bounds import check_choice
from galore_torch.train.errors import UserError

EXPORT_DTYPES = ("bfloat16", "float32", "float16")
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(source: str, destination: str, *, dtype: str | None = None, max_shard_size: str = "5GB") -> str:
    """Write safetensors, configs and tokenizer of a run or checkpoint to a new folder; returns what was written, in one line.

    dtype: of the weights (None: as they were trained). max_shard_size: bytes in one file at most, unless one tensor has more.
    The folder gets its name when it is whole. UserError: nothing was written, and the source is never changed.
    """
    import torch

    target = Path(destination)
    check_choice("dtype", dtype, EXPORT_DTYPES)
    shard = _bytes(max_shard_size)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} already exists and is not an empty folder; name a new one, or move that one away")
    folder = weights_folder(source)
    if not is_of_run(folder):
        raise UserError(f"{source} is no run or checkpoint of galore pretrain, but a model's folder already; it loads as it is")
    if Path(source).resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside {source}, which stays as it is; name a folder outside of it")

    model, tokenizer = load_weights(folder, classifiers=True), load_tokenizer(folder)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
        if worst := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
            raise UserError(f"--dtype {dtype} cannot hold {worst}: it has values that are not finite there; choose bfloat16 or float32")
    model.config.use_cache = True  # off in training, where it is of no use; without it text is generated at a crawl
    with plain_failures("the export", target.parent, "export again"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as temporary:
            model.save_pretrained(temporary, max_shard_size=shard)
            tokenizer.save_pretrained(temporary)
            if target.exists():
                target.rmdir()
    parameters = sum(p.numel() for p in model.parameters())
    kind = str(model.dtype).removeprefix("torch.")
    return f"{target}: {type(model).__name__}, {parameters:,} parameters in {kind}, from {folder}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]B)", text.strip().upper())
    size = round(float(match[1]) * _SIZES[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size {text!r} is no size; give a number above 0 with its unit, such as 500MB or 5GB")
    return size
