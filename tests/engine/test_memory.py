"""Memory really saved: state sizes on storages, transient memory and gradients on the allocator's own log and in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import galore_torch as g
from galore_torch.choices import PROJ_TYPES, STATE_CODECS
from galore_torch.engine.step import layout_of
from galore_torch.engine.stored import state_spec
from support.memory import peak_bytes, storage_bytes, tensors_in

CLASSES: dict[str, Any] = {
    "adamw": g.GaLoreAdamW,
    "adamw8bit": g.GaLoreAdamW8bit,
    "adafactor": g.GaLoreAdafactor,
    "adagrad": g.GaLoreAdagrad,
    "sgd": lambda p, **k: g.GaLoreSGD(p, momentum=0.9, **k),
    "muon": g.GaLoreMuon,
    "rmsprop": lambda p, **k: g.GaLore(torch.optim.RMSprop, p, **k),
}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in ((96, 130), (130, 96), (70, 70), (16, 6, 3, 3), (50,), ())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codec", STATE_CODECS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_state_bytes_equal_state_spec_before_and_after_training(name: str, proj_type: str, codec: str, dtype: torch.dtype) -> None:
    if name == "rmsprop" and codec != "fp32":
        pytest.skip("a torch.optim class keeps its own state")
    if proj_type == "full" and name == "muon":
        pytest.skip("of one side alone")
    if codec == "mulaw4" and name != "muon":
        pytest.skip("too coarse for moments that are divided by or added up")
    params = parameters(dtype)
    optimizer = CLASSES[name](
        params, lr=1e-3, rank=8, proj_type=proj_type, state_codec=codec, basis_codec="bf16", min_8bit_size=100, update_proj_gap=2
    )
    group = optimizer.param_groups[0]

    def expected() -> int:
        return sum(spec.nbytes for p in params for spec in state_spec(layout_of(p, group), group, optimizer.rule).values())

    assert storage_bytes([optimizer.state[p] for p in params]) == expected()
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert storage_bytes([optimizer.state[p] for p in params]) == expected()
    for tensor in tensors_in([optimizer.state[p] for p in params]):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_state_of_a_llama_layer_is_the_papers_count() -> None:
    """m r + 2 n r elements a matrix (arXiv 2403.03507, table 1), in fp32, plus one flag."""
    W = nn.Parameter(torch.randn(512, 1376))
    optimizer = g.GaLoreAdamW([W], rank=128)
    assert storage_bytes(optimizer.state[W]) == 4 * (512 * 128 + 2 * 1376 * 128) + 1
    eight = g.GaLoreAdamW8bit([W], rank=128)
    blocks = 1376 // 172
    assert storage_bytes(eight.state[W]) == 2 * 512 * 128 + 2 * (1376 * 128 + 4 * blocks * 128) + 1


@pytest.mark.parametrize(
    ("cls", "dtype", "bound"),
    [
        (g.GaLoreAdamW, torch.float32, 1.0),
        (g.GaLoreAdamW8bit, torch.float32, 1.0),
        (g.GaLoreAdafactor, torch.float32, 1.0),
        (g.GaLoreAdamW, torch.bfloat16, 2.0),
        (g.GaLoreAdamW8bit, torch.bfloat16, 2.0),
    ],
)
@pytest.mark.parametrize("rank", [None, 128])
def test_a_step_needs_no_more_than_one_fp32_matrix_beside_the_state(cls: Any, dtype: torch.dtype, bound: float, rank: int | None) -> None:
    """Bound in units of the parameter's bytes: one matrix in fp32. The published step takes 2.75 parameters (upstream B18)."""
    W = nn.Parameter(torch.randn(1024, 2048).to(dtype))
    optimizer = cls([W, nn.Parameter(W.detach().clone())], lr=1e-3, rank=rank, projector="gram")
    for _ in range(2):  # the first step makes the basis
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        peak = peak_bytes(optimizer.step)
    assert peak <= bound * W.numel() * W.element_size() * 1.02


STEP = """
import sys, torch, galore_torch as g
from torch import nn

def high_water():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

mode = sys.argv[1]
model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(24)])
optimizer = g.GaLoreAdamW(model.parameters(), lr=1e-3, rank=4, update_proj_gap=1000)
for state in optimizer.state.values():  # any basis will do: no step below is a refresh
    state["basis"].copy_(torch.linalg.qr(torch.randn(1024, 4)).Q)
    state["basis_ready"].fill_(True)
    state["step"] = 1
if mode != "plain":
    g.fused_backward(model, optimizer, mode)
x = torch.randn(4, 1024)
model(x).sum()
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = high_water()
for _ in range(2):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(high_water() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the high-water mark of a process is read from Linux's /proc")
def test_fused_backward_never_holds_all_gradients_seen_by_the_operating_system() -> None:
    """24 gradients of 4 MiB: the plain step's process grows by nearly all of them, a fused one's by a few.

    Large tensors are mapped one by one, so that the process follows the tensors and not the holes of the C heap.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    grown = {
        mode: int(subprocess.run([sys.executable, "-c", STEP, mode], check=True, capture_output=True, text=True, env=env).stdout)
        for mode in ("plain", "project", "update")
    }
    gradients = 24 * 1024 * 1024 * 4
    assert grown["plain"] > 0.7 * gradients
    assert grown["project"] < 0.3 * gradients
    assert grown["update"] < 0.3 * gradients


@pytest.mark.parametrize(("mode", "share"), [("plain", 1.0), ("project", 0.2), ("update", 0.2)])
def test_peak_of_a_training_step_on_the_allocator(mode: str, share: float) -> None:
    """The same on the allocator's log, where nothing else is counted: gradients alive at once, of all of them."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(20)])
    optimizer = g.GaLoreAdamW(model.parameters(), lr=1e-3, rank=8)
    x = torch.randn(4, 256)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if mode != "plain":
        g.fused_backward(model, optimizer, mode)
    step()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = peak_bytes(step)
    assert peak >= 0.9 * gradients if mode == "plain" else peak <= share * gradients
