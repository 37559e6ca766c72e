"""What the step benchmarks share: the matrices of a model, and contenders that each hold their own weights and gradients."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peers import PEERS, Build, Groups, NotInstalledError, Peer, version
from report import count
from torch import Tensor, nn

from galore_torch import GaLoreAdamW, GaLoreAdamW8bit
from galore_torch.engine import inductor
from galore_torch.train.model.llama import PRESETS

inductor.COMPILING = 0.0  # a long run's steps are measured: what pays in one is compiled at the first step
NEVER = 10**6  # a gap that no run here reaches the end of
# name -> (preset, layers or None for all of them, rank)
SHAPES: dict[str, tuple[str, int | None, int]] = {
    "demo": ("demo", 1, 32),
    "60m": ("60m", None, 128),
    "130m": ("130m", None, 256),
    "1b_layer": ("1b", 1, 512),
    "7b_layer": ("7b", 1, 1024),
}


def ours(cls: Any, **settings: Any) -> Build:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(groups, lr=lr, **settings)
        return optimizer

    return build


OURS: dict[str, Build] = {
    "GaLoreAdamW": ours(GaLoreAdamW),
    "GaLoreAdamW, bf16 moments": ours(GaLoreAdamW, state_codec="bf16"),
    "GaLoreAdamW8bit": ours(GaLoreAdamW8bit),
}
NEAREST = "GaLoreAdamW, rounded to nearest"


@dataclass(frozen=True)
class Work:
    """The matrices of some layers of LLaMA, the rank, and where and how they are held."""

    name: str
    layers: int
    rank: int
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Work:
        """From the arguments that `add_work_arguments` added; sets the number of threads."""
        torch.set_num_threads(arguments.threads)
        preset, layers, rank = SHAPES[arguments.shapes]
        layers = arguments.layers or layers or PRESETS[preset].num_hidden_layers
        return cls(preset, layers, rank, getattr(torch, arguments.dtype), arguments.device)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        width, inner = PRESETS[self.name].hidden_size, PRESETS[self.name].intermediate_size
        return ([(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]) * self.layers

    @property
    def largest(self) -> int:
        """Bytes of the largest matrix."""
        return max(m * n for m, n in self.shapes) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{count(self.layers, 'layer')} of LLaMA-{self.name.upper()}, rank {self.rank}, {dtype} weights"


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="60m", choices=SHAPES, help="matrices of which LLaMA")
    parser.add_argument("--layers", type=int, help="default: the model's own; 1 of 1b_layer and 7b_layer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ours", nargs="+", choices=[*OURS, NEAREST], help="which of our optimizers; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def our_builds(dtype: torch.dtype, names: Iterable[str] | None) -> dict[str, Build]:
    """Our contenders, or those named; where weights are bf16, also the one that does not round them at random."""
    builds = OURS | ({NEAREST: ours(GaLoreAdamW, stochastic_rounding=False)} if dtype == torch.bfloat16 else {})
    return builds if names is None else {name: builds[name] for name in names}


class Contender:
    """An optimizer with weights and gradients of its own."""

    def __init__(self, build: Build, work: Work, gap: int = NEVER, shapes: list[tuple[int, int]] | None = None, rank: int | None = None):
        self.params = [nn.Parameter((0.02 * torch.randn(s, device=work.device)).to(work.dtype)) for s in shapes or work.shapes]
        for p in self.params:
            p.grad = (1e-3 * torch.randn(p.shape, device=work.device)).to(work.dtype)
        group = {"params": self.params, "rank": rank or work.rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        self.optimizer = build([group], 1e-3)

    def load(self, gradients: list[Tensor]) -> None:
        """Copy the gradients in: as after a backward pass, they are this contender's own and have just been written."""
        for p, gradient in zip(self.params, gradients, strict=True):
            assert p.grad is not None
            p.grad.copy_(gradient)

    def step(self) -> None:
        self.optimizer.step()

    def between_refreshes(self) -> Contender:
        """Take the first step, whose refresh is the only one: with a gap of `NEVER`, none follows."""
        self.step()
        for state in self.optimizer.state.values():
            if "index" in state:  # ours: matrices take turns over the gap, unless they all have the first
                state["index"] = 0
        return self


def two_gemms(work: Work) -> Callable[[], Any]:
    """The projection and the update of every matrix, with nothing in between: what no GaLore step goes below."""
    weights = [nn.Parameter((0.02 * torch.randn(s, device=work.device)).to(work.dtype)) for s in work.shapes]
    grads = [(1e-3 * torch.randn(s, device=work.device)).to(work.dtype) for s in work.shapes]
    bases = [torch.randn(min(s), work.rank, device=work.device).to(work.dtype) for s in work.shapes]

    @torch.no_grad()
    def gemms() -> None:
        for W, G, P in zip(weights, grads, bases, strict=True):
            if W.shape[0] >= W.shape[1]:
                W.addmm_(G @ P, P.mT, alpha=-1e-9)
            else:
                W.addmm_(P, P.mT @ G, alpha=-1e-9)

    return gemms


def available(peers: Mapping[str, Peer], work: Work) -> tuple[dict[str, Build], dict[str, str]]:
    """(those that run here, why the others do not), by two steps on a small matrix. They also load what torch loads late."""
    builds: dict[str, Build] = {}
    reasons: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            small = Contender(peer.build, work, shapes=[(96, 64), (64, 96)], rank=16)
            small.step()
            small.step()
        except NotInstalledError as missing:
            reasons[name] = str(missing)
        except Exception as failure:  # any fault of a peer is a row of the note, not the end of the run
            reasons[name] = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:120]}"
        else:
            builds[name] = peer.build
    return builds, reasons


def peers_note(measured: Iterable[str], reasons: Mapping[str, str]) -> str:
    """A paragraph after the table: which versions were measured, and which peers were not and why."""
    packages = dict.fromkeys(package for name in measured if (package := PEERS[name].package))
    lines = [f"Peers: {', '.join(f'{package} {version(package)}' for package in packages)}."] if packages else []
    lines += [f"Without {name}: {reason}." for name, reason in reasons.items()]
    return "".join(f"\n{line}" for line in lines) + "\n"


def gradients(work: Work, count: int) -> list[list[Tensor]]:
    """``count`` sets of gradients whose singular values fall as i^-0.7 and whose subspaces turn a little from one to the next."""
    out: list[list[Tensor]] = [[] for _ in range(count)]
    made: dict[tuple[int, int], list[Tensor]] = {}
    for m, n in work.shapes:
        if (m, n) not in made:  # layers share them: no contender looks at two matrices together
            k = min(m, n)
            left = torch.randn(m, k, device=work.device) * torch.arange(1, k + 1, device=work.device) ** -0.7
            right = torch.randn(k, n, device=work.device)
            turned = [right + 0.1 * torch.randn(k, n, device=work.device) for _ in range(count)]
            made[m, n] = [(1e-3 / k**0.5 * (left @ r)).to(work.dtype) for r in turned]
        for own, gradient in zip(out, made[m, n], strict=True):
            own.append(gradient)
    return out
