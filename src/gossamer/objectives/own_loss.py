"""The model's own loss: what ``model(**batch).loss`` gives, for models whose forward knows what to minimise.

    L = loss(batch) * amount(batch) / N

with N the sum of amounts over everything that one optimizer step sees; the amount is what the model's loss is a mean
over: predicted labels, or rows where a batch has no token labels (then rows of different micro-batches do not meet, as
the negatives of a contrastive loss would). A processor with ``examples`` and ``collate`` makes the batches of images
and videos; a plain tokenizer gives those of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config
from gossamer.kinds.objectives import Batch, Loss, Objective
from gossamer.parts.data import as_row

CARD = Card(
    title="The model's own loss",
    claim="trains any architecture of this package by the loss that it returns",
    modality=("text", "image", "video"),
    builtin=True,
)


class OwnLossConfig(Config):
    """It has no options: the model's config rules its loss."""


class OwnLoss(Objective):
    """For architectures of images and videos, and for language modelling as transformers defines it."""

    config_class = OwnLossConfig
    rows = ("text",)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        inputs = {key: value for key, value in batch.items() if key not in ("normaliser", "loss_weights")}
        found = getattr(model(**inputs), "loss", None)
        if found is None:
            raise InputError(
                f"{self.name}.loss",
                must="get a model that returns a loss for these rows",
                got=type(model).__name__,
                do="give rows with answers, or choose another objective",
            )
        return Loss(found * (self.amount(batch) / self.normaliser(batch)))

    def amount(self, batch: Batch) -> float:
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
            return float((labels[:, 1:] != -100).sum())
        return super().amount(batch)

    def examples(self, rows: Sequence[Any], tokenizer: Any, *, max_length: int) -> list[Any]:
        if hasattr(tokenizer, "examples"):
            return list(tokenizer.examples(rows))
        for row in map(as_row, rows):
            if row.weight != 1:
                raise InputError(
                    f"{self.name}: {row.file} row {row.number}",
                    must="have no weight, which the model's own loss cannot honour",
                    got=row.weight,
                    do="choose sft",
                )
        return super().examples(rows, tokenizer, max_length=max_length)

    def collate(self, examples: list[Any], tokenizer: Any) -> Batch:
        if hasattr(tokenizer, "collate"):
            return dict(tokenizer.collate(examples))
        return super().collate(examples, tokenizer)
