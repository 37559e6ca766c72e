"""The command `galore`. Parsing imports neither torch nor transformers, so help answers at once."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from galore_torch import __version__
from galore_torch.choices import BASIS_CODECS, STATE_CODECS
from galore_torch.train.commands.ready import check_ready
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.finetune import METHODS, FinetuneConfig
from galore_torch.train.config.flags import add_flags, config_from
from galore_torch.train.config.parallel import PARALLEL
from galore_torch.train.config.recipes import copy_recipe, list_methods, list_recipes, recipe_names, show_recipe
from galore_torch.train.errors import UserError, did_you_mean
from galore_torch.train.loop.distributed import launched
from galore_torch.train.loop.launch import launch
from galore_torch.train.model.known_models import KNOWN_MODELS
from galore_torch.train.model.llama import PRESETS
from galore_torch.train.optimizers.registry import GRADIENTS, OPTIMIZERS
from galore_torch.train.report.listing import list_runs

_TRAIN_EXTRA = ("transformers", "tokenizers", "rich", "matplotlib")
_SCORES_EXTRA = (*_TRAIN_EXTRA, "sklearn", "scipy")
_EXIT_USAGE, _EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for anything the user can fix."""
    try:
        words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
        arguments = vars(_parser().parse_args(words))
        run = arguments.pop("run", None)
        if run is None:
            _parser().print_help()
            return 0
        code: int = run(arguments, words) if run in (_pretrain, _finetune) else run(arguments)
        return code
    except UserError as error:
        _print_error(str(error))
        return _EXIT_USAGE
    except KeyboardInterrupt:
        _print_error("interrupted; whatever was written before stays where it is")
        return _EXIT_INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """argparse with one line for an error, in place of the usage text."""

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
            message = f"{message[: choice.start()]}{choice[1]!r} is not known; {near}choose one of: {choice[2]}"
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, *arguments: Any, **keys: Any) -> Any:
        """Refuse what is not known here, where the flags of the command are."""
        namespace, unknown = super().parse_known_args(*arguments, **keys)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near and f'; {near.strip()}'}")
        return namespace, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="galore", description="Train full-parameter models with low-rank optimizer state.")
    parser.add_argument("--version", action="version", version=f"galore-torch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for add in _COMMANDS:
        add(commands)
    return parser


# --- galore pretrain ------------------------------------------------------------------------------------------------


def _add_pretrain(commands: Any) -> None:
    pretrain = commands.add_parser(
        "pretrain",
        usage="galore pretrain [--config FILE] [--FLAG VALUE ...]",
        help="pre-train a LLaMA from scratch; without arguments a two-minute demo on the CPU",
        description="Pre-train a LLaMA from scratch. Without arguments: a small model on the "
        "source of Python's standard library, about two minutes on a CPU.",
        epilog=f"model presets: {', '.join(PRESETS)}. optimizers: {', '.join(OPTIMIZERS)}.",
        argument_default=argparse.SUPPRESS,  # only what the user typed reaches the config
        allow_abbrev=False,
    )
    add_flags(pretrain)
    pretrain.set_defaults(run=_pretrain)


def _pretrain(arguments: dict[str, Any], words: Sequence[str]) -> int:
    """``words``: those that the arguments were read from, for the processes that --nproc starts."""
    here = launched()
    config: PretrainConfig = config_from(arguments, here.size, machine=here.machine)
    _need("pretrain", _TRAIN_EXTRA)
    check_ready(config)
    if config.processes > here.size:
        return launch(words, config.processes)
    from galore_torch.train.commands.pretrain import pretrain

    return pretrain(config)


# --- galore finetune ------------------------------------------------------------------------------------------------


def _add_finetune(commands: Any) -> None:
    finetune = commands.add_parser(
        "finetune",
        usage="galore finetune --model_name_or_path NAME --task_name TASK [--config FILE] [--FLAG VALUE ...]",
        help="fine-tune a model on GLUE, on your own classes or numbers, or on prompts with their answers",
        description="Fine-tune any encoder or decoder on one of GLUE's tasks, on your own classification or regression, or on prompts with "
        "their answers. The run's folder, its resuming and its report are those of galore pretrain.",
        epilog=f"methods: {', '.join(METHODS)}. optimizers: {', '.join(OPTIMIZERS)}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(finetune, FinetuneConfig)
    finetune.set_defaults(run=_finetune)


def _finetune(arguments: dict[str, Any], words: Sequence[str]) -> int:
    """``words``: as of `_pretrain`."""
    _need("finetune", _SCORES_EXTRA)
    here = launched()
    config = config_from(arguments, here.size, FinetuneConfig, here.machine)
    check_ready(config)
    if config.processes > here.size:
        return launch(words, config.processes)
    from galore_torch.train.commands.finetune import finetune

    return finetune(config)


# --- galore recipes -------------------------------------------------------------------------------------------------


def _add_recipes(commands: Any) -> None:
    recipes = commands.add_parser("recipes", help="the published runs as config files: list, show, copy")
    recipes.set_defaults(run=lambda _: _say(list_recipes()))
    actions = recipes.add_subparsers(metavar="ACTION", parser_class=_Parser)
    actions.add_parser("list", help="all of them (what `galore recipes` alone does)")
    methods = actions.add_parser("methods", help="the methods of low-rank training by their names of --optimizer, and their papers")
    methods.set_defaults(run=lambda _: _say(list_methods()))
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", help=", ".join(recipe_names()))
    show.set_defaults(run=lambda arguments: _say(show_recipe(arguments["name"])))
    copy = actions.add_parser("copy", help="write one to a file, to be edited and given to galore pretrain --config")
    copy.add_argument("name", help="as galore recipes lists it")
    copy.add_argument("destination", nargs="?", metavar="DEST", help="a new file, or a folder (default: NAME.json, here)")
    copy.set_defaults(run=_copy_recipe)


def _copy_recipe(arguments: dict[str, Any]) -> int:
    path = copy_recipe(arguments["name"], arguments["destination"])
    return _say(f"{path}: edit it, then run: galore pretrain --config {path}")


# --- galore ls ------------------------------------------------------------------------------------------------------


def _add_ls(commands: Any) -> None:
    ls = commands.add_parser("ls", help="the runs below a folder: optimizer, status, steps, perplexity")
    ls.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="with runs in it, or one run (default: runs)")
    ls.set_defaults(run=lambda arguments: _say(list_runs(arguments["folder"])))


# --- galore report --------------------------------------------------------------------------------------------------


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
    report.set_defaults(run=_report)


def _report(arguments: dict[str, Any]) -> int:
    _need("report", ("matplotlib",))
    from galore_torch.train.report.html import write_report

    page, *pictures = write_report(arguments["runs"], arguments["output"])
    return _say(f"{page} and {len(pictures)} pictures beside it")


# --- galore export --------------------------------------------------------------------------------------------------


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a run's weights as an ordinary Hugging Face folder",
        description="Write the weights of a run's newest whole checkpoint, or of a named one, with config and tokenizer to a folder that "
        "AutoModelForCausalLM and AutoTokenizer load. What a baseline trained beside its matrices is multiplied out.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    export.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="such as runs/a, or runs/a/checkpoints/step-000500")
    export.add_argument("destination", metavar="DEST", help="a new folder")
    export.add_argument("--dtype", metavar="NAME", help="of the weights: bfloat16, float32 or float16 (default: as they were trained)")
    export.add_argument("--max_shard_size", metavar="SIZE", help="of one file (default: 5GB)")
    export.set_defaults(run=_export)


def _export(arguments: dict[str, Any]) -> int:
    _need("export", _TRAIN_EXTRA)
    from galore_torch.train.commands.export import export

    return _say(export(**arguments))


# --- galore generate ------------------------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="text from a run, for a look at what it has learnt",
        description="Go on from a prompt with the model of a run, a checkpoint or any Hugging Face folder, as plain text.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    generate.add_argument("source", metavar="RUN_OR_FOLDER", help="such as runs/a, one of its checkpoints, or an exported folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what the text begins with")
    generate.add_argument("--max_new_tokens", type=int, metavar="N", help="tokens after the prompt, at most (default: 64)")
    generate.add_argument("--temperature", type=float, metavar="X", help="0: always the likeliest token (default: 0.8)")
    generate.add_argument("--top_k", type=int, metavar="N", help="draw from the likeliest N tokens, 0: from all (default: 50)")
    generate.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: 0)")
    generate.add_argument("--count", type=int, metavar="N", help="texts, with a line --- between them (default: 1)")
    generate.add_argument("--device", metavar="NAME", choices=("auto", "cpu", "cuda"), help="auto, cpu or cuda (default: auto)")
    generate.set_defaults(run=_generate)


def _generate(arguments: dict[str, Any]) -> int:
    _need("generate", _TRAIN_EXTRA)
    from galore_torch.train.commands.generate import generate

    return _say("\n---\n".join(generate(**arguments)))


# --- galore eval ----------------------------------------------------------------------------------------------------


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="perplexity of a run or any saved model on any text; lm-eval's tasks",
        description="Evaluate the model of a run, a checkpoint or any Hugging Face folder: its perplexity on a text, which is read as "
        "training reads it, and tasks of EleutherAI's evaluation harness (the extra eval).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    evaluate.add_argument("source", metavar="RUN_OR_FOLDER", help="such as runs/a, one of its checkpoints, or an exported folder")
    evaluate.add_argument("--data", nargs="+", metavar="FILE", help="the text: .txt, .jsonl (each also .gz) or .parquet files")
    evaluate.add_argument("--text_field", metavar="NAME", help="the column of the files with the text (default: the run's own; else text)")
    evaluate.add_argument("--max_length", type=int, metavar="N", help="tokens in one window (default: the run's own; else 256)")
    evaluate.add_argument("--batch_size", type=int, metavar="N", help="windows, or examples, in one forward pass (default: 8)")
    evaluate.add_argument("--eval_tokens", type=int, metavar="N", help="tokens of the text, at most (default: all)")
    evaluate.add_argument("--harness", metavar="TASKS", help="lm-eval's tasks, comma-separated: names, or YAML files")
    evaluate.add_argument("--limit", type=int, metavar="N", help="examples of a task, at most (default: all)")
    evaluate.add_argument("--dtype", metavar="NAME", help="of the weights: float32 or bfloat16 (default: as they were saved)")
    evaluate.add_argument("--device", metavar="NAME", choices=("auto", "cpu", "cuda"), help="auto, cpu or cuda (default: auto)")
    evaluate.add_argument("--json", action="store_true", help="one JSON object in place of text")
    evaluate.set_defaults(run=_eval)


def _eval(arguments: dict[str, Any]) -> int:
    _need("eval", _TRAIN_EXTRA)
    from galore_torch.train.commands.evaluate import evaluate, show

    as_json = arguments.pop("json", False)
    arguments["data"] = tuple(arguments.get("data", ()))
    arguments["harness"] = tuple(filter(None, (name.strip() for name in arguments.get("harness", "").split(","))))
    found = evaluate(**arguments)
    return _say(json.dumps(found) if as_json else show(found))


# --- galore plan ----------------------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        usage="galore plan --model NAME [--memory 24GB | --card NAME] [--FLAG VALUE ...]",
        help="the memory of a run before it runs: does it fit, and what is the best recipe that does",
        description="The memory of a training run, with no GPU and without making the model. With --memory or --card: the best recipe that "
        "fits, choosing what is not given of --rank, --batch, --checkpointing and --optimizer. The exit code is 1 where nothing fits.",
        epilog=f"models: {', '.join(PRESETS)}; {', '.join(row.name for row in KNOWN_MODELS)}. optimizers: {', '.join(OPTIMIZERS)}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    plan.add_argument(
        "--model",
        "--model_config",
        dest="model",
        required=True,
        metavar="NAME",
        help="preset, a model by its name on the hub (those below), a config.json or the folder of one, or a Fourier neural operator: "
        "fno:64x64:64:4 (modes, channels, layers)",
    )
    plan.add_argument(
        "--memory", metavar="24GB", help="what there is: GB is 10**9 bytes, GiB 2**30; --card NAME is the size it is sold with, in GB"
    )
    plan.add_argument("--card", "--device_name", metavar="NAME", help='a graphics card by name, such as "RTX 4090", A100 or "H100 80GB"')
    plan.add_argument("--device", choices=("cuda", "cpu"), help="what it runs on (default: cuda)")
    plan.add_argument("--seq", "--max_length", dest="max_length", type=int, metavar="N", help="tokens in a sequence (default: 256)")
    plan.add_argument(
        "--batch", "--batch_size", dest="batch_size", type=int, metavar="N", help="sequences in one forward pass (default: 1)"
    )
    plan.add_argument("--gradient_accumulation", type=int, metavar="N", help="forward passes in one step (default: 1)")
    plan.add_argument("--optimizer", metavar="NAME", help="one of the names below (default: galore_adamw8bit_per_layer)")
    plan.add_argument("--rank", type=int, metavar="N", help="rank of the subspace (default: short side of the matrices / 4)")
    plan.add_argument("--targets", nargs="+", metavar="PATTERN", help="layers that are projected (default: the linear layers of the body)")
    plan.add_argument("--gradients", metavar="NAME", help=f"{', '.join(GRADIENTS)}, as of galore pretrain (default: direct)")
    plan.add_argument("--state_codec", metavar="NAME", help=f"moments: {', '.join(STATE_CODECS)} (default: the optimizer's own)")
    plan.add_argument("--basis_codec", metavar="NAME", help=f"the basis: {', '.join(BASIS_CODECS)} (default: the optimizer's own)")
    plan.add_argument("--dtype", metavar="NAME", help="weights: bfloat16 or float32 (default: bfloat16)")
    plan.add_argument("--vocab_size", type=int, metavar="N", help="rows of the embedding (default: the model's)")
    plan.add_argument(
        "--checkpointing",
        "--activation_checkpointing",
        dest="activation_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass",
    )
    plan.add_argument("--world_size", type=int, metavar="N", help="processes of data-parallel training (default: 1)")
    plan.add_argument("--parallel", choices=PARALLEL, help="what each holds, as of galore pretrain (default: ddp)")
    plan.add_argument("--nproc", type=int, metavar="N", help="of these, processes on one machine, which hsdp asks for (default: all)")
    plan.add_argument("-o", "--output", metavar="FILE", help="write the best recipe here, for galore pretrain --config")
    plan.add_argument("--compare", action="store_true", help="optimizers side by side: a table and a picture")
    plan.add_argument("--sweep", choices=("rank",), help="the same run at several ranks: a table and a picture")
    plan.add_argument("--picture", metavar="FILE.png", help="where that picture goes (default: plan-compare.png or plan-sweep.png, here)")
    plan._negative_number_matcher = re.compile(r"-\d")  # --memory -24GB is a value, to be refused as one, and no flag
    plan.set_defaults(run=_plan)


def _plan(arguments: dict[str, Any]) -> int:
    _need("plan", _TRAIN_EXTRA)
    from galore_torch.train.commands.plan import plan

    return plan(arguments)


# --- what the commands share ----------------------------------------------------------------------------------------


def _need(command: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f'galore {command} needs {", ".join(missing)}; install them with: pip install "galore-torch[train]"')


def _say(text: str) -> int:
    print(text)
    return 0


def _underscored(word: str) -> str:
    """--a-b as --a_b: the published names have underscores, habits have dashes."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"


# Each adds a command's parser, with set_defaults(run=...): arguments -> exit code.
_COMMANDS = (_add_pretrain, _add_finetune, _add_recipes, _add_ls, _add_report, _add_export, _add_generate, _add_eval, _add_plan)


def _print_error(message: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}galore: {' '.join(message.split())}{plain}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
