"""The training loss as one module, so that what wraps a forward pass (compile, data parallel) wraps all of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.train.model.chunked_loss import IGNORED, head_loss

_LOGITS_BYTES = 2**28  # 256 MiB of float32 logits at once, unless --loss_chunk says otherwise


class TokenLoss(nn.Module):
    """The next-token loss of a causal language model.

    Logits exist of `chunk` tokens at once (0: of all, None: of as many as take 256 MiB) where a forward pass has more, `tokens` at most.
    `whole_because`: why the model does not allow that, else "". In training a model's own auxiliary loss is added, such as the one that
    balances a mixture's experts, where its config asks for it (`output_router_logits`); `auxiliary_weight` is its coefficient, or 0.
    """

    def __init__(self, model: nn.Module, chunk: int | None = 0, tokens: int = sys.maxsize) -> None:
        super().__init__()
        self.model = model
        self.whole_because = ""
        self.auxiliary_weight = _auxiliary_weight(model)
        self.auxiliary: Tensor | float = 0.0  # what it added to the last forward pass's sum
        vocabulary = len(model.get_output_embeddings().weight) if chunk is None else 0  # type: ignore[operator]
        self.chunk = settled_chunk(chunk, vocabulary, tokens)
        if self.chunk:
            own = "the balancing loss of the experts comes with them" if self.auxiliary_weight else ""
            self.whole_because = own or _why_not_linear(model, model.get_output_embeddings())  # type: ignore[operator]
            self.chunk = 0 if self.whole_because else self.chunk

    def forward(self, inputs: Tensor | Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Sum over the targets of their cross-entropy in nats, float32 for narrower weights too; `IGNORED` ones count for nothing.

        Where it is trained on, each target that counts adds the weighted auxiliary loss of the batch: a mean over targets is then the
        model's own loss. `inputs` and `targets` are (B, L) token ids on the model's device; of `inputs` also (B, L) each by name, with
        position_ids.
        """
        fields = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
        if self.chunk:
            hidden = self.model.base_model(**fields).last_hidden_state  # type: ignore[operator]  # (B, L, d)
            head = self.model.get_output_embeddings()  # type: ignore[operator]
            return head_loss(hidden.flatten(0, 1), head.weight, targets.flatten(), self.chunk)
        output = self.model(**fields)
        logits = output.logits  # (B, L, vocabulary)
        exact = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(exact, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if self.auxiliary_weight and self.training and torch.is_grad_enabled():
            added = self.auxiliary_weight * (targets != IGNORED).sum() * output.aux_loss.to(loss)
            self.auxiliary = added.detach()
            loss = loss + added
        return loss

    def tokens(self, inputs: Tensor | Mapping[str, Tensor], targets: Tensor) -> int:
        """How many tokens are trained on."""
        return counted(targets)


def attends_across(model: nn.Module) -> bool:
    """Whether of two texts in one sequence, with positions that begin anew, the second sees the first. By a look at eight tokens."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return True
    training = model.training
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0]], device=device)
    positions = torch.arange(4, device=device).repeat(2)[None].expand(2, 8)
    model.eval()
    try:
        with torch.no_grad():
            # A cache, which training does without, would take its own word for where texts begin.
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
            alone = model(input_ids=ids[:1, 4:], position_ids=positions[:1, 4:], use_cache=False).logits.float()
    finally:
        model.train(training)
    near = 0.02 * alone.std() if logits.dtype != torch.float32 else 1e-3 * alone.std()
    return bool((logits - alone).abs().max() > near)


def sees_ahead(model: nn.Module) -> bool:
    """Whether a token's logits depend on those behind it, which they are to predict. By a look at eight tokens."""
    training = model.training
    ids = torch.tensor([[0, 1, 0, 1, *[last] * 4] for last in (0, 1)], device=next(model.parameters()).device)
    model.eval()
    try:
        with torch.no_grad():
            one, other = model(input_ids=ids).logits[:, :4]
    finally:
        model.train(training)
    near = (0.02 if one.dtype != torch.float32 else 1e-3) * one.float().std()
    return bool((one.float() - other.float()).abs().max() > near)


def _auxiliary_weight(model: nn.Module) -> float:
    """The coefficient of the loss that the model's config adds to the cross-entropy of its tokens; 0: none."""
    config: Any = getattr(model, "config", None)
    text = config and config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return 0.0
    weight: Any = getattr(text, "router_aux_loss_coef", None) or getattr(model, "router_aux_loss_coef", 0.0)
    return float(weight)


def settled_chunk(chunk: int | None, vocabulary: int, tokens: int) -> int:
    """How many of a forward pass's `tokens` have logits at once, 0: all; `chunk` as `TokenLoss` takes it."""
    if chunk is None:
        chunk = max(1, _LOGITS_BYTES // (4 * vocabulary))
    return chunk if chunk < tokens else 0


def _why_not_linear(model: nn.Module, head: nn.Module | None) -> str:
    """Why the logits are not `head(hidden)` and nothing more, else "": some families cap or scale them. By a look at two tokens."""
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return f"the head is {'a Linear with a bias' if isinstance(head, nn.Linear) else type(head).__name__}"
    if getattr(model, "base_model", model) is model:
        return f"{type(model).__name__} does not say what comes before its head"
    training = model.training
    ids = torch.arange(2, device=head.weight.device)[None]
    model.eval()  # no dropout: it would tell the two passes apart, and draw from the run's random numbers
    try:
        with torch.no_grad():
            same = torch.equal(model(input_ids=ids).logits, head(model.base_model(input_ids=ids).last_hidden_state))
    finally:
        model.train(training)
    return "" if same else f"{type(model).__name__} changes the logits after its head"


def counted(targets: Tensor) -> int:
    """How many targets count."""
    return int((targets != IGNORED).sum())


def places(inputs: Tensor | Mapping[str, Tensor]) -> int:
    """How many tokens a forward pass computes, padding too."""
    return (inputs["input_ids"] if isinstance(inputs, Mapping) else inputs).numel()
