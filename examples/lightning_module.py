"""PyTorch Lightning. Needs lightning: python examples/lightning_module.py"""

import sys
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from galore_torch import GaLoreAdamW8bit, fused_backward, galore_param_groups

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
WIDTH, LENGTH = 64, 32


class NextByte(lightning.LightningModule):
    """Predicts the byte that follows 32 others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, 256)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        hidden = self.layer(self.embed(batch[:, :-1]))  # (batch, 32, width)
        loss = nn.functional.cross_entropy(self.head(hidden.mean(1)), batch[:, -1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = GaLoreAdamW8bit(galore_param_groups(self, rank=16, update_proj_gap=50), lr=0.01)
        fused_backward(self, optimizer)  # full gradients are freed as they are made; clipping and accumulation go on working
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


lightning.seed_everything(0, verbose=False)
text = torch.tensor(list(Path(torch.nn.functional.__file__).read_bytes()))
windows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
trainer = lightning.Trainer(
    max_steps=STEPS,
    gradient_clip_val=1.0,
    accumulate_grad_batches=2,
    accelerator="auto",
    devices=1,
    log_every_n_steps=10,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
trainer.fit(NextByte(), DataLoader(list(windows), batch_size=16, shuffle=True))
print(f"loss {trainer.callback_metrics['loss'].item():.3f}")
