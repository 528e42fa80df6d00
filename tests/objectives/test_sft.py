"""SFT: the weighted mean of token losses, whatever the padding and the order of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.objectives.sft import SFT

ROWS = [{"prompt": "ab", "completion": "cde"}, {"text": "abcdefgh", "weight": 0.5}, {"prompt": "a", "completion": "b"}]


def naive(model: Any, examples: list[Any]) -> torch.Tensor:
    """One row and one token at a time."""
    total, amount = torch.tensor(0.0), 0.0
    for example in examples:
        logprobs = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for place in range(1, len(example.input_ids)):
            if example.labels[place] != -100:
                total = total - example.weights[place] * logprobs[place - 1, example.labels[place]]
                amount += example.weights[place]
    return total / amount


def test_value_and_gradients_are_those_of_the_naive_sum(tokenizer: Any, make_model: Any) -> None:
    objective, model, other = SFT(), make_model(), make_model()
    examples = objective.examples(ROWS, tokenizer, max_length=32)
    loss = objective.loss(model, objective.collate(examples, tokenizer)).value
    expected = naive(other, examples)
    loss.backward()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


def test_amounts_add_up_over_micro_batches(tokenizer: Any, make_model: Any) -> None:
    objective, model = SFT(), make_model()
    examples = objective.examples(ROWS, tokenizer, max_length=32)
    whole = objective.collate(examples, tokenizer)
    halves = [objective.collate(examples[:1], tokenizer), objective.collate(examples[1:], tokenizer)]
    total = sum(objective.amount(half) for half in halves)
    assert total == pytest.approx(objective.amount(whole))
    parts = sum(objective.loss(model, {**half, "normaliser": total}).value for half in halves)
    assert float(parts) == pytest.approx(float(objective.loss(model, whole).value), abs=1e-6)


def test_a_preference_row_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"row 1: must be of the shape.*got preference"):
        SFT().examples([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, max_length=8)
