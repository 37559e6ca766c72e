"""Write the golden fixtures: what galore-torch 1.0, as published, does on the problems of problem.py.

    python tests/golden/make_golden.py                  # makes an environment in a temporary folder, about 2 minutes
    python tests/golden/make_golden.py --python PATH    # uses an environment that has the packages of REQUIREMENTS

Writes beside this file
    trajectories.pt   weights: {case: (len(KEPT), elements)}, svd_signs: {case: (refreshes, singular vectors)}
    legacy/CASE.pt    torch.save(optimizer.state_dict()) after SAVED_AT steps, as a user of 1.0 has it
    adamw8bit.pt      the 8-bit run: weights when saved and after LAST_8BIT steps; the same with exact moments in between

Three things are done to 1.0 to run it here, and none changes its arithmetic:
- torch.cuda.synchronize, which the 8-bit class calls after every parameter, does nothing: it raises without a GPU.
- bitsandbytes is 0.50.2: 0.49.2 has no CPU kernel for 8-bit optimizers. Since 0.50 the positional arguments of 1.0
  mean something else (percentile_clipping=100 becomes max_unorm, block_wise=True becomes skip_zeros); both are put
  back to what they were in 0.49. The state's layout did not change between them.
- its FutureWarning is off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REQUIREMENTS = ["galore-torch==1.0", "torch==2.13.0", "transformers==5.23.0", "bitsandbytes==0.50.2", "numpy"]
SEPARATION = 1.2  # least ratio of neighbouring singular values, up to the rank, whenever a basis is born


def in_own_environment() -> None:
    """Install the published package in a temporary environment and run this file there."""
    with tempfile.TemporaryDirectory(prefix="galore-golden-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        subprocess.run([python, __file__, "--inside"], check=True)


def check_separation(problem: Any, params: dict[str, Any], step: int) -> float:
    """Refuse singular values that are close when a basis is born: the trajectory could not be reproduced."""
    import torch

    worst = float("inf")
    for name, p in params.items():
        if p.ndim == 2:
            s = torch.linalg.svdvals(problem.gradient(name, p, step))
            worst = min(worst, (s[: problem.rank] / s[1 : problem.rank + 1]).min().item())
    if worst < SEPARATION:
        raise SystemExit(f"step {step}: neighbouring singular values within a factor {worst:.3f}; change the seed")
    return worst


def run(problem: Any, optimizer: Any, params: dict[str, Any], steps: range) -> dict[int, Any]:
    """problem.train with the separation checked before each refresh."""
    import problem as shared

    weights = {}
    for step in steps:
        if step in shared.REFRESHES:
            check_separation(problem, params, step)
        weights.update(problem.train(optimizer.step, params, [step]))
    return weights


def dequantised(state: dict[str, Any], which: int) -> Any:
    """bitsandbytes' block-wise code: 256-entry map times the block's largest magnitude, blocks of 256, row-major."""
    codes = state[f"state{which}"]
    if codes.dtype.is_floating_point:
        return codes.clone()
    values = state[f"qmap{which}"][codes.reshape(-1).long()]
    return (values.reshape(-1, 256) * state[f"absmax{which}"][:, None]).reshape(codes.shape)


def trajectories(folder: Path) -> None:
    import problem as shared
    import torch

    import galore_torch

    runs, signs = {}, {}
    initial = shared.SMALL.train(lambda: None, shared.SMALL.parameters(), [0])[0]
    for case in shared.CASES:
        params = shared.SMALL.parameters()
        cls = getattr(galore_torch, f"GaLore{case.optimizer}")
        optimizer = cls(shared.SMALL.groups(params, case.proj_type), **case.kwargs)
        weights = run(shared.SMALL, optimizer, params, range(1, shared.SAVED_AT + 1))
        if case in shared.LEGACY:
            torch.save(optimizer.state_dict(), folder / "legacy" / f"{case.name}.pt")
        weights |= run(shared.SMALL, optimizer, params, range(shared.SAVED_AT + 1, shared.STEPS + 1))
        runs[case.name] = torch.stack([weights[step] for step in shared.KEPT])
        before = {0: initial, **weights}
        signs[case.name] = torch.stack([shared.SMALL.svd_signs(before[s - 1], s) for s in shared.REFRESHES])
    fixture = {"initial": initial, "weights": runs, "svd_signs": signs, "made_with": REQUIREMENTS}
    torch.save(fixture, folder / "trajectories.pt")


def eight_bit(folder: Path) -> None:
    import problem as shared
    import torch

    import galore_torch

    torch.cuda.synchronize = lambda *_: None
    params = shared.LARGE.parameters()
    groups = shared.LARGE.groups(params, "std")
    groups[1]["weight_decay"] = shared.LARGE_DECAY
    optimizer = galore_torch.GaLoreAdamW8bit(groups, **shared.LARGE_KWARGS, weight_decay=0.0)
    optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.0, False
    weights = run(shared.LARGE, optimizer, params, range(1, shared.SAVED_AT + 1))
    torch.save(optimizer.state_dict(), folder / "legacy" / "adamw8bit.pt")

    # The same from here with the moments as saved but kept in float32 from now on: the published AdamW.
    exact_params = shared.LARGE.parameters()
    shared.LARGE.restore(exact_params, weights[shared.SAVED_AT])
    groups = shared.LARGE.groups(exact_params, "std")
    groups[1]["weight_decay"] = shared.LARGE_DECAY
    exact = galore_torch.GaLoreAdamW(groups, **shared.LARGE_KWARGS, weight_decay=0.0, no_deprecation_warning=True)
    for name, p in exact_params.items():
        state = optimizer.state[params[name]]
        moments = {"exp_avg": dequantised(state, 1), "exp_avg_sq": dequantised(state, 2)}
        exact.state[p] = {"step": state["step"], **moments}
        if "projector" in state:
            projector = state["projector"]
            twin = type(projector)(projector.rank, False, projector.update_proj_gap, projector.scale, "std")
            twin.ortho_matrix = projector.ortho_matrix.clone()
            exact.state[p]["projector"] = twin

    rest = range(shared.SAVED_AT + 1, shared.LAST_8BIT + 1)
    published = run(shared.LARGE, optimizer, params, rest)
    with_exact_moments = run(shared.LARGE, exact, exact_params, rest)
    fixture = {
        "saved": weights[shared.SAVED_AT],
        "published": published[shared.LAST_8BIT],
        "exact": with_exact_moments[shared.LAST_8BIT],
        "made_with": REQUIREMENTS,
    }
    torch.save(fixture, folder / "adamw8bit.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of an environment that has " + ", ".join(REQUIREMENTS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.python:
        subprocess.run([args.python, __file__, "--inside"], check=True)
    elif not args.inside:
        in_own_environment()
    else:
        (HERE / "legacy").mkdir(exist_ok=True)
        trajectories(HERE)
        eight_bit(HERE)
        for path in sorted(HERE.rglob("*.pt")):
            print(f"{path.stat().st_size:8d}  {path.relative_to(HERE)}")


if __name__ == "__main__":
    main()
