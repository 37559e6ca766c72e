"""A Fourier neural operator, trained by neuraloperator's own Trainer with Tensor-GaLore in place of its optimizer.

    pip install galore-torch neuraloperator
    python examples/neural_operator.py [EPOCHS]

It learns u from f in -laplace u = f on a periodic square. The spectral weights are complex tensors of four dimensions: their optimizer
state is that of a core with a quarter of the elements. Everything else trains at full rank.
"""

import sys
import warnings

import torch
from torch.utils.data import DataLoader, Dataset

from galore_torch import TensorGaLoreAdamW

warnings.filterwarnings("ignore")  # of what neuraloperator imports
from neuralop import H1Loss, LpLoss, Trainer  # noqa: E402
from neuralop.models import FNO  # noqa: E402


class Poisson(Dataset):
    """Smooth random right-hand sides f and the solutions u, samples of 1 x 32 x 32."""

    def __init__(self, samples: int, seed: int, size: int = 32):
        k = torch.fft.fftfreq(size, 1 / size)
        square = k[:, None] ** 2 + k[None, : size // 2 + 1] ** 2
        noise = torch.randn(samples, 1, size, size, generator=torch.Generator().manual_seed(seed))
        f = torch.fft.rfft2(noise) * 20 / (square + 9)
        f[..., 0, 0] = 0
        self.x = torch.fft.irfft2(f, s=(size, size))
        self.y = torch.fft.irfft2(20 * f / square.clamp_min(1), s=(size, size))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
torch.manual_seed(0)
model = FNO(n_modes=(12, 12), hidden_channels=16, in_channels=1, out_channels=1, n_layers=2)
spectral = [p for p in model.parameters() if p.is_complex()]
rest = [p for p in model.parameters() if not p.is_complex()]
optimizer = TensorGaLoreAdamW([{"params": rest}, {"params": spectral, "rank": 0.25, "update_proj_gap": 50, "scale": 1.0}], lr=5e-3)
test = DataLoader(Poisson(32, seed=1), batch_size=16)
metrics = Trainer(model=model, n_epochs=epochs, device="cpu").train(
    train_loader=DataLoader(Poisson(128, seed=0), batch_size=16, shuffle=True),
    test_loaders={"test": test},
    optimizer=optimizer,
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    training_loss=H1Loss(d=2),
    eval_losses={"l2": LpLoss(d=2, p=2)},
)
print(f"relative L2 error {float(metrics['test_l2']):.4f} after {epochs} epochs")
