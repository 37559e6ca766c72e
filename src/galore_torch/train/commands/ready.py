"""What can be refused of a run before torch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from galore_torch.train.checkpoint.run_folder import check_save_dir
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.check import check_data
from galore_torch.train.data.tables import check_tables
from galore_torch.train.device import check_device
from galore_torch.train.errors import UserError


def check_ready(config: PretrainConfig) -> None:
    """UserError for missing files, a device that is not here, and a folder that holds something."""
    if isinstance(config, FinetuneConfig):
        check_tables(config.train_file, "--train_file")
        check_tables(config.validation_file, "--validation_file")
        if config.data_dir is not None and not Path(config.data_dir).is_dir():
            raise UserError(f"--data_dir {config.data_dir} is no folder; give the one with the task's files")
    else:
        check_data(config)
    check_device(config.device)
    for flag in ("tokenizer", "resume"):
        path = getattr(config, flag)
        if path is not None and path.startswith(("/", "./", "../")) and not Path(path).exists():
            raise UserError(f"--{flag} {path} does not exist; give the path of one that does")
    if config.resume is None:
        check_save_dir(config.save_dir)
