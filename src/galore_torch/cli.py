"""The command `galore`. Parsing imports neither torch nor transformers, so help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from importlib.util import find_spec
from typing import Any, NoReturn

from galore_torch import __version__
from galore_torch.train.config import PretrainConfig
from galore_torch.train.errors import UserError
from galore_torch.train.model import PRESETS
from galore_torch.train.optim import OPTIMIZERS

_TRAIN_EXTRA = ("transformers", "tokenizers", "rich", "matplotlib")
_EXIT_USAGE, _EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for anything the user can mend."""
    try:
        words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
        arguments = vars(_parser().parse_args(words))
        command = arguments.pop("command", None)
        if command is None:
            _parser().print_help()
            return 0
        return _report(arguments) if command == "report" else _pretrain(arguments)
    except UserError as error:
        _print_error(str(error))
        return _EXIT_USAGE
    except KeyboardInterrupt:
        _print_error("interrupted; whatever was written before stays where it is")
        return _EXIT_INTERRUPTED


def _pretrain(arguments: dict[str, Any]) -> int:
    config = PretrainConfig(**arguments, given=frozenset(arguments))
    _need("pretrain", _TRAIN_EXTRA)
    from galore_torch.train.pretrain import pretrain

    return pretrain(config)


def _report(arguments: dict[str, Any]) -> int:
    _need("report", ("matplotlib",))
    from galore_torch.train.html_report import write_report

    page, *pictures = write_report(arguments["runs"], arguments["output"])
    print(f"{page} and {len(pictures)} pictures beside it")
    return 0


def _need(command: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f'galore {command} needs {", ".join(missing)}; install them with: pip install "galore-torch[train]"')


class _Parser(argparse.ArgumentParser):
    """argparse with one line for an error, in place of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="galore", description="Train full-parameter models with low-rank optimizer state.")
    parser.add_argument("--version", action="version", version=f"galore-torch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    pretrain = commands.add_parser(
        "pretrain",
        usage="galore pretrain [--FLAG VALUE ...]",
        help="pre-train a LLaMA from scratch; without arguments a two-minute demo on the CPU",
        description="Pre-train a LLaMA from scratch. Without arguments: a small model on the "
        "source of Python's standard library, about two minutes on a CPU.",
        epilog=f"model presets: {', '.join(PRESETS)}. optimizers: {', '.join(OPTIMIZERS)}.",
        argument_default=argparse.SUPPRESS,  # only what the user typed reaches the config
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for item in fields(PretrainConfig):
        if "group" in item.metadata:
            name = item.metadata["group"]
            if name not in groups:
                groups[name] = pretrain.add_argument_group(name)
            _add_flag(groups[name], item)
    _add_report(commands)
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="draw runs: one self-contained HTML file, and PNGs beside it",
        description="Draw one or more runs into one HTML file that needs no network, and PNGs beside it.",
        allow_abbrev=False,
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder that galore pretrain wrote; of a comparison, all its runs")
    report.add_argument(
        "-o", "--output", metavar="FILE.html", help="where to write (default: report.html in RUN; with several, in this folder)"
    )


def _add_flag(group: Any, item: Field[Any]) -> None:
    """One flag from one config field, with the field's help and default."""
    flag = f"--{item.name}"
    text = item.metadata["help"].replace("%", "%%")
    if item.default is not None and item.default != () and item.default is not False:
        text += f" (default: {item.default})"
    kind = str(item.type)
    metavar = item.metadata.get("metavar")
    if kind == "bool":
        group.add_argument(flag, action="store_true", help=text)
    elif item.name == "compare":
        group.add_argument(flag, type=_names, metavar=metavar, help=text)
    elif kind.startswith("tuple"):
        group.add_argument(flag, nargs="+", action=_Tuple, metavar=metavar, help=text)
    else:
        convert, metavar = _scalar(kind)
        group.add_argument(flag, type=convert, metavar=metavar, help=text)


def _scalar(kind: str) -> tuple[Callable[[str], Any], str]:
    if kind.startswith("int"):
        return _int, "N"
    if kind.startswith("float"):
        return _float, "X"
    return str, "NAME"


def _underscored(word: str) -> str:
    """--a-b as --a_b: the published names have underscores, habits have dashes."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 32") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, such as 0.01") from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no optimizer, such as adamw,galore_adamw")
    return names


class _Tuple(argparse.Action):
    """A flag that takes several values and may be repeated: all of them count."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _print_error(message: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}galore: {' '.join(message.split())}{plain}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
