"""Weighted negative log-likelihood, with logits only where there is loss.

    L = sum_i sum_t  w[i, t] * -log p(y[i, t] | y[i, <t])  /  normaliser

in float32, the sum over positions whose label is not -100. The normaliser is the sum of weights over everything that
one optimizer step sees (all micro-batches, all processes), which only the trainer knows: dividing each micro-batch by
its own sum would weigh tokens by the company they keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.data_batch import model_inputs
from gossamer.parts.data_tokens import IGNORE

_CHUNK_LOGITS = 2**25  # float32 copies of logits are made for at most so many at a time


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor, normaliser: float | Tensor) -> Tensor:
    """The loss above from full logits [b, t, V], labels [b, t] and their weights [b, t]; shifts inside. Scalar."""
    mask = label_mask(labels)
    return selected_nll(logits[mask], shifted(labels, IGNORE)[mask], shifted(weights, 0.0)[mask], normaliser)


def selected_nll(logits: Tensor, targets: Tensor, weights: Tensor, normaliser: float | Tensor) -> Tensor:
    """The same from what :func:`supervised_logits` gives: [n, V], [n], [n]. Zero (with a graph) where n is 0."""
    return (token_nll(logits, targets) * weights.float()).sum() / normaliser


def weighted_loss(model: Any, batch: Mapping[str, Any], normaliser: float | Tensor | None = None) -> Tensor:
    """Loss of one batch; the normaliser is the batch's own sum of weights if none is given."""
    logits, targets, weights = supervised_logits(model, batch)
    return selected_nll(logits, targets, weights, weight_sum(batch) if normaliser is None else normaliser)


def weight_sum(batch: Mapping[str, Any]) -> Tensor:
    """Sum of the weights of the labels that are predicted: what a batch adds to the normaliser. Scalar float32."""
    weights = batch["loss_weights"]
    return (shifted(weights, 0.0) * label_mask(batch["labels"])).sum()


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in float32: [n, V], [n] -> [n], in chunks that bound the float32 copies."""
    rows = max(1, _CHUNK_LOGITS // logits.shape[-1])
    parts = [
        F.cross_entropy(logits[at : at + rows].float(), targets[at : at + rows], reduction="none")
        for at in range(0, max(len(targets), 1), rows)
    ]
    return torch.cat(parts)


def supervised_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V], targets [n] and weights [n] at the n positions that predict a label, row by row, left to right.

    The model runs as a whole, but its output layer gets only those n hidden states, so that logits of other positions
    are never made and whatever the model does to logits (soft-capping, scaling) still happens. A model whose output
    layer cannot be told gives full logits first. Differentiable; works through PEFT and DistributedDataParallel.
    """
    labels = batch["labels"]
    mask = label_mask(labels)
    weights = batch.get("loss_weights")
    weights = torch.ones(labels.shape, device=labels.device) if weights is None else weights
    targets = shifted(labels, IGNORE)[mask]
    inner = _unwrapped(model)
    inputs = model_inputs(inner, batch)
    virtual = _virtual_tokens(inner)
    with _selected_states(inner, mask, virtual) as used:
        logits = model(**inputs).logits
    if not used:
        logits = _own_positions(logits, mask, virtual)[mask]
    elif logits.shape[:2] != (1, len(targets)):
        raise InputError(
            type(inner).__name__, must=f"give one logit row for each of {len(targets)} states", got=tuple(logits.shape)
        )
    else:
        logits = logits[0]
    return logits, targets, shifted(weights, 0.0)[mask]


def label_mask(labels: Tensor) -> Tensor:
    """[b, t], True where the position predicts a label, i.e. where the *next* label is not -100."""
    return shifted(labels, IGNORE) != IGNORE


def shifted(values: Tensor, fill: float) -> Tensor:
    """[b, t] moved one to the left, ``fill`` at the end: what position t predicts."""
    return F.pad(values[:, 1:], (0, 1), value=fill)


@contextlib.contextmanager
def _selected_states(model: Any, mask: Tensor, virtual: int) -> Iterator[list[bool]]:
    """While open, the output layer sees [1, n, H] instead of [b, t, H]; the list is non-empty once that happened."""
    used: list[bool] = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        yield used
        return

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0]
        if used or hidden.dim() != 3:
            return None
        used.append(True)
        return (_own_positions(hidden, mask, virtual)[mask][None], *arguments[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield used
    finally:
        handle.remove()


def _own_positions(states: Tensor, mask: Tensor, virtual: int) -> Tensor:
    """Drop the virtual tokens of prompt tuning, which stand before the batch's own."""
    extra = states.shape[1] - mask.shape[1]
    if states.shape[0] != mask.shape[0] or extra not in (0, virtual):
        must, got = f"keep the batch's shape {tuple(mask.shape)}", tuple(states.shape[:2])
        raise InputError("the model", must=must, got=got, do="give labels of the length that its hidden states have")
    return states[:, extra:]


def _virtual_tokens(model: Any) -> int:
    configs = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(configs, dict) and isinstance(active, str) else None
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def _unwrapped(model: Any) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
