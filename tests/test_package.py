"""What is installed: light imports, one version, the command, types and the licence."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distribution, entry_points, requires
from pathlib import Path

import galore_torch

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_only_itself_to_torch() -> None:
    """Neither transformers nor bitsandbytes nor any other package: what is new is ours, torch's or Python's."""
    new = run("import sys, torch; before = set(sys.modules); import galore_torch; print(*sorted(set(sys.modules) - before))").split()
    assert "galore_torch" in new
    roots = {name.split(".")[0] for name in new}
    assert roots - set(sys.stdlib_module_names) <= {"galore_torch", "torch"}


def test_core_needs_torch_alone() -> None:
    always = [line for line in requires("galore-torch") or [] if "extra ==" not in line]
    assert [re.split(r"[<>=!~ \[;]", line)[0] for line in always] == ["torch"]


def test_version_is_stated_once() -> None:
    assert distribution("galore-torch").version == galore_torch.__version__
    assert f"## {galore_torch.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="galore")
    assert command.value == "galore_torch.cli:main"
    assert callable(command.load())


def test_types_and_licence_ship() -> None:
    assert (Path(galore_torch.__file__).parent / "py.typed").is_file()
    dist = distribution("galore-torch")
    assert dist.metadata["License-Expression"] == "Apache-2.0"
    licence = dist.read_text("licenses/LICENSE")
    assert licence is not None
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_constraints_pin_every_requirement() -> None:
    """The file CI installs under names each direct requirement, torch without a local build suffix."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split(" ;")[0].split("==") for line in lines if line and not line.startswith("#"))
    assert "+" not in pins["torch"]
    wanted = {
        re.split(r"[<>=!~ \[;]", line)[0]
        for line in requires("galore-torch") or []
        if "extra ==" not in line or "'train'" in line or "'test'" in line
    }
    assert wanted <= set(pins)
