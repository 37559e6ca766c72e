"""The published runs as config files that ship with the package: list, show, copy. Imports no torch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from galore_torch.optim.methods import METHODS
from galore_torch.train.errors import UserError, did_you_mean

_FOLDER = files("galore_torch.train.config") / "published"


def recipe_names() -> list[str]:
    """All names, the smallest model first."""
    names = [path.name.removesuffix(".json") for path in _FOLDER.iterdir() if path.name.endswith(".json")]
    return sorted(names, key=lambda name: (name.split("-")[0].endswith("b"), int(name.split("-")[0][:-1]), name))


def recipe_text(name: str) -> str | None:
    """The file of a recipe, or None where there is no such recipe."""
    return (_FOLDER / f"{name}.json").read_text(encoding="utf-8") if name in recipe_names() else None


def list_recipes() -> str:
    """One line for each: the name and what it is."""
    return "\n".join(f"{name:<30} {json.loads(_text(name))['about']}" for name in recipe_names())


def list_methods() -> str:
    """One line for each method of the family: the name of --optimizer, what it is, and its paper."""
    return "\n".join(f"{name:<14} {method.about} (arXiv {method.source})" for name, method in METHODS.items())


def show_recipe(name: str) -> str:
    """The file itself, so that it can be piped."""
    return _text(name).rstrip("\n")


def copy_recipe(name: str, destination: str | None) -> Path:
    """Write a recipe to a file or into a folder (default: here, under its name); never over something."""
    text = _text(name)
    path = Path(destination or f"{name}.json")
    if path.is_dir():
        path = path / f"{name}.json"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} already exists; give another name: galore recipes copy {name} mine.json") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _text(name: str) -> str:
    text = recipe_text(name)
    if text is None:
        near = did_you_mean(name, recipe_names())
        raise UserError(f"recipe {name!r} is not known; {near}choose one of: {', '.join(recipe_names())}")
    return text
