"""A plain loop, or Trainer, under Accelerate, in one process or, started by torchrun, in several: python accelerate_loop.py FOLDER RUNS.

RUNS: the arguments of `train`, with "trainer" of `train_by_trainer`, for each, as JSON. The batch of one process is that of all together.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader

import galore_torch as g
from integrations.compare import STEPS, WINDOWS
from support.hf_runs import RANK, TARGETS, llama, run, windows

BATCH, LAYERS = 4, ["LlamaDecoderLayer"]


def train(
    folder: Path, optimizer: str, fused: str | None = None, resume: bool = False, accumulate: int = 1, fsdp: bool = False, **options: Any
) -> torch.nn.Module:
    """STEPS batches, or those after the state that the run before has left in ``folder`` after half of them; ``fsdp``: by FSDP2."""
    AcceleratorState._reset_state(reset_partial_state=False)
    if fsdp:
        as_on_a_gpu()
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=LAYERS, cpu_ram_efficient_loading=False
        )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)  # first: fused_backward asks for its processes
    model = llama()
    if optimizer == "AdamW":
        made: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        made = getattr(g, optimizer)(g.galore_param_groups(model, **RANK, scale=1.0, proj_type="right"), lr=0.01)
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
    return whole(accelerator.unwrap_model(model))


def train_by_trainer(folder: Path, optimizer: str, resume: bool = False, fsdp: bool = False) -> torch.nn.Module:
    """STEPS of Hugging Face's Trainer, or those after its middle checkpoint. ``optimizer``: our class, or a name of Trainer's."""
    from transformers import Trainer

    class OwnOptimizer(Trainer):
        """FSDP takes no `optimizers`: this method is where Trainer asks for one."""

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = getattr(g, optimizer)(g.galore_param_groups(self.model, **RANK, scale=1.0, proj_type="right"), lr=0.01)
            return self.optimizer

    AcceleratorState._reset_state(reset_partial_state=False)
    options: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS // 2, "count": WINDOWS}
    options["per_device_train_batch_size"] = BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    if fsdp:
        as_on_a_gpu()
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": LAYERS}
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **wrap}}
    named = not hasattr(g, optimizer)
    if named and optimizer.startswith("galore"):
        options |= {"optim_target_modules": TARGETS, "optim_args": "rank=8,update_proj_gap=4,scale=1.0,proj_type=right"}
    return whole(run(folder, None, None if named else OwnOptimizer, resume, **options, **({"optim": optimizer} if named else {})).model)


def as_on_a_gpu() -> None:
    """Accelerate has FSDP on devices that are no CPU; what it does there is the same on gloo, so it is told that it has one."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(model: torch.nn.Module) -> torch.nn.Module:
    """A plain model with the weights of one that may be cut; every process gets all of them."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model
    plain: torch.nn.Module = llama()
    plain.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    return plain


if __name__ == "__main__":
    for number, chosen in enumerate(json.loads(sys.argv[2])):
        trained = (train_by_trainer if chosen.pop("trainer", False) else train)(Path(sys.argv[1]), **chosen)
        torch.save(trained.state_dict(), f"{sys.argv[1]}/{number}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
