"""A plain loop under Accelerate, in one process or, started by torchrun, in several: python accelerate_loop.py FOLDER RUNS.

RUNS: the arguments of `train` for each, as JSON. The batch of one process is that of all together.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import galore_torch as g
from integrations.compare import STEPS, WINDOWS
from support.hf_runs import RANK, llama, windows

BATCH = 4


def train(
    folder: Path, optimizer: str, fused: str | None = None, resume: bool = False, accumulate: int = 1, **options: Any
) -> torch.nn.Module:
    """STEPS batches, or those after the state that the run before has left in ``folder`` after half of them."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)  # first: fused_backward asks for its processes
    model = llama()
    if optimizer == "AdamW":
        made: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        made = getattr(g, optimizer)(g.galore_param_groups(model, **RANK, scale=1.0), lr=0.01)
    if fused:
        g.fused_backward(model, made, fused)
    tokens = [torch.tensor(each["input_ids"]) for each in windows(WINDOWS)]
    loader = DataLoader(tokens, batch_size=BATCH // accelerator.num_processes, shuffle=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 - step / (2 * STEPS * accelerator.num_processes))
    model, made, loader, schedule = accelerator.prepare(model, made, loader, schedule)
    if resume:
        accelerator.load_state(str(folder / "state"))
        loader = accelerator.skip_first_batches(loader, STEPS // 2)
    for step, ids in enumerate(loader, STEPS // 2 if resume else 0):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            made.step()
            schedule.step()
            made.zero_grad()
        if not resume and step + 1 == STEPS // 2:
            accelerator.save_state(str(folder / "state"), safe_serialization=False)
        if step + 1 == STEPS:
            break
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    for number, chosen in enumerate(json.loads(sys.argv[2])):
        trained = train(Path(sys.argv[1]), **chosen)
        torch.save(trained.state_dict(), f"{sys.argv[1]}/{number}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
