"""Does a LLaMA of 7B parameters train in the memory of one consumer card? Real steps on real text, one sequence at a time.

    python benchmarks/seven_billion/run.py --model_config 7b --optimizer galore
    python benchmarks/seven_billion/run.py --model_config llama3-8b --optimizer qgalore

8-bit GaLore with bf16 weights, or Q-GaLore, each updating a layer inside the backward pass, whose gradient is never made in full
(`--mode direct_update`) or made and used up (`--mode update`). The model has random weights, made (and
quantised) a layer at a time, so that building never holds more than the weights. The first step makes every basis; the later ones are
ordinary. Each sees another text; at the end the first text is evaluated again. Peak memory is what the operating system counts for this
process, libraries and all; on CUDA, the allocator's peak under `--cap`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import heading, progress, table
from small_llama import add_data_arguments, text

from galore_torch import GaLoreAdamW8bit, QGaLoreAdamW8bit, fused_backward, galore_param_groups, quantize_linears
from galore_torch.train.device import memory_mb
from galore_torch.train.model.llama import ModelShape, build_model
from galore_torch.train.model.loss import TokenLoss
from galore_torch.train.optimizers.registry import state_bytes

GB = 1e9


CLASSES = {"galore": GaLoreAdamW8bit, "qgalore": QGaLoreAdamW8bit}
GAP = 500  # the published gap at 7B


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if arguments.cap:
        torch.cuda.set_per_process_memory_fraction(arguments.cap * GB / torch.cuda.get_device_properties(0).total_memory)
    config, data = text(
        arguments, model_config=arguments.model_config, max_length=arguments.length, batch_size=1, num_training_steps=arguments.steps
    )
    shape = config.shape
    assert isinstance(shape, ModelShape)
    progress("building")
    model = random_model(shape.with_vocab(data.vocab_size), device, quantized=arguments.optimizer == "qgalore")
    built = peak_gb(device)
    groups = galore_param_groups(model, arguments.rank, targets=arguments.targets, update_proj_gap=GAP, proj_type=arguments.proj_type)
    optimizer = CLASSES[arguments.optimizer](groups, lr=arguments.lr)
    progress("")
    recipe = f"{type(optimizer).__name__}, {arguments.mode}, rank {arguments.rank}, {arguments.proj_type}"
    recipe += f", {arguments.targets}" if arguments.targets else ""
    print(heading(f"{config.model_name}, {recipe}, 1 x {arguments.length} tokens", device))
    parameters, weights = sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())
    print(
        f"{parameters / 1e9:.2f} B parameters: weights {weights / GB:.2f} GB, optimizer state {state_bytes(optimizer) / GB:.2f} GB, "
        f"peak while building {built:.2f} GB\n"
    )
    rows = []
    loss_of = TokenLoss(model, chunk=None).train()
    with fused_backward(model, optimizer, arguments.mode):
        stream = data.batches(config)
        texts = [tuple(part.to(device) for part in next(stream)) for _ in range(arguments.steps)]
        for step, (inputs, targets) in enumerate(texts, 1):
            progress(f"step {step} of {arguments.steps}")
            loss, seconds = one_step(loss_of, optimizer, inputs, targets)
            progress("")
            print(f"step {step}: loss {loss:.3f}, {seconds:.0f} s, peak {peak_gb(device):.2f} GB", file=sys.stderr, flush=True)
            rows.append([f"{step}, every basis" if step == 1 else str(step), f"{loss:.3f}", f"{seconds:.0f}", f"{peak_gb(device):.2f}"])
    inputs, targets = texts[0]
    with torch.no_grad():
        loss = loss_of(inputs, targets).item() / targets.numel()
    rows.append(["none: the first text again", f"{loss:.3f}", "", f"{peak_gb(device):.2f}"])
    print(table(["step", "loss, nats", "seconds", "peak GB so far"], rows))


def one_step(loss_of: TokenLoss, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """(mean loss in nats before the update, seconds) of one update."""
    start = time.perf_counter()
    loss = loss_of(inputs, targets) / targets.numel()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), time.perf_counter() - start


def random_model(shape: ModelShape, device: str, *, quantized: bool) -> Any:
    """The model of `shape` in bf16 with recomputed layers, N(0, 0.02) weights made layer by layer on `device`."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_model(shape, seed=0, dtype="bfloat16", bos_token_id=None, eos_token_id=None, activation_checkpointing=True)
    for layer in model.model.layers:
        draw(layer, device)
        if quantized:
            quantize_linears(layer)
    draw(model, device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)  # its frequencies are computed, not drawn
    return model


def draw(part: nn.Module, device: str) -> None:
    """Weights for every parameter of `part` that has none yet; those of norms are one."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(made.fill_(1.0) if made.dim() == 1 else made.normal_(0, 0.02)))


def peak_gb(device: str) -> float:
    """The most memory so far, in GB of 10**9 bytes."""
    return memory_mb(device)["cuda_peak_mb" if device == "cuda" else "peak_rss_mb"] / 1e3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="7b")
    parser.add_argument("--optimizer", default="galore", choices=CLASSES)
    parser.add_argument("--mode", default="direct_update", choices=["direct_update", "update"])
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--proj_type", default="std", choices=["std", "reverse_std", "right", "left"])
    parser.add_argument("--targets", choices=["all-linear"], help="all-linear projects the head too (default: the layers alone)")
    parser.add_argument("--length", type=int, default=256, help="tokens in the one sequence of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cap", type=float, default=0.0, metavar="GB", help="CUDA memory this process may have (default: all)")
    add_data_arguments(parser)
    arguments = parser.parse_args()
    if arguments.cap and arguments.device == "cpu":
        parser.error(f"--cap {arguments.cap:g} caps CUDA memory; give --device cuda")
    return arguments


if __name__ == "__main__":
    main()
