"""Objectives: ``loss(model, batch) -> Loss(value, parts)``, what a training run minimises."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import System

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

    def examples(self, rows: Sequence[dict[str, Any]], tokenizer: Any, *, max_length: int) -> list[Any]:
        """Rows to token examples, in the order of ``rows``; rows that cannot be used are refused."""
        from gossamer.parts.data import tokenise

        return [tokenise(row, tokenizer, max_length=max_length) for row in rows]

    def prepare(self, model: nn.Module, examples: list[Any], tokenizer: Any) -> list[Any]:
        """Add to the examples what is computed once before training (reference log-probs, teacher outputs)."""
        return examples

    def collate(self, examples: list[Any], tokenizer: Any) -> Batch:
        """Examples to one padded batch."""
        from gossamer.parts.data import Collator

        return Collator(tokenizer)(examples)

    def modules(self, model: nn.Module) -> nn.Module | None:
        """Trainable heads that the objective brings, if any."""
        return None
