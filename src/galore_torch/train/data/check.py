"""What can be refused of the data before any of it is read. Imports no torch."""

from __future__ import annotations

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.settings import is_hub_name
from galore_torch.train.data.readers import check_files, has_fields, text_files
from galore_torch.train.data.sources import hub_source
from galore_torch.train.errors import UserError


def check_data(config: PretrainConfig) -> None:
    """Everything about the data that can be refused without reading it."""
    for names, flag in ((config.data, "--data"), (config.eval_data, "--eval_data")):
        if any(map(is_hub_name, names)):
            if len(names) > 1:
                raise UserError(f"{flag} {' '.join(names)}: a data set of the hub stands alone; leave the others out")
            hub_source(names[0], flag, "train", config.text_field)
        else:
            check_files(text_files(names, flag), flag)
    if config.eval_data and not config.data:
        raise UserError("--eval_data is given without --data; give the training text too")
    if config.stream and not config.data:
        raise UserError("--stream has no effect without --data; leave it out, or name files")
    names = config.data + config.eval_data
    if "text_field" in config.given and not (any(map(is_hub_name, names)) or has_fields(text_files(names, "--data"))):
        raise UserError(
            f"--text_field {config.text_field} has no effect without a .jsonl or .parquet file; leave it out, or give such a file"
        )
