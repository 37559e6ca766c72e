"""From 1 to 1,024 devices by counting: memory of each, bytes on the wire, and where communication takes longer than computing.

    python benchmarks/scaling/run.py               # the tables; nothing is allocated
    python benchmarks/scaling/run.py --check 2 4   # and the bytes that 2 and 4 processes of a small model really hand to collectives

Memory is `galore plan`'s; bytes on the wire come from the same sizes (`wire.py`). Speeds are assumptions, and flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import table
from wire import Links, Traffic, hybrid_seconds, low_rank, optimizer_flops, plain, refreshes, sharded

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.model.gpus import Gpu, find_gpu
from galore_torch.train.plan.analytic import PlanRequest
from galore_torch.train.plan.answer import plan_request, planned

# Models, with ranks of a quarter of the width.
MODELS: dict[str, dict[str, Any]] = {
    "7B": {"model_config": "7b", "rank": 1024},
    "70B": {"hf_model": "meta-llama/Llama-3.1-70B", "rank": 2048},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW of torch, bf16 moments": {"optimizer": "adamw"},
    "GaLoreAdamW": {"optimizer": "galore_adamw"},
    "GaLoreAdamW8bit": {"optimizer": "galore_adamw8bit"},
    "GaLoreAdamW8bit, INT4 basis": {"optimizer": "galore_adamw8bit", "basis_codec": "int4"},
}
SHARDS = (1, 2, 8, 16, 64, 256, 1024)
BF16 = 2
SMALLEST = "GaLoreAdamW8bit, INT4 basis"  # what is sharded fits where this does


@dataclass(frozen=True)
class Case:
    """One model: the plans of a process that shares nothing, and of one of eight that share. Gradients are whole in both."""

    model: str
    whole: PlanRequest
    cut: PlanRequest

    def ways(self, passes: int) -> dict[str, Callable[[Links], float]]:
        """Seconds of communication in a step of so many forward and backward passes."""
        once, thin, shares = Traffic(reduced=refreshes(self.whole)), Traffic(reduced=refreshes(self.cut)), sharded(self.whole)
        many = Traffic(gathered=passes * shares.gathered, scattered=passes * shares.scattered)
        return {
            "DDP": lambda links: links.seconds(plain(self.whole)),
            "DDP, R in fp32": lambda links: links.seconds(low_rank(self.whole), once),
            "DDP, R in bf16": lambda links: links.seconds(low_rank(self.whole, BF16), once),
            "FSDP": lambda links: links.seconds(many, thin),
            "HSDP": lambda links: hybrid_seconds(links, self.whole, passes, thin),
        }

    def handled(self) -> list[str]:
        """GB that the collectives of a step handle; what they send of it depends on the devices."""
        shares = sharded(self.whole)
        each = [plain(self.whole).reduced, low_rank(self.whole).reduced, low_rank(self.whole, BF16).reduced, refreshes(self.whole)]
        each += [shares.gathered, shares.scattered, refreshes(self.cut)]
        return [self.model, *(f"{found / 1e9:,.2f}" for found in each)]


def config_of(model: str, optimizer: dict[str, Any], arguments: argparse.Namespace) -> PretrainConfig:
    run = {"dtype": "bfloat16", "max_length": arguments.length, "batch_size": arguments.batch, "activation_checkpointing": True}
    return PretrainConfig(**{**run, **MODELS[model], **optimizer})


def needed(model: str, optimizer: str, shards: int, arguments: argparse.Namespace) -> int:
    """Bytes that one process needs, shared among so many; where it shares nothing, with its gradients made as they are by default."""
    return planned(plan_request(config_of(model, OPTIMIZERS[optimizer], arguments), device="cuda", shards=shards), traced=False).needed


def memory(model: str, gpu: Gpu, arguments: argparse.Namespace) -> list[list[str]]:
    rows = []
    for optimizer in OPTIMIZERS:
        each = [needed(model, optimizer, shards, arguments) for shards in SHARDS]
        rows.append([model, optimizer, *(f"{number / 1e9:,.1f}" if number <= gpu.bytes else f"({number / 1e9:,.0f})" for number in each)])
    return rows


def unfit(case: Case, number: int, gpu: Gpu, arguments: argparse.Namespace) -> set[str]:
    """The ways that no optimizer of these fits on so many devices."""
    fits = {shards: needed(case.model, SMALLEST, shards, arguments) <= gpu.bytes for shards in {1, number, min(number, 8)}}
    ddp = set() if fits[1] else {"DDP", "DDP, R in fp32", "DDP, R in bf16"}
    return ddp | (set() if fits[number] else {"FSDP"}) | (set() if fits[min(number, 8)] else {"HSDP"})


def times(case: Case, gpu: Gpu, outer: float, arguments: argparse.Namespace) -> list[list[str]]:
    """A step of a fixed batch: seconds of computing, and of communication as if none of it were hidden."""
    speed = (gpu.peak_flops("bfloat16") or 0.0) * arguments.utilisation
    rate = speed / case.whole.sizes.flops_per_token(arguments.length)  # tokens a second
    rows = []
    for number in arguments.devices:
        tokens = arguments.tokens / number
        passes = max(1, round(tokens / (arguments.length * arguments.batch)))
        links, none = Links(number, arguments.inner * 1e9, outer * 1e9), unfit(case, number, gpu, arguments)
        cells = []
        for name, seconds in case.ways(passes).items():
            late = " **>**" if seconds(links) > tokens / rate else ""
            cells.append("–" if name in none else f"{seconds(links):.2f}{late}")
        own = optimizer_flops(case.whole) / speed
        rows.append([case.model, f"{number:,}", f"{tokens:,.0f}", f"{tokens / rate:.2f}", f"{own:.2f}, {own / number:.2f}", *cells])
    return rows


def break_even(case: Case, gpu: Gpu, outer: float, arguments: argparse.Namespace) -> list[list[str]]:
    """Tokens of a device and a step below which communication takes longer than computing; one forward pass a step."""
    rate = (gpu.peak_flops("bfloat16") or 0.0) * arguments.utilisation / case.whole.sizes.flops_per_token(arguments.length)
    rows = []
    for number in arguments.devices:
        if number > 1:
            links, none = Links(number, arguments.inner * 1e9, outer * 1e9), unfit(case, number, gpu, arguments)
            found = {name: f"{seconds(links) * rate:,.0f}" for name, seconds in case.ways(1).items()}
            rows.append([case.model, f"{number:,}", *("–" if name in none else cell for name, cell in found.items())])
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024], help="powers of two")
    parser.add_argument("--tokens", type=int, default=2**22, help="of a step, all devices together")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a device's forward pass")
    parser.add_argument("--gpu", default="H100 80GB", help="whose peak and memory are meant")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of that peak")
    parser.add_argument("--inner", type=float, default=360.0, help="GB/s that a device sends in its node of 8")
    parser.add_argument("--outer", type=float, nargs="+", default=[40.0, 1.25], help="GB/s that a device sends to other nodes")
    parser.add_argument("--check", type=int, nargs="+", default=[], metavar="PROCESSES", help="count real bytes")
    return parser.parse_args()


def case_of(model: str, arguments: argparse.Namespace) -> Case:
    config = config_of(model, OPTIMIZERS["GaLoreAdamW"], arguments)
    whole, cut = (plan_request(config, device="cuda", shards=shards) for shards in (1, 8))
    return Case(model, replace(whole, gradients="full"), cut)


def main() -> None:
    arguments = parsed()
    gpu = find_gpu(arguments.gpu)
    assert gpu is not None, f"--gpu {arguments.gpu} is not known"
    cases = [case_of(model, arguments) for model in arguments.models]
    print(
        f"{date.today()}; {gpu.name} at {arguments.utilisation:.0%} of its peak, {arguments.inner:g} GB/s in a node of 8; "
        f"{arguments.tokens:,} tokens a step in sequences of {arguments.length:,}, {arguments.batch} at once on a device\n"
    )
    print(f"GB that one process needs, (in brackets) where that is more than {gpu.gb}:\n")
    header = ["model", "optimizer", *("whole: DDP" if shards == 1 else f"1/{shards:,}" for shards in SHARDS)]
    print(table(header, [row for case in cases for row in memory(case.model, gpu, arguments)]), "\n")
    print("GB that the collectives of a step handle:\n")
    header = ["model", "DDP: gradients", "R in fp32, and the rest", "R in bf16, and the rest", "refreshes"]
    print(table([*header, "FSDP: weights gathered", "gradients scattered", "refreshes"], [case.handled() for case in cases]), "\n")
    names = list(cases[0].ways(1))
    for outer in arguments.outer:
        print(f"{outer:g} GB/s between nodes. Seconds of a step; **>**: more than computing:\n")
        rows = [row for case in cases for row in times(case, gpu, outer, arguments)]
        print(table(["model", "devices", "tokens of each", "computing", "the optimizer's products: DDP, FSDP", *names], rows), "\n")
        print(f"{outer:g} GB/s between nodes. Tokens of a device in a step below which communication takes longer than computing:\n")
        print(table(["model", "devices", *names], [row for case in cases for row in break_even(case, gpu, outer, arguments)]), "\n")
    if arguments.check:
        from check import checked

        print(checked(arguments.check))


if __name__ == "__main__":
    main()
