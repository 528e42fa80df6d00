"""Objectives: ``loss(model, batch) -> Loss(value, parts)``, what a training run minimises."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System
from gossamer.parts.data import Collator, as_row, tokenise

Batch = dict[str, Any]


@dataclasses.dataclass
class Loss:
    """``value`` is the scalar to minimise; ``parts`` are scalars to log, detached."""

    value: Tensor
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


class Objective(System):
    """A loss over batches.

    The loss of a batch is a sum over its items divided by ``batch["normaliser"]`` where the trainer gives one (the
    total :meth:`amount` over all micro-batches of a step, so that gradient accumulation equals one large batch), else
    by the batch's own amount.
    """

    verb = "loss"
    rows: ClassVar[tuple[str, ...]] = ("messages", "completion", "text")  # row shapes that it trains on
    packs: ClassVar[bool] = False  # several examples may share a row
    likelihood: ClassVar[bool] = False  # it is the weighted mean of -log p at the positions that `logits` gives

    def check(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        if not batch or int(batch["input_ids"].shape[0]) == 0:
            raise InputError(f"{self.name}.loss", must="get at least one row", got="an empty batch")

    def finish(self, result: Loss, *args: Any, **kwargs: Any) -> Loss:
        if not torch.isfinite(result.value):
            raise InputError(
                f"{self.name}.loss",
                must="be finite",
                got=float(result.value),
                do="lower the learning rate, or look for rows without supervised tokens with `gossamer check`",
            )
        return result

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of one batch."""

    def amount(self, batch: Batch) -> float:
        """What the batch counts for in the normaliser: supervised weight for tokens, rows for pairs."""
        return float(batch["input_ids"].shape[0])

    def normaliser(self, batch: Batch) -> float:
        """``batch["normaliser"]`` or, without one, the batch's own amount."""
        return float(batch.get("normaliser", self.amount(batch)))

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of the predicted positions and their weights [n]; only where :attr:`likelihood` holds."""
        raise NotImplementedError(f"{self.name} is no likelihood")

    def narrow(self, batch: Batch, share: float) -> Batch:
        """The first ``share`` of the batch's rows, at least one, without the normaliser."""
        rows = batch["input_ids"].shape[0]
        return select_rows(batch, torch.arange(max(1, round(share * rows))))

    def examples(self, rows: Sequence[Any], tokenizer: Any, *, max_length: int) -> list[Any]:
        """Rows to token examples, in the order of ``rows``; a row of a shape that it cannot train on is refused."""
        checked = [as_row(row) for row in rows]
        for row in checked:
            if row.shape not in self.rows:
                raise InputError(
                    f"{self.name}: {row.file} row {row.number}",
                    must=f"be of the shape {' or '.join(self.rows)}",
                    got=row.shape,
                    do="choose the objective for these rows, or other rows",
                )
        return [tokenise(row, tokenizer, max_length=max_length) for row in checked]

    def prepare(self, model: nn.Module, examples: list[Any], tokenizer: Any) -> list[Any]:
        """Add to the examples what is computed once before training (reference log-probs, teacher outputs)."""
        return examples

    def collate(self, examples: list[Any], tokenizer: Any) -> Batch:
        """Examples to one padded batch."""
        return Collator(tokenizer)(examples)

    def modules(self, model: nn.Module) -> nn.Module | None:
        """Trainable heads that the objective brings, if any."""
        return None


def token_batch(batch: Mapping[str, Any]) -> Batch:
    """The batch as :mod:`gossamer.parts.data` made it: without what trainer and objective added to it."""
    return {key: batch[key] for key in batch if key != "normaliser" and not key.startswith("reference_")}


def select_rows(batch: Mapping[str, Any], rows: Tensor) -> Batch:
    """These rows of every tensor, without the normaliser, which held for all of them."""
    everything = batch["input_ids"].shape[0]
    return {
        key: item[rows] if isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == everything else item
        for key, item in batch.items()
        if key != "normaliser"
    }


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module inside, each module's own mode again after; gradients flow as usual."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
