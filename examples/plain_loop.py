"""A byte-level language model in a loop of your own. Needs torch alone: python examples/plain_loop.py"""

import sys
from pathlib import Path

import torch
from torch import nn

from galore_torch import GaLoreAdamW8bit, fused_backward, galore_param_groups

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
WIDTH, LENGTH = 128, 64


class ByteModel(nn.Module):
    """A two-layer Transformer that predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0, batch_first=True, norm_first=True)
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (batch, length) -> (batch, length, 256)
        hidden = self.embed(ids) + self.place.weight[: ids.shape[1]]
        future = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.layers(hidden, mask=future, is_causal=True))


torch.manual_seed(0)
text = torch.tensor(list(Path(torch.nn.functional.__file__).read_bytes()))  # any text: here torch's own source
device = "cuda" if torch.cuda.is_available() else "cpu"
model = ByteModel().to(device)

groups = galore_param_groups(model, rank=32, update_proj_gap=50, show=True)  # attention and MLP weights; the rest trains in full
optimizer = GaLoreAdamW8bit(groups, lr=0.01)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=STEPS + 1, cycle_momentum=False)
fused_backward(model, optimizer)  # full gradients are freed as they are made; leave the line out and nothing else changes

for step in range(STEPS):
    starts = torch.randint(len(text) - LENGTH - 1, (16, 1))
    window = text[starts + torch.arange(LENGTH + 1)].to(device)
    loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    if step % 50 == 0 or step == STEPS - 1:
        print(f"step {step}: loss {loss.item():.3f}, gradient norm {norm.item():.2f}")

torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
