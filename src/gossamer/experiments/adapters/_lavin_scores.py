"""Scores of the LaVIN experiment without generation: answers that greedy decoding would give, and losses by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapters.lavin import LaVIN

ROWS = 32
LONGEST = 96  # tokens of a continuation
Scores = tuple[list[int], list[float]]  # for each item: 1 where every token is the likeliest; mean loss a token


@torch.no_grad()
def answered(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> Scores:
    """The answers of ``rows`` and their ends after the prompts."""
    examples = processor.examples(rows)
    return _in_batches(model, processor.collate, examples)


@torch.no_grad()
def continued(model: Any, processor: Any, pairs: Sequence[tuple[str, str]]) -> Scores:
    """The second text of each pair after the first, bare of any prompt."""
    examples = []
    for start, end in pairs:
        first, second = (processor(text, add_special_tokens=False)["input_ids"] for text in (start, end))
        second = second[:LONGEST]
        ids = [processor.bos_token_id, *first, *second]
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) - len(second)) + second})
    return _in_batches(model, lambda chosen: _padded(chosen, processor.pad_token_id), examples)


def _in_batches(model: Any, collate: Any, examples: Sequence[dict[str, Any]]) -> Scores:
    """By length, so that little is padded; in the order of ``examples``."""
    right, losses = [0] * len(examples), [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda place: len(examples[place]["input_ids"]))
    for start in range(0, len(order), ROWS):
        places = order[start : start + ROWS]
        batch = collate([examples[place] for place in places])
        labels = batch.pop("labels")
        for place, mark, value in zip(places, *_scored(_logits(model, batch), labels), strict=True):
            right[place], losses[place] = mark, value
    return right, losses


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[b, t, V] in float32; a model without the adapter gets tokens only."""
    own = hasattr(model, LaVIN.slot)
    given = batch if own else {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**given, use_cache=False).logits
    return logits.float()


def _scored(logits: Tensor, labels: Tensor) -> Scores:
    said, targets = logits[:, :-1], labels[:, 1:]
    counted = targets != -100
    wrong = (said.argmax(-1) != targets) & counted
    losses = nn.functional.cross_entropy(said.transpose(1, 2), targets, reduction="none")
    return (~wrong.any(1)).long().tolist(), (losses.sum(1) / counted.sum(1)).tolist()


def _padded(examples: Sequence[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    width = max(len(example["input_ids"]) for example in examples)

    def filled(key: str, fill: int) -> Tensor:
        return torch.tensor([example[key] + [fill] * (width - len(example[key])) for example in examples])

    mask = torch.tensor([[place < len(example["input_ids"]) for place in range(width)] for example in examples])
    return {"input_ids": filled("input_ids", pad), "labels": filled("labels", -100), "attention_mask": mask.long()}
