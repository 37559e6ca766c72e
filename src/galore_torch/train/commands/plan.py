"""The command `galore plan`, from its words to its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.backend_bases import FigureCanvasBase
from rich.console import Console

from galore_torch.train.config.bounds import check_number
from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.parallel import mesh_shape
from galore_torch.train.errors import UserError
from galore_torch.train.model.gpus import GPUS, find_gpu
from galore_torch.train.model.known_models import KNOWN_MODELS, did_you_mean, known_model
from galore_torch.train.model.llama import PRESETS, preset_name
from galore_torch.train.model.pretrained import quiet_transformers
from galore_torch.train.optimizers.registry import optimizer_spec
from galore_torch.train.plan.answer import Plan, plan_request, planned
from galore_torch.train.plan.operators import PREFIX, plan_operator
from galore_torch.train.plan.picture import draw_bars
from galore_torch.train.plan.search import SHARES, best_that_fits
from galore_torch.train.plan.show import Budget, describe, show_choices, show_plan, show_rows
from galore_torch.train.plan.units import gb, parse_memory
from galore_torch.train.report.progress import make_console

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1
COMPARED = {
    "AdamW": "adamw",
    "8-bit Adam": "adam8bit",
    "LoRA": "lora",
    "GaLore": "galore_adamw",
    "8-bit GaLore": "galore_adamw8bit",
    "8-bit GaLore, per layer": "galore_adamw8bit_per_layer",
    "Q-GaLore, per layer": "qgalore_adamw8bit_per_layer",
}
_CODECS = ("state_codec", "basis_codec")
_SETTINGS = (
    *("max_length", "batch_size", "gradient_accumulation", "optimizer", "rank", "dtype", "activation_checkpointing", "vocab_size"),
    *("targets", "gradients"),
    *_CODECS,
)
_CYCLE = 200  # steps between relora's merges: they cost no memory, but it has no default
_DEFAULTS = {"dtype": "bfloat16", "batch_size": 1, "optimizer": "galore_adamw8bit_per_layer"}


def plan(arguments: Mapping[str, Any], console: Console | None = None) -> int:
    """Answer one `galore plan`; returns the exit code: 1 where the run does not fit. UserError for what cannot be."""
    console = console or make_console()
    if arguments["model"].lower().startswith(PREFIX):
        plan_operator(arguments, console)
        return EXIT_FITS
    world_size = arguments.get("world_size", 1)
    if world_size < 1:
        raise UserError(f"--world_size {world_size} is out of bounds: give a number of processes of at least 1")
    parallel, shards = arguments.get("parallel", "ddp"), _shards(arguments, world_size)
    budget = _budget(arguments)
    device = arguments.get("device", "cuda")
    given = _model(arguments["model"]) | {name: arguments[name] for name in _SETTINGS if name in arguments}
    if "hf_model" in given:
        quiet_transformers()
    given |= {"dtype": given.get("dtype", _DEFAULTS["dtype"]), "parallel": parallel}
    name = given.get("optimizer", "").lower()
    given |= ({"optimizer": name} if name else {}) | ({"cycle_length": _CYCLE} if name == "relora" else {})
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    defaults = _DEFAULTS | ({"optimizer": "galore_adamw8bit"} if shards > 1 else {})
    config = PretrainConfig(**{**defaults, **given}, given=frozenset(given))
    if arguments.get("output") and (budget is None or arguments.get("compare") or arguments.get("sweep")):
        raise UserError("-o writes the best recipe that fits: give --memory or --card, and neither --compare nor --sweep")
    if arguments.get("compare") and (other := next((flag for flag in ("sweep", "optimizer") if arguments.get(flag)), None)):
        raise UserError(
            f"--{other} {arguments[other]} has no effect with --compare, which has optimizers of its own; leave one of them out"
        )
    if shards > 1 and (flag := next((flag for flag in ("compare", "sweep", "output") if arguments.get(flag)), None)):
        raise UserError(f"--{flag} plans whole parameters; leave it out, or --parallel {parallel}")
    if arguments.get("compare") or arguments.get("sweep"):
        return _side_by_side(console, arguments, config, device, budget)
    if output := arguments.get("output"):
        _check_output(Path(output))
    if arguments.get("picture"):
        raise UserError(f"--picture {arguments['picture']} has no effect alone: give --compare or --sweep rank")
    if "max_length" not in given:
        console.print(f"note: sequences of {config.max_length} tokens, the default; --seq N plans yours", highlight=False)
    if budget is None or shards > 1:
        found = planned(plan_request(config, device=device, shards=shards), traced=True)
        show_plan(console, found, budget, world_size)
        return EXIT_FITS if budget is None or found.needed <= budget.bytes else EXIT_DOES_NOT_FIT
    return _for_a_card(console, arguments, given, config, device, budget, world_size)


def _shards(arguments: Mapping[str, Any], world_size: int) -> int:
    """The processes that share a weight."""
    machine = arguments.get("nproc")
    check_number("nproc", machine, at_least=1, at_most=world_size)
    if machine is not None and arguments.get("parallel") != "hsdp":
        raise UserError(f"--nproc {machine} has no effect without --parallel hsdp, whose replicas are machines; leave it out")
    return (1, *mesh_shape(arguments.get("parallel", "ddp"), world_size, machine or world_size))[-1]


def _budget(arguments: Mapping[str, Any]) -> Budget | None:
    if "card" in arguments and "memory" in arguments:
        raise UserError(f"--card {arguments['card']} and --memory {arguments['memory']} both say how much there is; leave one of them out")
    if "card" in arguments:
        if arguments.get("device") == "cpu":
            raise UserError(f"--card {arguments['card']} is a GPU, and --device is cpu; leave one of them out")
        gpu = find_gpu(arguments["card"])
        if gpu is None:
            raise UserError(f"--card {arguments['card']!r} is not known; give --memory, or one of: {', '.join(item.name for item in GPUS)}")
        return Budget(gpu.bytes, gpu)
    return Budget(parse_memory(arguments["memory"])) if "memory" in arguments else None


def _model(name: str) -> dict[str, Any]:
    """As settings of `galore pretrain`: a LLaMA's sizes, or a model of transformers by its folder, its config file or a known name."""
    path = Path(name)
    if preset_name(name):
        return {"model_config": name}
    if not path.exists():
        row = known_model(name)
        if row is None:
            close = did_you_mean(name, [*PRESETS, *(known.name for known in KNOWN_MODELS)])
            raise UserError(
                f"--model {name!r} is neither a preset nor a config file that exists, nor a model whose sizes are known{close}; "
                "galore plan --help lists them"
            )
        return {"hf_model": name if "/" in name else row.name}
    file = path / "config.json" if path.is_dir() else path
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {name}: {file} is no readable config: {error}") from error
    weights = path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin")))
    return {"hf_model": name} if weights or kind not in ("llama", None) else {"model_config": name}


def _for_a_card(
    console: Console,
    arguments: Mapping[str, Any],
    given: dict[str, Any],
    config: PretrainConfig,
    device: str,
    budget: Budget,
    world_size: int,
) -> int:
    best = best_that_fits(given, budget.bytes, device, traced=True)
    if best is None:
        least = planned(plan_request(config, device=device), traced=True)
        show_plan(console, least, budget, world_size)
        console.print("nothing that was left open to choose makes it fit", highlight=False)
        if "optimizer" in given and (
            other := best_that_fits({k: v for k, v in given.items() if k != "optimizer"}, budget.bytes, device, traced=False)
        ):
            console.print(f"with another --optimizer it would: {describe(other[1])}", highlight=False, soft_wrap=True)
        return EXIT_DOES_NOT_FIT
    chosen, found = best
    show_plan(console, found, budget, world_size)
    show_choices(console, _choices(given, found, budget, device), budget)
    settings = _recipe(chosen, found, budget)
    if output := arguments.get("output"):
        _write(Path(output), settings)
        console.print(f"recipe     {output}: galore pretrain --config {output} --data FILE ...", highlight=False, soft_wrap=True)
    else:
        console.print("-o FILE writes this recipe for galore pretrain --config", highlight=False)
    return EXIT_FITS


def _choices(given: Mapping[str, Any], found: Plan, budget: Budget, device: str) -> list[tuple[str, Plan | None]]:
    """The recipe beside those with another answer to what was left open: the least recomputing, or INT8 weights."""

    def best(**settings: Any) -> Plan | None:
        other = best_that_fits({**given, **settings}, budget.bytes, device, traced=False)
        return other and other[1]

    rows: list[tuple[str, Plan | None]] = [("this recipe", found)]
    if found.request.checkpointing and "activation_checkpointing" not in given:
        rank = {"rank": found.request.rank} if "rank" in optimizer_spec(found.request.optimizer).flags else {}
        rows.append(("largest batch without recomputing", best(**rank, activation_checkpointing=False)))
    if "optimizer" not in given:
        for name, optimizer in (("8-bit", "galore_adamw8bit_per_layer"), ("8-bit, INT8 weights", "qgalore_adamw8bit_per_layer")):
            if found.request.optimizer != optimizer:
                rows.append((f"largest rank, {name}", best(optimizer=optimizer)))
    return rows


def _recipe(config: PretrainConfig, found: Plan, budget: Budget) -> dict[str, Any]:
    names: tuple[str, ...] = ("model_config", "hf_model", "max_length", "batch_size", "gradient_accumulation", "optimizer", "rank", "dtype")
    names += ("activation_checkpointing", "vocab_size", "cycle_length", "targets", "gradients", *_CODECS)
    settings = {name: getattr(config, name) for name in names}
    if config.hf_model:
        del settings["model_config"]
    about = f"planned: {describe(found)}; needs {gb(found.needed)} of {gb(budget.bytes)} GB"
    return {"about": about, **{name: value for name, value in settings.items() if value is not None}}


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    with _said_plainly("-o", path), path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def _check_output(path: Path) -> None:
    if path.exists():
        raise UserError(f"-o {path} already exists; give a new name")
    _check_writable("-o", path)


def _check_picture(path: Path) -> None:
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--picture {path} is no picture; give a name that ends in .png")
    _check_writable("--picture", path)


def _check_writable(flag: str, path: Path) -> None:
    """Make the folder of a file that will be written; UserError where the file cannot be, before the work for it."""
    with _said_plainly(flag, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()


@contextmanager
def _said_plainly(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from error


def _side_by_side(console: Console, arguments: Mapping[str, Any], config: PretrainConfig, device: str, budget: Budget | None) -> int:
    """`--compare` and `--sweep rank`: the same run with other optimizers, or other ranks."""
    picture = Path(arguments.get("picture") or f"plan-{'compare' if arguments.get('compare') else 'sweep'}.png")
    _check_picture(picture)
    setting = f"{config.model_name}, {config.torch_dtype}, {config.batch_size} x {config.max_length} tokens"
    rows: Sequence[tuple[str, Plan]]
    if arguments.get("compare"):
        names = COMPARED.items()
        rows = [(label, planned(plan_request(config, device=device, optimizer=name), traced=False)) for label, name in names]
        title, first = f"{setting}, rank {config.resolved_rank}", "optimizer"
    else:
        width = plan_request(config, device=device).sizes.short_side
        ranks = sorted({width // share for share in SHARES if width >= share} | ({config.rank} if config.rank else set()))
        rows = [(str(rank), _with_rank(config, rank, device)) for rank in ranks]
        title, first = f"{setting}, {config.contenders[0][0]}", "rank"
        if len({found.peak for _, found in rows}) == 1 and not rows[0][1].basis:
            raise UserError(f"--sweep rank: the memory of {config.contenders[0][0]} has no rank; choose galore_adamw8bit")
    show_rows(console, title, first, rows, budget)
    draw_bars(picture, title, rows, budget.bytes if budget else None)
    console.print(f"picture    {picture}", highlight=False, soft_wrap=True)
    return EXIT_FITS


def _with_rank(config: PretrainConfig, rank: int, device: str) -> Plan:
    request = plan_request(config, device=device)
    return planned(replace(request, settings={**request.settings, "rank": rank}), traced=False)
