"""What differs between the things that one loop trains: the loss, and what an evaluation says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from galore_torch.train.config.config import PretrainConfig
from galore_torch.train.config.finetune import FinetuneConfig
from galore_torch.train.data.loader import Data, TokenData, windows_in_order
from galore_torch.train.data.tasks import TaskData
from galore_torch.train.errors import UserError
from galore_torch.train.loop.distributed import Ranks
from galore_torch.train.loop.evaluate import held_out_answers, held_out_loss, published_loss
from galore_torch.train.loop.result import perplexity
from galore_torch.train.loop.scores import scores_of
from galore_torch.train.model.heads import LabelLoss
from galore_torch.train.model.loss import TokenLoss, attends_across, sees_ahead

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where and when an evaluation takes place; `last`: after the run's last step."""

    device: str
    ranks: Ranks
    should_stop: Callable[[], bool]
    last: bool


class Task(Protocol):
    """The loss of a model, and fields of an evaluation's row: eval_loss, and more; None where `should_stop` asked to give up."""

    length: float  # tokens of a sequence, on the average

    def loss(self, model: nn.Module) -> Any: ...
    def evaluate(self, loss: Any, place: Place) -> dict[str, Any] | None: ...
    def value(self, row: dict[str, Any]) -> float | None:
        """How good the model is by an evaluation's row: the best one is kept. None: none is."""


def task_for(config: PretrainConfig, data: Data) -> Task:
    """The task that the data are of."""
    if isinstance(data, TokenData):
        return Pretraining(config, data)
    assert isinstance(data, TaskData)
    assert isinstance(config, FinetuneConfig)
    return Prompts(config, data) if data.labels is None else Labels(config, data)


class Pretraining:
    """The next token of every token."""

    def __init__(self, config: PretrainConfig, data: TokenData) -> None:
        self.config, self.data = config, data
        self.length = float(config.max_length)

    def loss(self, model: nn.Module) -> TokenLoss:
        _check_causal(self.config, model)
        return TokenLoss(model, self.config.loss_chunk, self.config.tokens_at_once)

    def evaluate(self, loss: TokenLoss, place: Place) -> dict[str, Any] | None:
        row = _token_row(place.ranks.mean(held_out_loss(loss, self._windows(place.ranks), place.device, place.should_stop)))
        legacy = self._legacy(loss, place) if self.config.legacy_eval else {}
        return None if row is None or legacy is None else row | legacy

    def value(self, row: dict[str, Any]) -> float | None:
        return None

    def _windows(self, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        batches = windows_in_order(self.data.held_out, self.config.max_length, self.config.batch_size, ranks.rank, ranks.size)
        return ranks.in_step(batches) if ranks.sharded else batches

    def _legacy(self, loss: TokenLoss, place: Place) -> dict[str, float] | None:
        """The published script's figure, under names of its own."""
        own = published_loss(loss, self._windows(place.ranks), place.device, place.should_stop, last=place.last)
        found = place.ranks.mean(None if own is None else (own, 1))
        return None if found is None else {"legacy_eval_loss": found[0], "legacy_eval_perplexity": perplexity(found[0])}


class Prompts:
    """The tokens of answers. Every process evaluates all of them."""

    def __init__(self, config: FinetuneConfig, data: TaskData) -> None:
        self.config, self.data = config, data
        self.length = float(data.train.lengths.double().mean())

    def loss(self, model: nn.Module) -> TokenLoss:
        _check_causal(self.config, model)
        if self.config.packing and attends_across(model):
            raise UserError(
                f"--packing: in {type(model).__name__} the examples of one sequence see each other, as it does not tell them apart by "
                "their positions; leave it out"
            )
        return TokenLoss(model, self.config.loss_chunk, self.config.tokens_at_once)

    def evaluate(self, loss: TokenLoss, place: Place) -> dict[str, Any] | None:
        found = held_out_loss(loss, self.data.held_out[""].in_order(self.config.eval_batch_size), place.device, place.should_stop)
        return None if place.ranks.any(found is None) else _token_row(found)

    def value(self, row: dict[str, Any]) -> float | None:
        return -float(row["eval_loss"])


class Labels:
    """Classes, or numbers. Every process evaluates all of them: a score is no mean of parts' scores."""

    def __init__(self, config: FinetuneConfig, data: TaskData) -> None:
        self.config, self.data = config, data
        self.length = float(data.train.lengths.double().mean())

    def loss(self, model: nn.Module) -> LabelLoss:
        return LabelLoss(model, regression=not self.data.labels)

    def evaluate(self, loss: LabelLoss, place: Place) -> dict[str, Any] | None:
        row: dict[str, Any] = {}
        scores: dict[str, float] = {}
        for suffix, examples in self.data.held_out.items():
            found = held_out_answers(loss, examples.in_order(self.config.eval_batch_size), place.device, place.should_stop)
            if place.ranks.any(found is None) or found is None:
                return None
            mean, predicted, answers = found
            row |= {f"eval_loss{suffix}": mean, f"eval_examples{suffix}": len(answers)}
            if predicted.isfinite().all():
                scores |= {name + suffix: score for name, score in scores_of(self.data.scores, predicted, answers).items()}
        return row | {"scores": scores}

    def value(self, row: dict[str, Any]) -> float | None:
        return next(iter(row["scores"].values()), None)


def _check_causal(config: PretrainConfig, model: nn.Module) -> None:
    """Refuse a given model that reads the answer: transformers makes a language model of an encoder too."""
    if config.hf_model and sees_ahead(model):
        raise UserError(
            f"--hf_model {config.hf_model} is no causal language model: {type(model).__name__} sees the tokens that it is to predict; "
            "give a decoder, such as a LLaMA or GPT-2"
        )


def _token_row(found: tuple[float, int] | None) -> dict[str, Any] | None:
    """Of (mean loss, tokens)."""
    if found is None:
        return None
    mean, tokens = found
    return {"eval_loss": mean, "eval_perplexity": perplexity(mean), "eval_tokens": tokens}
