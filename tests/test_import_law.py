"""The import law, read from the source: a folder imports only from folders left of it, the library from torch alone.

Imports inside functions and under TYPE_CHECKING count. The oracle is the line LAW; a folder that is not in it fails.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "galore_torch"

# The law, left to right: a folder imports only from folders left of it and from itself. "root" is the package's own
# files, "train" those of train/ itself.
LAW = "choices < ops < slots < engine < optim < root < train < model < optimizers < config < data < checkpoint < loop < report < plan < commands < cli"  # noqa: E501
ORDER = LAW.split(" < ")
LIBRARY = ORDER[: ORDER.index("root") + 1]
# A read of a value on the host stops the device's queue; none of these rooms may do so inside step().
NO_HOST_READ = {"ops", "slots", "engine", "optim"}
OUTSIDE_STEP = {"optim.published_state", "optim.joined"}  # a conversion on the host; what processes without batches are told
HOST_READS = {"item", "tolist", "numpy", "cpu", "synchronize"}
# Packages that one feature needs, and asks for when they are missing: (extra, name on the index).
OWN_EXTRA = {"peft": ("peft", "peft"), "lm_eval": ("eval", "lm-eval")}
# torch's own compiler for GPUs, which its builds for them bring along. One file names it, and is itself imported inside a function alone.
WITH_TRITON = {"ops.triton_steps"}
SPEAKS = {"optim.param_groups"}  # galore_param_groups(show=True) prints its table


def room(name: str) -> str:
    """Where a file of `files()` stands in the law: 'engine.step' in engine, 'train.loop.trainer' in loop, 'adamw' in root."""
    parts = name.split(".")
    if parts[0] == "train":
        return "cli" if name == "train.__main__" else parts[1] if len(parts) > 2 else "train"
    return parts[0] if len(parts) > 1 or parts[0] in ("choices", "cli") else "root"


def files() -> dict[str, Path]:
    """Every source file by its name under galore_torch: 'engine', 'train.data', '__init__', 'train.__init__'."""
    return {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.rglob("*.py"))}


FILES = files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
LIBRARY_FILES = [name for name in FILES if room(name) in LIBRARY]
USER_FILES = [name for name in FILES if name not in LIBRARY_FILES]


def imported(tree: ast.AST) -> Iterator[str]:
    """Full dotted names; `from a import b` gives a.b, which may be a module or a name inside a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write galore_torch.<file>"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def own(name: str) -> set[str]:
    """The files of this package that file `name` imports, by the names of `files()`."""
    found = set()
    for full in imported(TREES[name]):
        if full.split(".")[0] != "galore_torch":
            continue
        parts = full.split(".")[1:]
        candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        module = next((c for c in candidates if c in FILES or f"{c}.__init__" in FILES), "__init__")
        found.add(module if module in FILES else f"{module}.__init__")
    return found


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name of the called function or method, line)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr, node.lineno
            elif isinstance(node.func, ast.Name):
                yield node.func.id, node.lineno


def test_there_is_source() -> None:
    """Without files every test below would pass."""
    assert {"ops.linalg", "engine.step", "optim.base", "__init__", "cli", "train.loop.trainer"} <= set(FILES)


def test_every_file_is_in_a_room() -> None:
    unknown = sorted(name for name in FILES if room(name) not in ORDER)
    assert not unknown, f"{unknown} in no room: add the folder to LAW, right of what it imports"


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_the_left(name: str) -> None:
    mine = ORDER.index(room(name))
    right = sorted(other for other in own(name) if ORDER.index(room(other)) > mine)
    assert not right, f"{name} imports {right}, which stand right of its own room"


def test_no_import_circle() -> None:
    """Inside a room too."""
    TopologicalSorter({name: own(name) for name in FILES}).prepare()


@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_library_imports_only_torch(name: str) -> None:
    """One exception, which never runs: words for type hints that Python 3.10 lacks."""
    hints = {full for node in ast.walk(TREES[name]) if is_type_checking(node) for full in imported(node)}
    full_names = {f for f in imported(TREES[name]) if not (f in hints and f.startswith("typing_extensions."))}
    allowed = {"torch", "galore_torch"} | ({"triton"} if name in WITH_TRITON else set())
    foreign = {full.split(".")[0] for full in full_names} - set(sys.stdlib_module_names) - allowed
    assert not foreign, f"{name} imports {sorted(foreign)}; the library imports torch and the standard library"


def test_what_imports_triton_is_imported_where_it_is_asked_for() -> None:
    named = {name: {f"galore_torch.{other}" for other in WITH_TRITON} & set(imported(tree)) for name, tree in TREES.items()}
    assert {name for name, found in named.items() if found} == {"ops.twins"}
    at_import = {full for node in TREES["ops.twins"].body if isinstance(node, ast.Import | ast.ImportFrom) for full in imported(node)}
    assert not any("triton" in full for full in at_import)


def test_train_extra_names_what_the_command_imports() -> None:
    extra = {line.split(">")[0].split(";")[0].strip() for line in requires("galore-torch") or [] if "'train'" in line}
    roots = {
        full.split(".")[0].replace("yaml", "pyyaml").replace("sklearn", "scikit-learn")
        for name in USER_FILES
        for full in imported(TREES[name])
    }
    assert roots - set(sys.stdlib_module_names) - {"torch", "galore_torch"} - OWN_EXTRA.keys() <= extra


@pytest.mark.parametrize("name", sorted(OWN_EXTRA))
def test_package_of_one_feature_has_an_extra(name: str) -> None:
    extra, package = OWN_EXTRA[name]
    text = (SRC.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\n{extra} = ["galore-torch[train]", "{package}>=' in text


@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_library_is_silent_and_reads_no_environment(name: str) -> None:
    roots = {full.split(".")[0] for full in imported(TREES[name])}
    assert "logging" not in roots
    environment = [
        node.lineno
        for node in ast.walk(TREES[name])
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"})
        or (isinstance(node, ast.alias) and node.name in {"environ", "environb", "getenv"})
    ]
    assert not environment, f"{name} reads the environment at lines {environment}"
    if name not in SPEAKS:
        printed = [line for called, line in calls(TREES[name]) if called == "print"]
        assert not printed, f"{name} prints at lines {printed}"


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in NO_HOST_READ and name not in OUTSIDE_STEP])
def test_step_never_waits_for_the_device(name: str) -> None:
    waits = [f"{called}() at line {line}" for called, line in calls(TREES[name]) if called in HOST_READS]
    assert not waits, f"{name}: {waits}"
