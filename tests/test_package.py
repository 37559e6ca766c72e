"""What is installed: light imports, one version, the command, types and the licence; and a wheel beside torch alone."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def torch_and_its_requirements() -> set[str]:
    """Names of the distributions that `pip install torch` brings."""
    found: set[str] = set()
    names = ["torch"]
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, distribution(name).requires or [])
            names += [item.name for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds a wheel built from this tree, torch, what torch requires, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, **run)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], **run)
    python = folder / "env" / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([str(python), "-c", show], **run).stdout.strip())
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in torch_and_its_requirements():
        try:
            dist = distribution(name)
        except PackageNotFoundError:  # a requirement of another platform's torch
            continue
        for top in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(dist.locate_file(top))
    return python


def bare(python: Path, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def torchs_own_words(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `import torch` itself says there: without numpy, a warning."""
    return bare(bare_python, "import torch", tmp_path_factory.mktemp("torch")).stderr


def test_wheel_beside_torch_alone_is_imported_in_silence(bare_python: Path, tmp_path: Path, torchs_own_words: str) -> None:
    """The command answers too, and says in one line what training needs."""
    code = "import galore_torch; galore_torch.GaLoreAdamW; print(galore_torch.__file__)\n"
    code += "from importlib.util import find_spec; print(*map(find_spec, ('numpy', 'transformers', 'rich')))"
    done = bare(bare_python, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == torchs_own_words
    assert done.stdout.startswith(str(bare_python.parents[1]))
    assert done.stdout.split()[1:] == ["None"] * 3
    done = bare(bare_python, "from galore_torch.cli import main; raise SystemExit(main(['pretrain']))", tmp_path)
    assert done.returncode == 2
    assert 'pip install "galore-torch[train]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wheel_has_the_readme_and_its_addresses(bare_python: Path) -> None:
    """What the package index shows: every address is to the same repository."""
    (metadata,) = bare_python.parents[1].glob("lib/python*/site-packages/galore_torch-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    urls = dict(re.findall(r"^Project-URL: (\w+), (\S+)$", text, re.MULTILINE))
    assert urls.keys() >= {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/galore-torch/galore-torch") for url in urls.values())
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in text


@pytest.mark.slow
def test_readme_runs_beside_torch_alone(bare_python: Path, tmp_path: Path, torchs_own_words: str) -> None:
    """Its loop as it is pasted; the loss falls, and nothing is said but by torch."""
    loop = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert loop is not None
    code = loop[1] + "    if step == 0: print(loss.item())\nprint(loss.item())"
    done = bare(bare_python, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == torchs_own_words
    first, last = map(float, done.stdout.split())
    assert last < 0.8 * first
