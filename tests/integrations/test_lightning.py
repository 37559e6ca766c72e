"""Lightning: accumulation, clipping, bf16, fused modes, and a resume that sees the same batches. Oracles: an uninterrupted run, and AdamW.

In the middle of an epoch Lightning restores the place in the data only of a loader that has a state, as torchdata's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import galore_torch as g
from integrations.compare import STEPS, WINDOWS, compare
from support.hf_runs import RANK, difference, llama, windows

FRAMEWORK, PACKAGE = "Lightning", "lightning"
BATCH = 4


class Module(lightning.LightningModule):
    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.make = llama(), make

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    folder: Path, make: Any, resume: bool = False, loader: type = StatefulDataLoader, count: int = WINDOWS, **options: Any
) -> nn.Module:
    """The model after STEPS updates, or after those from the checkpoint at half of them."""
    lightning.seed_everything(3, verbose=False)
    middle = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1, enable_version_counter=False
    )
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[middle],
        **options,
    )
    data = loader([torch.tensor(each["input_ids"]) for each in windows(count)], batch_size=BATCH, shuffle=True)
    module = Module(make)
    trainer.fit(module, data, ckpt_path=folder / f"step={STEPS // 2}.ckpt" if resume else None, weights_only=True)
    assert trainer.global_step == STEPS
    return module.model


def adam(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def galore(kind: Any = g.GaLoreAdamW, fused: str | None = None) -> Any:
    def make(model: nn.Module) -> Any:
        optimizer = kind(g.galore_param_groups(model, **RANK, scale=1.0), lr=0.01)
        if fused:
            g.fused_backward(model, optimizer, fused)
        return optimizer

    return make


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda **options: fit(tmp_path_factory.mktemp("adamw"), adam, **options))


BOTH = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "`GaLoreAdamW`": (galore(), {}),
    "`GaLoreAdamW8bit`": (galore(g.GaLoreAdamW8bit), {}),
    "`GaLoreAdafactor`": (galore(g.GaLoreAdafactor), {}),
    "accumulation and clipping": (galore(), BOTH),
    "clipping by value": (galore(), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": (galore(), {"precision": "bf16-mixed"}),
    "bf16-true": (galore(), {"precision": "bf16-true"}),
    "`fused_backward` project with accumulation and clipping": (galore(fused="project"), BOTH),
    "`fused_backward` direct with accumulation and clipping": (galore(fused="direct"), BOTH),
    "`fused_backward` update": (galore(fused="update"), {}),
}


@pytest.mark.parametrize("feature", WAYS)
def test_trains_and_resumes(feature: str, tmp_path: Path, adamw: Any, record: Any) -> None:
    """In the middle of an epoch, the batches of the uninterrupted run."""
    make, options = WAYS[feature]
    models = [fit(tmp_path, make, resume, **options) for resume in (False, True)]
    compare(record, feature, *models, adamw(**options))


def test_resume_at_the_end_of_an_epoch(tmp_path: Path, adamw: Any, record: Any) -> None:
    """A plain DataLoader does, where its order is drawn from the epoch: half of the steps are one epoch."""
    options: dict[str, Any] = {"count": BATCH * STEPS // 2, "loader": ordered}
    models = [fit(tmp_path, galore(), resume, **options) for resume in (False, True)]
    compare(record, "a plain `DataLoader` in one order, resumed between epochs", *models, adamw(**options))


def ordered(data: Any, batch_size: int, shuffle: bool) -> Any:
    return DataLoader(data, batch_size=batch_size, shuffle=False)


def test_resume_in_an_epoch_of_a_plain_loader_sees_other_batches(tmp_path: Path, record: Any) -> None:
    """Whatever the optimizer: torch's AdamW is the control."""
    apart = []
    for name, make in (("adamw", adam), ("galore", galore())):
        models = [fit(tmp_path / name, make, resume, loader=DataLoader) for resume in (False, True)]
        apart.append(difference(*models))
    assert min(apart) > 0.0
    record(
        "a plain `DataLoader` resumed within an epoch",
        "wrong",
        note="other batches, with torch's AdamW too; Lightning warns",
        resume=apart[1],
    )


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_mode_update_refuses_what_needs_all_gradients(options: dict[str, Any], tmp_path: Path, record: Any) -> None:
    with pytest.raises(RuntimeError, match="consumed inside the backward pass"):
        fit(tmp_path, galore(fused="update"), **options)
    record(f"`fused_backward` update with `{next(iter(options))}`", "refused")
