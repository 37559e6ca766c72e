"""mkdocs calls this while it builds: what the code already says is put into the pages, so that they cannot fall behind it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from galore_torch import cli
from galore_torch.optim.shared_arguments import SHARED

_NOT_BUILT = re.compile(r"<!-- not built -->.*?<!-- end -->\n*", re.DOTALL)  # for who reads the file itself, as on GitHub


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- options -->` and `<!-- shared arguments -->`."""
    for mark, lines in (("<!-- options -->", options), ("<!-- shared arguments -->", shared_arguments)):
        if mark in markdown:
            markdown = _NOT_BUILT.sub("", markdown.replace(mark, "\n".join(lines())))
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """A long name at the head of a column may break after an underscore."""
    return re.sub(r"<th>.*?</th>", lambda head: head[0].replace("_", "_<wbr>"), html)


def options() -> Iterator[str]:
    """A heading for each command, a table for each group of its arguments."""
    for name, parser in commands(cli._parser()).items():
        yield f"\n## galore {name}\n\n{parser.description or ''}\n"
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.help and action.dest != "help"]
            if actions:
                own = group.title not in ("options", "positional arguments")
                yield f"\n### {(group.title or '').capitalize()} {{#{name}-{(group.title or '').replace(' ', '-')}}}\n" if own else ""
                yield "| option | meaning |\n|---|---|"
                yield from (f"| {spelled(action)} | {cell(action.help or '')} |" for action in actions)
    yield ""


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """name -> parser of each command, and of actions below it ("recipes show")."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                found[name] = child
                found |= {f"{name} {below}": parser for below, parser in commands(child).items()}
    return found


def spelled(action: argparse.Action) -> str:
    """How an argument is typed: `--model NAME` or `--model_config NAME`."""
    names = [action.metavar or "|".join(map(str, action.choices or ())) or action.dest] if action.nargs != 0 else []
    value = " ".join(part for name in names for part in ([name] if isinstance(name, str) else name))
    return cell(" or ".join(f"`{flag} {value}`".replace(" `", "`") for flag in action.option_strings) or f"`{value}`")


def cell(text: str) -> str:
    """One line of a table, in which a flag reads as code."""
    text = " ".join(text.replace("%%", "%").split()).replace("|", "\\|")
    return re.sub(r"(?<![`\w-])(--\w+)", r"`\1`", text)


def shared_arguments() -> Iterator[str]:
    """The arguments of `optim.shared_arguments.SHARED`, which every class's docstring ends with, as a list."""
    for item in re.findall(r"^ {8}(\S.*(?:\n {12}.*)*)", SHARED.partition("Raises:")[0], re.MULTILINE):
        names, _, meaning = " ".join(item.split()).partition(": ")
        yield f"- **{names}**: {meaning}"
