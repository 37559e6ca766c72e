"""A plan for people: tables, a verdict, and what the numbers rest on. All in GB of 10**9 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from galore_torch.train.plan.answer import RESERVE, Plan
from galore_torch.train.plan.units import GB, gb
from galore_torch.train.report.progress import show_table

PARTS = ("weights", "basis", "moments", "gradients", "activations", "logits", "transient")
_MEANING = {
    "basis": "subspaces",
    "moments": "optimizer state in them",
    "activations": "kept for the backward pass",
    "logits": "and what the loss makes of them",
    "transient": "of one operation or update",
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
    words += [q.dtype, f"{q.batch} x {q.length} tokens"]
    if q.accumulation > 1:
        words.append(f"accumulated {q.accumulation} times")
    if q.checkpointing:
        words.append("activations recomputed")
    return f"{', '.join(words)}, on {'a GPU' if q.device == 'cuda' else 'the CPU'}"


def show_plan(console: Console, plan: Plan, budget: int | None, world_size: int) -> None:
    rows = []
    for name, value in parts(plan).items():
        largest = value if name in ("weights", "basis", "moments") else plan.largest(name)
        rows.append([f"{name}{', ' + _MEANING[name] if name in _MEANING else ''}", gb(value), gb(largest)])
    rows.append(["tensors, in all", gb(plan.peak), ""])
    rows.append(["reserve: what is no tensor (assumed)", gb(plan.reserve), ""])
    rows.append(["needed", gb(plan.needed), ""])
    show_table(console, f"[bold]{escape(describe(plan))}[/]", ["GB (10^9 bytes)", "at the peak", "at its own"], rows)
    for note in notes(plan, world_size):
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
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
    if world_size > 1:
        found.append(
            f"of each of {world_size} processes: weights, gradients and state are replicated, as under DistributedDataParallel, whose "
            f"buckets hold the gradients once more ({gb(plan.request.total('gradient'))} GB, not counted)"
        )
    return found


def verdict(plan: Plan, budget: int) -> str:
    margin = budget - plan.needed
    share = f"{abs(margin) / budget:.0%}"
    if margin >= 0:
        return f"[bold green]fits[/] in {gb(budget)} GB, with {gb(margin)} GB ({share}) to spare"
    return f"[bold red]does not fit[/] in {gb(budget)} GB: {gb(-margin)} GB ({share}) too much"


def show_rows(console: Console, title: str, first: str, rows: Sequence[tuple[str, Plan]], budget: int | None) -> None:
    """One line a plan, narrow enough for 80 columns: "acts" holds the logits too."""
    header = [first, "weights", "grads", "basis", "moments", "acts", "trans.", "needed", *(["fits"] if budget else [])]
    cells = []
    for name, plan in rows:
        at = parts(plan)
        activations = at["activations"] + at["logits"]
        numbers = [*(at[key] for key in ("weights", "gradients", "basis", "moments")), activations, at["transient"]]
        fits = [] if budget is None else ["yes" if plan.needed <= budget else "no"]
        cells.append([name, *(f"{number / GB:.2f}" for number in (*numbers, plan.needed)), *fits])
    show_table(console, title, header, cells)
    console.print("GB (10^9 bytes) at the peak; acts: with logits; needed: with the reserve; by formulas", highlight=False)
