"""Models with a head for a task: any encoder or decoder of transformers as a classifier, and its loss. transformers is imported late."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.train.errors import UserError, first_line
from galore_torch.train.model.freeze import freeze, new_head
from galore_torch.train.model.llama import finish
from galore_torch.train.model.pretrained import refuse_absent, sketch
from galore_torch.train.model.sizes import Sizes, Targets, sizes_of


def load_classifier(
    name: str, labels: tuple[str, ...], *, seed: int = 0, dtype: str = "float32", activation_checkpointing: bool = False
) -> Any:
    """The model `name` with a head for `labels`, on the CPU, ready to train; no labels: one number, for regression.

    The seed's random numbers make the weights that the model does not have, the head's. Inside `torch.device("meta")` none has values.
    """
    from transformers import AutoModelForSequenceClassification

    head: dict[str, Any] = {"num_labels": len(labels) or 1, "problem_type": "single_label_classification" if labels else "regression"}
    if labels:
        head |= {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    torch.manual_seed(seed)
    try:
        if torch.get_default_device().type == "meta":
            config = sketch(name)
            for key, value in head.items():
                setattr(config, key, value)
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, ignore_mismatched_sizes=True, output_loading_info=True, **head
            )
            refuse_absent(f"--model_name_or_path {name} is no whole model", found, _may_be_new(model))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name} cannot be loaded as a classifier: {first_line(error)}") from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return finish(model.train(), dtype=dtype, activation_checkpointing=activation_checkpointing)


def _may_be_new(model: nn.Module) -> set[str]:
    """Names of the parameters that a model need not bring: of the head, and of a pooler, which not all pre-training has."""
    head = {id(p) for p in new_head(model).parameters()}
    return {name for name, p in model.named_parameters() if id(p) in head or ".pooler." in name}


@lru_cache(maxsize=4)
def classifier_sizes(name: str, targets: Targets = None, frozen: tuple[str, ...] = ()) -> Sizes:
    """Parameters of the model `name` with a head for two classes. Activations: those of no family that the formulas know.

    `frozen`: patterns of --freeze.
    """
    with torch.device("meta"):
        model = load_classifier(name, ("0", "1"))
    freeze(model, frozen)
    return replace(sizes_of(model, targets), like_llama=False)


class LabelLoss(nn.Module):
    """The loss of a classifier, or of a regression: the sum over examples of cross-entropy in nats, or of squared errors."""

    whole_because = ""  # as of `TokenLoss`: there are no logits over a vocabulary
    auxiliary_weight = 0.0
    auxiliary = 0.0

    def __init__(self, model: nn.Module, regression: bool) -> None:
        super().__init__()
        self.model, self.regression = model, regression
        self._takes = set(inspect.signature(model.forward).parameters)

    def forward(self, inputs: Mapping[str, Tensor], targets: Tensor | None = None) -> Tensor:
        """`inputs`: (B, L) of each name that the tokenizer gives; `targets` (B,): classes as int64, or numbers as float32.

        Without targets the logits: (B, classes), or (B, 1) for regression, float32 for narrower weights too.
        """
        logits: Tensor = self.model(**{name: value for name, value in inputs.items() if name in self._takes}).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if targets is None else self.of_logits(logits, targets)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The same of logits that are there."""
        if self.regression:
            return (logits[:, 0] - targets).square().sum()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def tokens(self, inputs: Mapping[str, Tensor], targets: Tensor) -> int:
        """How many tokens are read, padding left out."""
        return int(inputs["attention_mask"].sum())
