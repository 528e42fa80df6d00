"""The model's own loss: transformers' value on texts, exact over micro-batches, batches of a processor, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.objectives.own_loss import OwnLoss
from gossamer.testing.bench import Bench

ROWS = [{"text": "The old grey roof."}, {"text": "Rain falls on it, and on the long branch."}]


class _Processor:
    """As an architecture of images brings one."""

    def examples(self, rows: list[dict[str, Any]]) -> list[float]:
        return [float(row["value"]) for row in rows]

    def collate(self, examples: list[float]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(examples), 1), "values": torch.tensor(examples)}


class _Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids: torch.Tensor, values: torch.Tensor) -> Any:
        return SimpleNamespace(loss=(self.scale * values).mean())


def test_on_texts_it_is_the_loss_of_transformers() -> None:
    bench = Bench("llama")
    model, tokenizer, objective = bench.model(), bench.tokenizer(), OwnLoss()
    batch = objective.collate(objective.examples(ROWS, tokenizer, max_length=64), tokenizer)
    names = ("input_ids", "attention_mask", "labels")
    expected = model(**{name: batch[name] for name in names}).loss
    assert torch.allclose(objective.loss(model, batch).value, expected, atol=1e-6)


def test_a_processor_makes_the_batches_and_micro_batches_add_up() -> None:
    objective, processor, model = OwnLoss(), _Processor(), _Mean()
    examples = objective.examples([{"value": 1}, {"value": 2}, {"value": 6}], processor, max_length=8)
    whole = objective.loss(model, objective.collate(examples, processor)).value
    assert whole.item() == pytest.approx(6.0)
    parts = [objective.collate(part, processor) | {"normaliser": 3.0} for part in (examples[:1], examples[1:])]
    assert sum(objective.loss(model, part).value.item() for part in parts) == pytest.approx(whole.item())


def test_weighted_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"have no weight.*choose sft"):
        OwnLoss().examples([{"text": "a", "weight": 2.0}], Bench("llama").tokenizer(), max_length=8)


def test_a_model_without_a_loss_is_refused() -> None:
    bench = Bench("bert")
    with pytest.raises(InputError, match="returns a loss"):
        OwnLoss().loss(bench.model(), bench.inputs())
