"""Losses of whole models: the real loss that the search looks at, and distillation between two cuts.

Distillation minimises, over tokens without padding,

    l1 L_task + l2 KL(teacher || student) + l3 mean_k ( |h_k - h_k^T|^2 / |h_k^T|^2 )

with the hidden states of the same layer ``k`` of the uncut teacher; the width of the stream never changes. Each layer's
distance is divided by the teacher's own size (the group's later SquareHead), which keeps it stable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import registry
from gossamer.parts.calibration import Batch, at_rest, moved, token_count

_BATCH = 8  # rows of a step
_IGNORE = -100


def loss_of(model: Any, batches: Sequence[Batch]) -> Callable[[Any], float]:
    """The mean loss of a model made of ``model``: of its labels where the batches have them, of the next token where it
    generates, else the squared distance of its outputs from those that ``model`` has now, relative to their size."""
    tokens = [token_count(batch) for batch in batches]
    references: list[Tensor] = []
    if not _has_task(model, batches[0]):
        with at_rest(model):
            references = [_outputs(model, batch) for batch in batches]

    def loss(changed: Any) -> float:
        total = 0.0
        with at_rest(changed):
            for place, batch in enumerate(batches):
                if references:
                    there = references[place]
                    value = (_outputs(changed, batch) - there).square().sum() / there.square().sum()
                else:
                    value = changed(**moved(_labelled(changed, batch), changed)).loss
                total += float(value) * tokens[place]
        return total / sum(tokens)

    return loss


class Distillation:
    """The objective of :func:`tune`, as the trainer takes it; ``weights`` are those of task, logits and tokens."""

    name = "ziplm"
    seed = 0

    def __init__(self, teacher: Any, weights: Sequence[float]) -> None:
        self.teacher, self.weights = teacher, tuple(weights)

    def examples(self, rows: Sequence[Any], tokenizer: Any, *, max_length: int) -> list[Any]:
        return list(rows)

    def prepare(self, model: nn.Module, examples: list[Any], tokenizer: Any) -> list[Any]:
        return examples

    def modules(self, model: nn.Module) -> nn.Module | None:
        return None

    def collate(self, examples: list[Any], tokenizer: Any) -> dict[str, Any]:
        """Rows to a batch, padded on the right."""
        longest = max(len(row["input_ids"]) for row in examples)
        batch: dict[str, Any] = {}
        for key, first in examples[0].items():
            fill = _IGNORE if key == "labels" else 0
            rows = [row[key] if first.ndim == 0 else F.pad(row[key], (0, longest - len(row[key])), value=fill)
                    for row in examples]  # fmt: skip
            batch[key] = torch.stack(rows)
        return batch

    def amount(self, batch: dict[str, Any]) -> float:
        return float(token_count(batch))

    def loss(self, model: Any, batch: dict[str, Any]) -> Any:
        """A :class:`~gossamer.kinds.objectives.Loss`, by the share of the step's tokens that ``batch`` has."""
        from gossamer.kinds.objectives import Loss

        normaliser = float(batch.get("normaliser", self.amount(batch)))
        inputs = {key: value for key, value in batch.items() if key != "normaliser"}
        inputs = _labelled(model, inputs) if self.weights[0] else inputs
        student = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}, output_hidden_states=True)
        mask = inputs["attention_mask"].bool()
        parts = {"token": token_loss(student.hidden_states, teacher.hidden_states, mask)}
        if getattr(student, "logits", None) is not None:
            parts["logit"] = _divergence(student.logits, teacher.logits, mask)
        if self.weights[0]:
            parts["task"] = student.loss
        value = sum(w * parts[n] for w, n in zip(self.weights, ("task", "logit", "token"), strict=True) if n in parts)
        assert isinstance(value, Tensor)
        share = self.amount(batch) / normaliser
        return Loss(share * value, {name: float(part.detach()) for name, part in parts.items()})


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over layers, the embeddings left out, of the relative squared distance at the tokens of ``mask [b, t]``."""
    layers = list(zip(student[1:], teacher[1:], strict=True))
    distances = [(own[mask] - theirs[mask]).square().sum() / theirs[mask].square().sum() for own, theirs in layers]
    return torch.stack(distances).mean()


def tune(
    model: Any, teacher: Any, batches: Sequence[Batch], *, steps: int, rate: float, weights: Sequence[float], seed: int
) -> list[tuple[int, float]]:
    """Distil ``teacher`` into ``model`` in place, all weights; returns the loss of each step."""
    # the trainer is slow to import, and this module comes with transformers
    from gossamer.parts.training import TrainSettings, train

    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    settings = TrainSettings(steps=steps, batch_size=_BATCH, precision="fp32", save_every=0, seed=seed)
    try:
        model.requires_grad_(True)
        teacher.eval()
        with tempfile.TemporaryDirectory() as folder:
            result = train(
                model,
                None,
                [row for batch in batches for row in _rows(batch)],
                objective=Distillation(teacher, weights),
                optimizer=registry.find("adamw").load()(lr=rate),
                settings=settings,
                folder=Path(folder),
            )
    finally:
        for parameter, asks in asked.items():
            parameter.requires_grad_(asks)
    return result.curve


def _has_task(model: Any, batch: Batch) -> bool:
    return "labels" in batch or bool(model.can_generate())


def _labelled(model: Any, batch: Batch) -> dict[str, Any]:
    """With labels: of a decoder without any, its own tokens."""
    given = dict(batch)
    if "labels" not in given and model.can_generate():
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        given["labels"] = given["input_ids"].masked_fill(mask == 0, _IGNORE)
    return given


def _outputs(model: Any, batch: Batch) -> Tensor:
    """Outputs at the tokens: logits, or the last hidden states."""
    out = model(**moved(batch, model))
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    mask = batch.get("attention_mask")
    at_tokens = mask is not None and found.shape[:2] == mask.shape
    return found[mask.to(found.device).bool()] if at_tokens and mask is not None else found


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean KL over tokens, or over rows where there is one output a row."""
    if student.shape[:2] == mask.shape:
        student, teacher = student[mask], teacher[mask]
    own, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1).mean()


def _rows(batch: Batch) -> list[dict[str, Tensor]]:
    """The rows of a batch, each cut to its tokens."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    given = {**batch, "attention_mask": mask.long()}
    return [
        {
            key: value[row][own] if value.shape[:2] == mask.shape else value[row]
            for key, value in given.items()
            if isinstance(value, Tensor) and len(value) == len(mask)
        }
        for row, own in enumerate(mask)
    ]
