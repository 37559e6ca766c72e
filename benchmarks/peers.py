"""The optimizers that the benchmarks compare with, and the one command that installs them, each into a place of its own:

    python benchmarks/peers.py

They go into build/peers (or the folder that GALORE_PEERS names), without their requirements: no peer brings another torch.
A peer that is absent, or cannot run on a machine, is named with the reason under each table.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(os.environ.get("GALORE_PEERS") or Path(__file__).resolve().parents[1] / "build" / "peers")
VERSIONS = {
    "galore-torch": "1.0",
    "apollo-torch": "1.0.3",
    "pytorch_optimizer": "4.1.0",
    "bitsandbytes": "0.50.2",
    "torchao": "0.18.0",
}

Groups = list[dict[str, Any]]  # as galore_param_groups makes them: the projected group has rank, update_proj_gap, scale, proj_type
Build = Callable[[Groups, float], torch.optim.Optimizer]  # (groups, lr)


class NotInstalledError(ImportError):
    """The peer is in none of the places; the text says how to install it."""


def place(package: str) -> Path:
    """The folder that holds the package."""
    folder = FOLDER / package
    if not folder.is_dir():
        raise NotInstalledError(f"not installed; `python benchmarks/peers.py {package}` does it")
    return folder


def load(package: str, module: str) -> Any:
    """A module of an installed peer. Its place comes last on the path, where it hides nothing."""
    if (folder := str(place(package))) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(module)


def version(package: str) -> str:
    """The version that is installed."""
    (found,) = distributions(name=package, path=[str(place(package))])
    return found.version


def install(packages: Sequence[str]) -> None:
    """Install each package into its own folder, which appears only once it is whole."""
    for package in packages:
        if (FOLDER / package).is_dir():
            continue
        unfinished = FOLDER / f"{package}.part"
        pinned = f"{package}=={VERSIONS[package]}"
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(unfinished), pinned], check=True)
        unfinished.rename(FOLDER / package)


def _published(groups: Groups, lr: float) -> torch.optim.Optimizer:
    from published import published

    optimizer: torch.optim.Optimizer = published("adamw").AdamW(groups, lr=lr, no_deprecation_warning=True)
    return optimizer


def _apollo(groups: Groups, lr: float) -> torch.optim.Optimizer:
    load("bitsandbytes", "bitsandbytes")  # which the package imports, whatever is used of it
    own = {"proj": "random", "scale_type": "channel", "scale": 1.0}
    optimizer: torch.optim.Optimizer = load("apollo-torch", "apollo_torch").APOLLOAdamW(
        [group | own if "rank" in group else group for group in groups], lr=lr
    )
    return optimizer


def _pytorch_optimizer(groups: Groups, lr: float) -> torch.optim.Optimizer:
    own = [{"projection_type" if key == "proj_type" else key: value for key, value in group.items()} for group in groups]
    optimizer: torch.optim.Optimizer = load("pytorch_optimizer", "pytorch_optimizer").GaLore(own, lr=lr)
    return optimizer


def _full_rank(cls: Callable[[], Any], **settings: Any) -> Build:
    """An optimizer that knows no rank: it gets the parameters alone. ``cls`` is looked up when it is needed."""

    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls()([{"params": group["params"]} for group in groups], lr=lr, **settings)
        return optimizer

    return build


@dataclass(frozen=True)
class Peer:
    """One contender: the package it comes from (None: torch itself) and how it is built."""

    package: str | None
    build: Build
    low_rank: bool = False


PEERS: dict[str, Peer] = {
    "galore-torch 1.0 AdamW": Peer("galore-torch", _published, low_rank=True),
    "pytorch_optimizer GaLore": Peer("pytorch_optimizer", _pytorch_optimizer, low_rank=True),
    "apollo-torch APOLLO": Peer("apollo-torch", _apollo, low_rank=True),
    "torch AdamW, foreach": Peer(None, _full_rank(lambda: torch.optim.AdamW, foreach=True)),
    "torch AdamW, fused": Peer(None, _full_rank(lambda: torch.optim.AdamW, fused=True)),
    "torch Muon": Peer(None, _full_rank(lambda: torch.optim.Muon)),
    "bitsandbytes AdamW8bit": Peer("bitsandbytes", _full_rank(lambda: load("bitsandbytes", "bitsandbytes").optim.AdamW8bit)),
    "torchao AdamW8bit": Peer("torchao", _full_rank(lambda: load("torchao", "torchao.optim").AdamW8bit)),
}
PUBLISHED = "galore-torch 1.0 AdamW"
PACKAGES = ("torch", *VERSIONS)


def chosen(packages: Sequence[str], low_rank_only: bool = False) -> dict[str, Peer]:
    """The contenders that come from these packages ("torch": torch's own)."""
    return {name: peer for name, peer in PEERS.items() if (peer.package or "torch") in packages and (peer.low_rank or not low_rank_only)}


def add_peers_argument(parser: argparse.ArgumentParser, default: Sequence[str] = PACKAGES) -> None:
    parser.add_argument("--peers", nargs="*", default=list(default), choices=PACKAGES, metavar="PACKAGE", help=" ".join(PACKAGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=list(VERSIONS), metavar="PACKAGE", help=" ".join(VERSIONS))
    arguments = parser.parse_args()
    if unknown := set(arguments.packages) - set(VERSIONS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(VERSIONS)}")
    install(arguments.packages)
    for package in arguments.packages:
        print(f"{package} {version(package)} in {place(package)}")


if __name__ == "__main__":
    main()
