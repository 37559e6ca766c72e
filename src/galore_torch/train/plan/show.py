"""A plan for people: tables, a verdict, and what the numbers rest on. All in GB of 10**9 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from galore_torch.train.model.gpus import Gpu
from galore_torch.train.plan.answer import RESERVE, Plan
from galore_torch.train.plan.units import GB, gb
from galore_torch.train.report.progress import show_table

_LATER = "the first step keeps all inputs whole, to make every basis; tensors of later ones"
UTILISATION = 0.4  # of the peak, which training runs of this size commonly reach (arXiv 2204.02311, table 3, has 21 to 46 %)
PARTS = ("weights", "basis", "moments", "gradients", "activations", "logits", "transient", "gathered")
_MEANING = {
    "basis": "subspaces",
    "moments": "optimizer state in them",
    "activations": "kept for the backward pass",
    "logits": "and what the loss makes of them",
    "transient": "of one operation or update",
    "gathered": "whole weights and gradients",
}


def parts(plan: Plan) -> dict[str, int]:
    """Bytes at the peak, by purpose; they add up to the peak."""
    lasting = {"weights": plan.weights, "basis": plan.basis, "moments": plan.moments}
    return lasting | {name: getattr(plan.at_peak, name) for name in PARTS if name not in lasting}


def describe(plan: Plan) -> str:
    q = plan.request
    words = [q.model, q.optimizer]
    if plan.basis or q.optimizer in ("low_rank", "lora", "relora"):
        words.append(f"rank {q.rank}")
    if q.targets is not None:
        words.append(f"targets {q.targets if isinstance(q.targets, str) else ' '.join(q.targets)}")
    words += [q.dtype, f"{q.batch} x {q.length} tokens"]
    if q.accumulation > 1:
        words.append(f"accumulated {q.accumulation} times")
    if q.checkpointing:
        words.append("activations recomputed")
    return f"{', '.join(words)}, on {'a GPU' if q.device == 'cuda' else 'the CPU'}"


@dataclass(frozen=True)
class Budget:
    """What there is: bytes, and the GPU they are of where it was named."""

    bytes: int
    gpu: Gpu | None = None


def show_plan(console: Console, plan: Plan, budget: Budget | None, world_size: int) -> None:
    rows = []
    for name, value in parts(plan).items():
        if name == "gathered" and plan.request.shards == 1:
            continue
        largest = value if name in ("weights", "basis", "moments") else plan.largest(name)
        rows.append([f"{name}{', ' + _MEANING[name] if name in _MEANING else ''}", gb(value), gb(largest)])
    rows.append(["tensors, in all", gb(plan.peak), ""])
    rows.append(["reserve: what is no tensor (assumed)", gb(plan.reserve), ""])
    rows.append(["needed", gb(plan.needed), ""])
    show_table(console, f"[bold]{escape(describe(plan))}[/]", ["GB (10^9 bytes)", "at the peak", "at its own"], rows)
    for note in notes(plan, world_size):
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for line in beside(plan, budget):
        console.print(line, highlight=False, soft_wrap=True)
    if budget is not None:
        console.print(verdict(plan, budget), highlight=False, soft_wrap=True)


def notes(plan: Plan, world_size: int) -> list[str]:
    q = plan.request
    constant, share = RESERVE[q.device]
    what = "CUDA's context, cuBLAS's workspaces, fragmentation" if q.device == "cuda" else "the process and its libraries"
    how = "activations traced over 2 and 3 layers" if plan.traced else "activations by formulas"
    how += f" ({plan.untraced})" if plan.untraced else ""
    found = [
        f"the peak is in {plan.at_peak.name}; {how}",
        f"the reserve stands for {what}: {gb(constant)} GB and {share:.0%}, an assumption that is not measured here",
    ]
    if not plan.traced and not q.sizes.like_llama:
        found.append(f"the formulas are LLaMA's; the activations of {q.model} are an estimate")
    if q.gradients == "direct":
        found.append(
            "--gradients direct: no gradient of a projected linear layer is made in full; "
            + ("the peak is of a step after the first" if plan.ordinary is None else f"{_LATER}: {gb(plan.ordinary)} GB, by formulas")
        )
    if q.shards > 1:
        found.append(
            f"of the first of {q.shards} processes, which share weights, gradients and moments as under fully_shard; each holds every "
            "basis. What is gathered is counted for a call on each layer and on the model"
        )
    elif world_size > 1:
        found.append(
            f"of each of {world_size} processes: weights, gradients and state are replicated, as under DistributedDataParallel, whose "
            + (
                f"buckets hold the gradients once more ({gb(plan.request.total('gradient'))} GB, not counted)"
                if plan.request.mode is None
                else "buckets hold the gradients of what is not projected once more (not counted), and as long as it is being built all"
            )
        )
    return found


def beside(plan: Plan, budget: Budget | None) -> list[str]:
    """What a run takes beside the device's memory: disk, host memory, and time where the GPU is known."""
    host = f"; host memory: {gb(plan.on_host)} GB" if plan.request.device == "cuda" else ""
    lines = [f"disk       {gb(plan.on_disk)} GB a checkpoint, of which galore pretrain keeps two (--keep){host}"]
    if budget is None or budget.gpu is None:
        return lines
    gpu = budget.gpu
    lines.append(
        f"memory     the {gpu.name} counts with the {gpu.gb} GB it is sold with, as --memory {gpu.gb}GB does; "
        f"its driver reports {gb(gpu.mib * 2**20)} GB"
    )
    if seconds := update_seconds(plan, gpu):
        tokens = plan.request.tokens * plan.request.accumulation
        peak = (gpu.peak_flops(plan.request.dtype) or 0) / 1e12
        lines.append(
            f"time       about {_time(seconds)} s a step of {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s: an estimate, at "
            f"{UTILISATION:.0%} of the {peak:g} TFLOP/s of its data sheet, without the optimizer's own step"
        )
    return lines


def update_seconds(plan: Plan, gpu: Gpu) -> float | None:
    """An estimate of one step's passes; None where the GPU has no units for the dtype."""
    peak = gpu.peak_flops(plan.request.dtype)
    return plan.update_flops() / (UTILISATION * peak) if peak else None


def _time(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def verdict(plan: Plan, budget: Budget) -> str:
    margin = budget.bytes - plan.needed
    share = f"{abs(margin) / budget.bytes:.0%}"
    if margin >= 0:
        return f"[bold green]fits[/] in {gb(budget.bytes)} GB, with {gb(margin)} GB ({share}) to spare"
    return f"[bold red]does not fit[/] in {gb(budget.bytes)} GB: {gb(-margin)} GB ({share}) too much"


def show_choices(console: Console, rows: Sequence[tuple[str, Plan | None]], budget: Budget) -> None:
    """The chosen recipe beside what else there is: without recomputing, with INT8 weights. None: nothing fits."""
    header = ["what fits", "optimizer", "rank", "batch", "recompute", "needed", *(["s/update"] if budget.gpu else [])]
    cells = []
    for name, plan in rows:
        if plan is None:
            cells.append([name, "nothing", *[""] * (len(header) - 2)])
            continue
        q = plan.request
        seconds = update_seconds(plan, budget.gpu) if budget.gpu else None
        time = [_time(seconds) if seconds else "?"] if budget.gpu else []
        cells.append([name, q.optimizer, str(q.rank), str(q.batch), "yes" if q.checkpointing else "no", gb(plan.needed), *time])
    show_table(console, "side by side, by formulas", header, cells)


def show_rows(console: Console, title: str, first: str, rows: Sequence[tuple[str, Plan]], budget: Budget | None) -> None:
    """One line a plan, narrow enough for 80 columns: "acts" holds the logits too."""
    header = [first, "weights", "grads", "basis", "moments", "acts", "trans.", "needed", *(["fits"] if budget else [])]
    cells = []
    for name, plan in rows:
        at = parts(plan)
        activations = at["activations"] + at["logits"]
        numbers = [*(at[key] for key in ("weights", "gradients", "basis", "moments")), activations, at["transient"]]
        fits = [] if budget is None else ["yes" if plan.needed <= budget.bytes else "no"]
        cells.append([name, *(f"{number / GB:.2f}" for number in (*numbers, plan.needed)), *fits])
    show_table(console, title, header, cells)
    console.print("GB (10^9 bytes) at the peak; acts: with logits; needed: with the reserve; by formulas", highlight=False)
