"""The engine's laws, read from the source: few arguments, one place that tells weights apart, no dense basis outside of its projector."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "galore_torch"
TREES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SRC.rglob("*.py"))}
MOST = 5


def arguments(function: ast.FunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None)


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("engine/")])
def test_no_function_of_the_engine_takes_more_than_five_arguments(name: str) -> None:
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert {f"{f.name} at line {f.lineno}": arguments(f) for f in functions if arguments(f) > MOST} == {}


def test_the_count_sees_every_kind_of_argument() -> None:
    (function,) = ast.parse("def f(a, /, b, *c, d=1, **e): ...").body
    assert isinstance(function, ast.FunctionDef)
    assert arguments(function) == 5


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith(("engine/", "slots/")) and "__init__" not in name])
def test_the_kinds_of_weights_are_told_apart_in_write_alone(name: str) -> None:
    words = {node.id for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
    words |= {alias.name for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    modules = {node.module for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)}
    assert "Int8Weight" not in words
    assert "galore_torch.ops.int8_weight" not in modules


PROJECTS = ("slots/projectors.py", "slots/tucker.py", "ops/linalg.py", "galore_projector.py")


@pytest.mark.parametrize("name", [name for name in TREES if name not in PROJECTS])
def test_nobody_but_a_projector_multiplies_by_a_basis(name: str) -> None:
    """`linalg.project` and `mode_product` take a dense basis; a transport multiplies by overlaps C, which every projector has."""
    imported = {alias.name for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    attributes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {node.attr for node in attributes if node.value.id == "linalg"}  # type: ignore[attr-defined]
    dense = {"project", "mode_product", "dense_project", "dense_back"} & (imported | used)
    assert dense <= ({"mode_product"} if name == "slots/transport.py" else set())
