"""Settings as flags and as a config file: the same names, the same checks of a value. Imports no torch."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.config.recipes import recipe_names, recipe_text
from galore_torch.train.errors import UserError, did_you_mean
from galore_torch.train.optimizers.registry import unused_flags

SETTINGS = PretrainConfig.settings()
_HINTS = get_type_hints(FinetuneConfig)  # which has those of PretrainConfig too
Config = TypeVar("Config", bound=PretrainConfig)
_FREE_KEYS = {"about", "resolved"}  # what a file says beside its settings: a description; what a run's config.json adds
# One of each pair decides: a flag puts the file's other one out of force.
_RIVALS = (
    {"num_training_steps", "max_train_tokens", "num_train_epochs"},
    {"total_batch_size", "gradient_accumulation"},
    {"model_config", "hf_model"},
    {"optimizer", "compare"},
)
_OF_THE_SCHEDULE = {"warmup_steps", "decay_steps", "cycle_length", "restart_warmup_steps", "random_after"}
_OF_THE_LENGTH = {
    *("num_training_steps", "max_train_tokens", "max_length", "batch_size", "total_batch_size", "gradient_accumulation"),
    *("model_config", "hf_model", "nproc"),  # which decide the usual --max_length, and how many batches are trained on at once
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def add_flags(parser: argparse.ArgumentParser, kind: type[PretrainConfig] = PretrainConfig) -> None:
    """--config, and a flag for each setting of a `kind` of config, in the groups of the settings."""
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON or YAML file or a recipe; flags win over it")
    groups: dict[str, Any] = {}
    for item in kind.settings().values():
        name = item.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_flag(groups[name], item)


def config_from(
    arguments: Mapping[str, Any],
    processes: int = 1,
    kind: type[Config] = PretrainConfig,  # type: ignore[assignment]
    machine: int = 0,
) -> Config:
    """The settings of the file that --config names, where it is given, under those of the flags; for so many processes, here and in all."""
    flags = dict(arguments)
    path = flags.pop("config", None)
    if path is None:
        return kind(**flags, given=frozenset(flags), processes=processes, machine=machine)
    known = kind.settings()
    raw = _read(path, known, kind.command)
    read = {key: _value(path, known[key], value) for key, value in raw.items() if key not in _FREE_KEYS and value is not None}
    values = {key: value for key, value in read.items() if not any(key in rivals for rivals in _RIVALS if rivals & flags.keys())}
    remarks = []
    if kind is PretrainConfig and flags.keys() & {"num_training_steps", "max_train_tokens"}:
        remarks = _shorten(path, values, flags, *(_steps(each, processes) for each in (read, {**values, **flags})))
    if "optimizer" in flags or "compare" in flags:
        names = [name.partition(":")[0] for name in flags.get("compare") or (flags["optimizer"],)]
        unused = set.intersection(*(set(unused_flags(name, values)) for name in names))
        values = {key: value for key, value in values.items() if key not in unused}
        remarks += [f"{', '.join(names)}: {path} says {key}, which has no effect there" for key in sorted(unused)]
    # The record of a run holds every setting, most of which nobody typed.
    given = flags.keys() if "resolved" in raw else values.keys() | flags.keys()
    return kind(**{**values, **flags}, given=frozenset(given), remarks=tuple(remarks), processes=processes, machine=machine)


def _steps(settings: Mapping[str, Any], processes: int) -> int:
    """Of a run of these settings; 0 where they do not make one, as those of a file may that the flags complete."""
    with suppress(UserError):
        sizes = {key: value for key, value in settings.items() if key in _OF_THE_LENGTH}
        return PretrainConfig(**sizes, processes=processes).num_training_steps
    return 0


def _shorten(path: str, values: dict[str, Any], flags: Mapping[str, Any], was: int, steps: int) -> list[str]:
    """Scale the schedule of a file from the steps that it `was` for, in place, where there are fewer; a note for each number."""
    remarks = []
    for key in _OF_THE_SCHEDULE - flags.keys():
        if 0 < steps < was and values.get(key):
            scaled = max(1, values[key] * steps // was)
            remarks.append(f"--{key} {values[key]} of {path} becomes {scaled}, as its {was} steps become {steps}")
            values[key] = scaled
    return sorted(remarks)


def _read(path: str, known: Mapping[str, Field[Any]], command: str) -> dict[str, Any]:
    """The object in a JSON or YAML file, or in the recipe of that name where there is no such file; unknown keys are refused."""
    text = recipe_text(path) if not Path(path).exists() else None
    kind = "YAML" if path.lower().endswith((".yaml", ".yml")) else "JSON"
    try:
        text = text or Path(path).read_text(encoding="utf-8")
        raw = _yaml(path, text) if kind == "YAML" else json.loads(text)
    except OSError as error:
        near = did_you_mean(path, recipe_names())
        raise UserError(
            f"--config {path} cannot be read: {error.strerror}; {near}give a JSON or YAML file or one of `galore recipes`"
        ) from error
    except ValueError as error:
        raise UserError(f"--config {path} is not valid {kind}: {error}") from error
    if not isinstance(raw, dict):
        kind = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise UserError(f'--config {path} {kind}; give one object, such as {{"optimizer": "galore_adamw"}}')
    for key in raw:
        if key not in known and key not in _FREE_KEYS:
            cure = did_you_mean(str(key).replace("-", "_"), known) or f"`galore {command} --help` lists the settings"
            raise UserError(f"--config {path}: setting {key!r} is not known; {cure.strip()}")
    return raw


def _yaml(path: str, text: str) -> Any:
    """What a YAML file holds, plain values alone; ValueError where it is none."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"--config {path} needs PyYAML to be read: pip install pyyaml, or give the settings as JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _value(path: str, item: Field[Any], value: Any) -> Any:
    """A value of a file, checked as the flag's text would be."""
    kind, convert = _kind(item), converter(item)
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{value!r} is neither true nor false")
            return value
        if _several(item):
            parts = [convert(str(part)) for part in (value if isinstance(value, list) else [value])]
            return _as_tuple(item, parts)
        if kind is str and not isinstance(value, str):
            raise ValueError(f'{value!r} is no text; put it in quotes, as in "{value}"')
        return convert(str(value))
    except ValueError as error:
        raise UserError(f"--config {path}: {item.name}: {error}") from None


def _as_tuple(item: Field[Any], parts: list[Any]) -> tuple[Any, ...]:
    if item.metadata.get("parse") == "names":
        return tuple(name for names in parts for name in names)
    if item.metadata.get("pair") and len(parts) != 2:
        raise ValueError(f"{parts} must be two numbers")
    return tuple(parts)


def converter(item: Field[Any]) -> Callable[[str], Any]:
    """text -> one value of a setting; ValueError with the text and an example otherwise."""
    if parse := item.metadata.get("parse"):
        return {"names": _names, "tokens": _tokens, "epoch": _steps_or_epoch}[parse]
    return {int: _int, float: _float}.get(_kind(item), str)


def _annotated(item: Field[Any]) -> Any:
    """The annotation without its None."""
    hint = _HINTS[item.name]
    return next(part for part in get_args(hint) if part is not NoneType) if isinstance(hint, UnionType) else hint


def _several(item: Field[Any]) -> bool:
    return get_origin(_annotated(item)) is tuple


def _kind(item: Field[Any]) -> type:
    """bool, int, float or str: of the setting, or of each part of a tuple."""
    hint = _annotated(item)
    kind: type = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return kind


def _add_flag(group: Any, item: Field[Any]) -> None:
    """One flag from one setting, with its help and default."""
    flags = [f"--{name}" for name in (item.name, *item.metadata.get("also", ()))]
    text = item.metadata["help"].replace("%", "%%")
    if item.default is not None and item.default != () and item.default is not False:
        text += f" (default: {item.default})"
    kind, convert = _kind(item), _for_argparse(converter(item))
    metavar = item.metadata.get("metavar")
    if kind is bool:
        group.add_argument(*flags, dest=item.name, action="store_true", help=text)
    elif item.metadata.get("pair"):
        group.add_argument(*flags, dest=item.name, nargs=2, type=convert, action=_Pair, metavar=metavar, help=text)
    elif _several(item) and not item.metadata.get("parse"):
        group.add_argument(*flags, dest=item.name, nargs="+", action=_Tuple, metavar=metavar, help=text)
    else:
        metavar = metavar or {int: "N", float: "X"}.get(kind, "NAME")
        group.add_argument(*flags, dest=item.name, type=convert, metavar=metavar, help=text)


def _for_argparse(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number, such as 32") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number, such as 0.01") from None


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no number of tokens, such as 500K, 100M or 1.5B")
    return round(float(match[1]) * _UNITS[match[2]])


def _steps_or_epoch(text: str) -> int:
    return 0 if text == "epoch" else _int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError(f"{text!r} names no optimizer, such as adamw,galore_adamw")
    return names


class _Tuple(argparse.Action):
    """A flag that takes several values and may be repeated: all of them count."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


class _Pair(argparse.Action):
    """Two values as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))
