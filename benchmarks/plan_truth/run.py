"""Does `galore plan` tell the truth? Predicted against measured peaks of real training runs, each in a process of its own.

    python benchmarks/plan_truth/run.py                  # on the CPU, 1M to 350M parameters
    python benchmarks/plan_truth/run.py --device cuda    # 1B and 7B against torch.cuda.max_memory_allocated

Measured is the peak of two updates, of which the first makes every basis: bytes of tensors, from the allocator's log. "By the
system" is what the process grew by at its peak; it holds also what the libraries keep for themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import cell, heading, progress, table

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.optimizers.registry import OPTIMIZERS
from galore_torch.train.plan.answer import plan_request, planned

Row = dict[str, Any]
SMALL, LARGER = {"batch_size": 2, "max_length": 64}, {"batch_size": 4, "max_length": 256}
ON_CPU: list[Row] = [
    {"model_config": "demo", "optimizer": "galore_adamw", "batch_size": 16, "max_length": 128},
    {"model_config": "9m", "optimizer": "galore_adamw8bit", **SMALL},
    {"model_config": "9m", "optimizer": "galore_adamw", "batch_size": 32, "max_length": 128},
    {"model_config": "20m", "optimizer": "adamw", **SMALL},
    {"model_config": "35m", "optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", **SMALL},
    {"model_config": "60m", "optimizer": "galore_adamw", "batch_size": 4, "max_length": 128, "gradient_accumulation": 2},
    {"model_config": "60m", "optimizer": "galore_adamw_per_layer", "gradient_accumulation": 2, **SMALL},
    {
        "model_config": "60m",
        "optimizer": "galore_adamw8bit",
        "dtype": "bfloat16",
        "batch_size": 4,
        "max_length": 128,
        "activation_checkpointing": True,
    },
    {"model_config": "130m", "optimizer": "galore_adamw8bit_per_layer", **SMALL},
    {"model_config": "130m", "optimizer": "adam8bit", "dtype": "bfloat16", **SMALL},
    {"model_config": "350m", "optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", **SMALL},
    {"model_config": "350m", "optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", "gradient_accumulation": 2, **SMALL},
    {"model_config": "350m", "optimizer": "galore_adamw", **SMALL},
    {"model_config": "35m", "optimizer": "galore_adamw", "loss_chunk": 64, **LARGER},
    {"model_config": "35m", "optimizer": "galore_adamw", "rank": 192, "loss_chunk": 64, **LARGER},
    {"model_config": "60m", "optimizer": "galore_adamw8bit", "proj_type": "right", "loss_chunk": 64, **LARGER},
    {"model_config": "60m", "optimizer": "galore_adamw_per_layer", "loss_chunk": 64, **LARGER},
    {"model_config": "130m", "optimizer": "galore_adamw", "loss_chunk": 64, "activation_checkpointing": True, **LARGER},
    {"model_config": "130m", "optimizer": "galore_adamw8bit_per_layer", "dtype": "bfloat16", "gradient_accumulation": 2, **SMALL},
    {"model_config": "350m", "optimizer": "galore_adamw8bit", "dtype": "bfloat16", "loss_chunk": 64, "batch_size": 2, "max_length": 256},
    {"model_config": "35m", "optimizer": "galore_adamw", "loss_chunk": 64, "gradients": "project", **LARGER},
    {"model_config": "35m", "optimizer": "galore_adamw", "loss_chunk": 64, "gradients": "full", **LARGER},
    {"model_config": "60m", "optimizer": "qgalore_adamw8bit_per_layer", "dtype": "bfloat16", **SMALL},
    {"model_config": "350m", "optimizer": "qgalore_adamw8bit_per_layer", "dtype": "bfloat16", **SMALL},
]
ON_CUDA: list[Row] = [
    {"model_config": model, "optimizer": optimizer, "dtype": "bfloat16", "batch_size": 1, **more}
    for model in ("1b", "7b")
    for optimizer in ("galore_adamw8bit", "galore_adamw8bit_per_layer", "qgalore_adamw8bit_per_layer")
    for more in ({}, {"gradient_accumulation": 2})
]
HEADER = [
    "model",
    "optimizer",
    "gradients",
    "run",
    "predicted, traced",
    "predicted, by formulas",
    "measured",
    "error, traced",
    "error, formulas",
]


def measure(row: Row, how: str) -> int:
    """Bytes, from a process of its own. Large tensors are mapped one by one, so that the process follows them, not the C heap's holes."""
    script = Path(__file__).with_name("measure.py")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, str(script), json.dumps(row), how], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{row}: {done.stderr.strip().splitlines()[-1]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak"])


def described(config: PretrainConfig) -> str:
    words = [config.torch_dtype, f"{config.batch_size} x {config.max_length} tokens"]
    if config.accumulation > 1:
        words.append(f"accumulated {config.accumulation} times")
    if config.activation_checkpointing:
        words.append("recomputing activations")
    words += [f"rank {config.rank}"] if config.rank else []
    words += [f"--proj_type {config.proj_type}"] if config.proj_type != "std" else []
    words += [f"--loss_chunk {config.loss_chunk}"] if config.loss_chunk else []
    return ", ".join(words)


def line(row: Row, device: str, found: dict[str, int]) -> list[str]:
    config = PretrainConfig(**row)
    request = plan_request(config, device=device)
    traced, formulas = planned(request, traced=True).peak, planned(request, traced=False).peak
    measured = found["cuda" if device == "cuda" else "allocator"]
    errors = [f"{100 * (value / measured - 1):+.1f} %" for value in (traced, formulas)]
    cells = [
        config.model_config,
        config.optimizer,
        config.gradients_of(config.optimizer),
        described(config),
        *(cell(value / 1e6, 1) for value in (traced, formulas, measured)),
        *errors,
    ]
    return cells + ([cell(found["system"] / 1e6 if "system" in found else None, 1)] if device == "cpu" else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="only these, from 0")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="keep measurements here, and take those that are there already")
    parser.add_argument("--quick", action="store_true", help="on the CPU: leave out the second run of each, which the system counts")
    arguments = parser.parse_args()
    ways = ("cuda",) if arguments.device == "cuda" else ("allocator",) if arguments.quick else ("allocator", "system")
    rows = ON_CUDA if arguments.device == "cuda" else ON_CPU
    rows = [rows[index] for index in arguments.rows] if arguments.rows else rows
    kept: dict[str, dict[str, int]] = {}
    if arguments.measured and arguments.measured.exists():
        kept = json.loads(arguments.measured.read_text())
    lines = []
    for row in rows:
        if row["optimizer"] not in OPTIMIZERS:
            continue  # Q-GaLore before it can be trained
        found = kept.setdefault(json.dumps(row, sort_keys=True), {})
        for how in ways:
            if how not in found:
                progress(f"{how}: {row}")
                found[how] = measure(row, how)
                if arguments.measured:
                    arguments.measured.write_text(json.dumps(kept, indent=1))
        lines.append(line(row, arguments.device, found))
    progress("")
    print(heading("MB (10**6 bytes), the peak of two updates", arguments.device))
    print(table(HEADER + (["grown, by the system"] if arguments.device == "cpu" else []), lines))


if __name__ == "__main__":
    main()
