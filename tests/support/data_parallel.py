"""One training run of a small model, in one process or as one of several under DistributedDataParallel: what tests compare.

As a program, `data_parallel.py FOLDER JSON`: a process of a group runs the settings and leaves in FOLDER what came of it.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import galore_torch as g
from galore_torch.engine.processes import Processes
from galore_torch.engine.refresh import refresh_is_due
from galore_torch.ops.linalg import as_real

if TYPE_CHECKING:
    from support.forked import Forked

TOKENS, WORDS = 12, 40
TORCHS_OWN = ".*autograd.function.Function.* should not be instantiated"  # a warning of its compiler about what that does itself


@dataclass
class Run:
    """The settings of one run. ``mode``: of fused_backward, None for none; ``first``: attached before the model is wrapped."""

    mode: str | None = "direct"
    cls: str = "GaLoreAdamW"
    steps: int = 50
    micro_batches: int = 1
    clip: float | None = None
    first: bool = False
    proj_type: str = "std"
    projector: str = "power"
    group: dict[str, Any] | None = None
    wrap: dict[str, Any] | None = None
    reduce_dtype: str | None = None
    model: str = "Net"
    set_to_none: bool = True
    odd: bool = False  # the processes' batches differ in size, and with micro-batches the first of them is left out by process 1
    hook: bool = False
    checkpoint: str | None = None
    int8: bool = False  # linear layers are quantised before the optimizer is built
    compiled: str | None = None  # "inside" of the wrapper, or "around" it
    lacks: int = 0  # the process `short` has so many batches less, inside of `join()`; five steps come after it
    short: int = 1


class Net(nn.Module):
    """Words in, words out; every shape a projected matrix has: tall, wide, square."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.words = nn.Embedding(WORDS, 24)
        self.up, self.mid, self.down = nn.Linear(24, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, WORDS, bias=False)

    def block(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.mid(nn.functional.gelu(self.up(x))))))

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.words(ids)
        if self.run.checkpoint:
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.run.checkpoint == "reentrant")
        else:
            x = self.block(x)
        return {"logits": [self.head(x)]}


class Bare(Net):
    """Nothing but projected matrices."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.words.requires_grad_(False)
        self.norm, self.up, self.down = nn.Identity(), nn.Linear(24, 32, bias=False), nn.Linear(32, 24, bias=False)  # type: ignore[assignment]


class Branches(Net):
    """Each process uses one of two layers, by turns, and none of them the third."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.even, self.uneven, self.never = (nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.block(self.words(ids))
        rows = [(self.even if int(row[0]) % 2 else self.uneven)(x[i]) for i, row in enumerate(ids)]
        return {"logits": [self.head(torch.stack(rows))]}


class Tensors(Net):
    """With a convolution and a complex spectral weight, both projected with all of their dimensions."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.conv = nn.Conv1d(24, 24, 7, padding=3)
        self.spectral = nn.Parameter(torch.randn(24, 24, 7, dtype=torch.complex64) / 24)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.conv(self.block(self.words(ids)).mT)
        modes = torch.einsum("bik,iok->bok", torch.fft.rfft(x, norm="forward"), self.spectral)
        return {"logits": [self.head((x + torch.fft.irfft(modes, n=x.shape[-1], norm="forward")).mT)]}


class Experts(Net):
    """Two stacks of experts: of one each expert meets every third word, of the other the one that the process's number says."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.every, self.chosen = (nn.Parameter(torch.randn(3, 24, 24) / 24**0.5) for _ in range(2))

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.block(self.words(ids))  # (B, T, 24)
        thirds = torch.stack([x[:, place::3].reshape(-1, 24) for place in range(3)])  # (3, B T / 3, 24)
        x = x + torch.bmm(torch.tanh(thirds), self.every).sum(0).view(len(x), -1, 24).repeat(1, 3, 1)
        rows = [nn.functional.linear(x[i], self.chosen[int(row[0]) % 2]) for i, row in enumerate(ids)]
        return {"logits": [self.head(torch.stack(rows))]}


class Gpt2(Net):
    """GPT-2's linear layers, whose weights are input x output."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        from transformers.pytorch_utils import Conv1D

        self.up, self.mid, self.down = Conv1D(32, 24), Conv1D(32, 32), Conv1D(24, 32)  # type: ignore[assignment]
        for layer in (self.up, self.mid, self.down):
            nn.init.normal_(layer.weight, std=0.2)


def ids_of(step: int, micro: int, part: int, odd: bool) -> Tensor:
    """A batch of sequences; a Markov chain, so that there is something to learn. ``part``: of two."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + part)
    rows = 3 + part if odd else 4
    ids = torch.randint(WORDS, (rows, TOKENS + 1), generator=generator)
    ids[:, 1::2] = (3 * ids[:, 0:-1:2] + 1) % WORDS
    ids[:, 0] = part  # which branch is taken
    return ids


def optimizer_of(model: nn.Module, run: Run) -> Any:
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad and p.shape[0] != WORDS]
    head = [p for name, p in model.named_parameters() if name == "head.weight"]
    rest = [p for p in model.parameters() if p.dim() < 2] + [p for p in [model.words.weight] if p.requires_grad]  # type: ignore[union-attr]
    keys = {"rank": 6, "update_proj_gap": 7, "proj_type": run.proj_type, "projector": run.projector, **(run.group or {})}
    groups = [{"params": [*matrices, *head], **keys}, {"params": rest}]
    return getattr(g, run.cls)([group for group in groups if group["params"]], lr=2e-3)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])["logits"][0]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


class Sent:
    """Counts the bytes that are all-reduced, but for those of DistributedDataParallel itself."""

    def __init__(self) -> None:
        self.bytes = 0
        self.all_reduce = distributed.all_reduce
        distributed.all_reduce = self

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes += tensor.nbytes
        return self.all_reduce(tensor, *args, **kwargs)


def train(run: Run, rank: int, size: int) -> dict[str, Any]:
    """The weights after each step. ``size`` 1: on the joined batches of two processes."""
    sent = Sent() if size > 1 else None
    torch.manual_seed(0 if rank == 0 or size == 1 or run.int8 else 100 + rank)  # the wrapper makes weights alike; INT8 ones it would round
    model: Any = {kind.__name__: kind for kind in (Net, Bare, Branches, Tensors, Experts, Gpt2)}[run.model](run)
    if run.int8:
        g.quantize_linears(model)
    optimizer = optimizer_of(model, run)
    dtype = getattr(torch, run.reduce_dtype) if run.reduce_dtype and size > 1 else None
    if run.mode and run.first:
        g.fused_backward(model, optimizer, run.mode, reduce_dtype=dtype)
    if run.compiled == "inside":
        model.compile(backend="aot_eager")
    wrapped: Any = DistributedDataParallel(model, **(run.wrap or {})) if size > 1 else model
    if run.hook and size > 1:
        wrapped.register_comm_hook(g.LowRankHookState(optimizer, reduce_dtype=dtype), g.low_rank_hook)
    if run.mode and not run.first:
        g.fused_backward(wrapped, optimizer, run.mode, reduce_dtype=dtype)
    called = torch.compile(wrapped, backend="aot_eager") if run.compiled == "around" else wrapped
    weights, norms, due, sizes = [], [], [], []
    early = range(run.steps - 5 if run.lacks else 0)  # the steps inside of `join()`
    lone = early[len(early) - run.lacks :]

    def one(step: int) -> None:
        due.append([name for name, p in model.named_parameters() if is_due(optimizer, p)])
        before = sent.bytes if sent else 0
        tokens = sum(len(ids_of(step, m, part, run.odd)) for m in range(run.micro_batches) for part in range(2)) * TOKENS
        for micro in range(run.micro_batches):
            last = micro + 1 == run.micro_batches
            both = [ids_of(step, micro, part, run.odd) for part in range(2)]
            if size == 1:
                (loss_of(called, both[1 - run.short] if step in lone else torch.cat(both)) / tokens).backward()
            else:
                mine = both[rank % 2] if size == 2 else torch.cat(both).chunk(size)[rank]
                with nullcontext() if last else wrapped.no_sync():
                    (loss_of(called, mine) * size / tokens).backward()
        if run.clip:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)))
        sizes.append(sent.bytes - before if sent else 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=run.set_to_none)
        flat = torch.cat([as_real(p.detach()).flatten() for p in model.parameters()])
        weights.append(flat)
        if size > 1 and step not in early:
            others = [torch.empty_like(flat) for _ in range(size)]
            distributed.all_gather(others, flat)
            assert all(torch.equal(flat, other) for other in others), f"processes differ after step {step}"

    with wrapped.join() if early and size > 1 else nullcontext():
        for step in early[: len(early) - run.lacks] if rank == run.short and size > 1 else early:
            one(step)
    for step in range(len(early), run.steps):
        one(step)
    steps = [optimizer.state[p].get("step", 0) for p in model.parameters() if p in optimizer.state]
    return {"weights": torch.stack(weights), "norms": norms, "steps": steps, "due": due, "bytes": sizes}


def attached_again() -> list[Tensor]:
    """The weights of a model that is trained, detached, and attached and trained again."""
    run = Run("direct")
    torch.manual_seed(0)
    model = Net(run)
    optimizer = optimizer_of(model, run)
    wrapped = DistributedDataParallel(model)
    for step in range(3):
        time.sleep(0.2 * distributed.get_rank())  # one finds what the other has not yet written anew
        with g.fused_backward(wrapped, optimizer, "direct"):
            loss_of(wrapped, ids_of(step, 0, distributed.get_rank(), False)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def mean_in_two_orders() -> tuple[Tensor, Tensor]:
    """(mean over two processes, what it should be) of matrices of which the second process holds its by columns."""
    matrices = [torch.arange(12.0).view(3, 4) * (1 + rank) for rank in range(2)]
    mine = matrices[0] if distributed.get_rank() == 0 else matrices[1].mT.contiguous().mT
    processes = Processes(distributed.group.WORLD)
    mean = processes.mean(mine)
    return mean, torch.stack(matrices).mean(0)


def is_due(optimizer: Any, p: Tensor) -> bool:
    if p not in optimizer.state or not optimizer.view_of(p).layout.ranks:
        return False
    return refresh_is_due(optimizer.state[p], optimizer.group_of(p))


def in_processes(forked: Forked, size: int, run: Run, folder: Path) -> dict[str, Any]:
    """What came of a run in several processes: of one that has all batches, which is what all have in the end."""
    forked.together(size, [str(Path(__file__).resolve()), str(folder), json.dumps(asdict(run))])
    codes, said = forked.wait()
    assert codes == [0] * size, "\n".join(said)
    found: dict[str, Any] = torch.load(folder / f"{1 - run.short}.pt")
    return found


def main(folder: str, settings: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", TORCHS_OWN, DeprecationWarning)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        torch.save(copy.copy(train(Run(**json.loads(settings)), rank, size)), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
