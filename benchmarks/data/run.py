"""Is text ready when the model wants it? Tokens a second of the streaming loader, beside those of training, and the time waited for text.

Everything takes turns in one process; medians are compared. A loader is started anew for each turn, so its start is in its
time, and so is what its threads have made beyond the last batch.
The processor's time of all threads is counted beside the clock's: busy neighbours stretch the one and not the other.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleave import timed
from report import heading, progress, table
from small_llama import Nobody

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.data.loader import Batches, TokenData, load_data
from galore_torch.train.data.readers import stdlib_documents
from galore_torch.train.loop.build import model_for
from galore_torch.train.loop.result import RunResult
from galore_torch.train.loop.tasks import task_for
from galore_torch.train.loop.trainer import _Loop
from galore_torch.train.model.loss import counted
from galore_torch.train.optimizers.registry import build_optimizer, optimizer_spec

LENGTH = 256  # tokens of one sequence, as published
WORKERS = (0, 1, 2)
MODELS = {"demo": 8, "60m": 2}  # preset -> sequences in one update here


@dataclass
class Loader:
    """Batches of 16 sequences from a fresh start."""

    config: PretrainConfig
    data: TokenData
    batches: int
    speeds: list[float] = field(default_factory=list)  # targets that count, a second
    costs: list[float] = field(default_factory=list)  # seconds of the processor for one of them

    def turn(self) -> None:
        drawn: list[int] = []

        def draw() -> None:
            stream = self.data.batches(self.config)
            drawn.extend(counted(next(stream)[1]) for _ in range(self.batches))
            stream.close()

        before = time.process_time()
        seconds = timed(draw)
        self.speeds.append(sum(drawn) / seconds)
        self.costs.append((time.process_time() - before) / sum(drawn))


@dataclass
class Training:
    """Updates of one model on text that streams."""

    loop: _Loop
    stream: Batches
    speeds: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # share of an update's seconds

    @classmethod
    def of(cls, config: PretrainConfig, data: TokenData) -> Training:
        model, lr = model_for(config, data), optimizer_spec("galore_adamw").default_lr
        optimizer = build_optimizer("galore_adamw", model, lr=lr, settings=config.optimizer_settings)
        task, result = task_for(config, data), RunResult("galore_adamw", lr)
        own_loss = task.loss(model).train()
        loop = _Loop(config, model, optimizer, data, task, own_loss, "cpu", result, io.StringIO(), Nobody(), folder=Path())
        return cls(loop, data.batches(config))

    def turn(self) -> None:
        seen, before = self.loop.result.tokens_seen, time.process_time()
        self.loop.update(len(self.speeds) + 1, self.stream)
        self.costs.append((time.process_time() - before) / (self.loop.result.tokens_seen - seen))
        row = json.loads(self.loop.metrics.getvalue().splitlines()[-1])  # type: ignore[attr-defined]
        self.speeds.append(row["tokens_per_s"])
        self.waited.append(row["data_s"] / row["seconds"])


def written(folder: Path) -> str:
    """The standard library's source as a .jsonl file."""
    path = folder / "stdlib.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in stdlib_documents()), encoding="utf-8")
    return str(path)


def measure(arguments: argparse.Namespace, files: tuple[str, ...]) -> None:
    base = PretrainConfig(
        model_config="60m", data=files, tokenizer=arguments.tokenizer, stream=True, max_length=LENGTH, batch_size=16, eval_tokens=LENGTH
    )
    data = load_data(base)
    loaders = {
        (pad, workers): Loader(replace(base, pad_documents=pad, workers=workers), data, arguments.batches)
        for pad, workers in itertools.product((False, True), WORKERS)
    }
    trainings: dict[tuple[str, int], Training] = {}
    for (name, sequences), workers in itertools.product(MODELS.items(), (0, 2)):
        config = replace(base, model_config=name, batch_size=sequences, workers=workers, num_training_steps=10**6, update_proj_gap=200)
        trainings[name, workers] = Training.of(config, load_data(replace(config, vocab_size=base.embedding_rows)))
    turns: list[Callable[[], None]] = [contender.turn for contender in (*loaders.values(), *trainings.values())]
    for turn in range(arguments.rounds + 1):  # the first one warms up
        progress(f"turn {turn} of {arguments.rounds}")
        for call in turns:
            call()
    progress("")
    for training in trainings.values():
        training.stream.close()

    speed = {name: statistics.median(training.speeds[1:]) for name, training in trainings.items()}
    cost = {name: statistics.median(training.costs[1:]) for name, training in trainings.items()}
    print(heading(f"sequences of {LENGTH}, {data.tokenizer.size} ids, medians of {arguments.rounds} turns"))
    rows = []
    for (pad, workers), loader in loaders.items():
        tokens = statistics.median(loader.speeds[1:])
        ratios = [f"{tokens / speed[name, 2]:.0f}" for name in MODELS]
        shares = [f"{statistics.median(loader.costs[1:]) / cost[name, 2]:.2%}" for name in MODELS]
        rows.append(["padded" if pad else "packed", str(workers), f"{tokens:,.0f}", *ratios, *shares])
    header = [*(f"/ training {name}" for name in MODELS), *(f"processor time, of {name}'s" for name in MODELS)]
    print(table(["rows", "workers", "loader tokens/s", *header], rows) + "\n")
    rows = [
        [name, str(workers), f"{speed[name, workers]:,.0f}", f"{statistics.median(training.waited[1:]):.2%}"]
        for (name, workers), training in trainings.items()
    ]
    print(table(["model", "workers", "training tokens/s", "of its time waiting for text"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", help="text files; default: the source of Python's standard library")
    parser.add_argument("--tokenizer", help="default: a BPE of 32,000 ids trained on the text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=48, help="of 16 sequences, drawn in one turn of a loader")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, tuple(arguments.data or [written(Path(folder))]))


if __name__ == "__main__":
    main()
