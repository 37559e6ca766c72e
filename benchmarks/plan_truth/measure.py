"""One run measured: the peak of two updates, of which the first makes every basis. Prints a line of JSON.

python benchmarks/plan_truth/measure.py '{"model_config": "9m", "optimizer": "galore_adamw"}' allocator|system|cuda
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocator import peak_bytes

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.model.llama import DEMO_VOCAB, build_model, model_shape
from galore_torch.train.model.loss import TokenLoss
from galore_torch.train.optimizers.registry import build_optimizer, fused_pass, state_bytes

UPDATES = 2


class Run:
    """The model and optimizer of `galore pretrain`, and its updates on random tokens."""

    def __init__(self, config: PretrainConfig, device: str):
        shape = model_shape(config.model_config)
        shape = shape.with_vocab(config.vocab_size or shape.vocab_size or DEMO_VOCAB)
        self.config, self.device, (self.name, lr) = config, device, config.contenders[0]
        self.model: Any = build_model(
            shape,
            seed=0,
            dtype=config.torch_dtype,
            bos_token_id=None,
            eos_token_id=None,
            activation_checkpointing=config.activation_checkpointing,
        ).to(device)
        self.model.train()
        self.optimizer = build_optimizer(self.name, self.model, lr=lr, settings=config.optimizer_settings)
        size = (config.batch_size, config.max_length)
        self.tokens = torch.randint(0, shape.vocab_size, size, device=device)
        self.loss = TokenLoss(self.model, config.loss_chunk, self.tokens.numel())

    def held(self) -> int:
        """Bytes of weights, buffers and state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        parts = [part for tensor in tensors for part in getattr(tensor, "stored", (tensor,))]  # a weight in INT8 has no storage of its own
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        return sum(storages.values()) + state_bytes(self.optimizer)

    def updates(self, number: int = UPDATES) -> None:
        config = self.config
        gradients = config.gradients_of(self.name)
        with fused_pass(self.name, self.model, self.optimizer, deferred=config.deferred, gradients=gradients):
            for _ in range(number):
                for _ in range(config.accumulation):
                    (self.loss(self.tokens, self.tokens) / (self.tokens.numel() * config.accumulation)).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)


def by_allocator(config: PretrainConfig, device: str) -> int:
    """Bytes of tensors at the peak, from the allocator's log."""
    run = Run(config, device)
    return run.held() + peak_bytes(run.updates, device)


def by_system(config: PretrainConfig) -> int:
    """What the process has grown by at its peak; libraries are loaded, and the compiler's, before the count begins."""
    Run(PretrainConfig(optimizer=config.optimizer, dtype=config.dtype), "cpu").updates()
    before = _status("VmRSS")
    run = Run(config, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    run.updates()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = PretrainConfig(**json.loads(sys.argv[1]))
    how = sys.argv[2]
    peak = by_system(config) if how == "system" else by_allocator(config, "cuda" if how == "cuda" else "cpu")
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    main()
