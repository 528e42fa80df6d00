"""What becomes of answers when the image leaves after each number of layers, from one pass of the plain model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.acceleration.dyvte.gates import read_tokens
from gossamer.core.errors import InputError
from gossamer.kinds.acceleration import Acceleration
from gossamer.parts.token_layouts import restore, select, whole
from gossamer.parts.token_selection import IGNORED, Decoder, read_call
from gossamer.parts.visual_rows import visual_batch


@dataclasses.dataclass(frozen=True)
class End:
    """How the answers of a batch come out: per row mean loss, share of likeliest tokens as in the full model, and
    whether all of them are the answer's own."""

    loss: Tensor
    agreement: Tensor
    correct: Tensor


class Pass:
    """One forward pass of the plain model over a batch with labels: ``hidden[i]`` [b, t, d] is the input of layer i."""

    def __init__(self, decoder: Decoder, batch: Mapping[str, Tensor]) -> None:
        model: Any = decoder.model
        labels = batch["labels"]
        given = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            out = model(**given, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        self.decoder, self.hidden, self.run = decoder, out.hidden_states, read_call(model, dict(batch))
        self.layout = whole(self.run.real)
        self._predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        self._targets = labels.roll(-1, dims=1)[self._predicts]
        self._rows = self._predicts.nonzero()[:, 0]
        with torch.no_grad():
            self.full, self._likeliest = self._end(self.hidden[-1], None)

    @torch.no_grad()
    def without(self, done: int) -> End:
        """The image leaves after ``done`` layers, 0 to all."""
        if done == len(self.decoder.layers):
            return self.full
        stays = self.run.real & ~(self.run.image & ~self.run.asks)
        hidden, layout = select(self.hidden[done], self.layout, stays, renumber=False)
        states = restore(self.decoder.forward_from(done, hidden, layout), layout, self.run.image)
        return self._end(states, self._likeliest)[0]

    def labels(self, done: int, agree: float, loss_ratio: float) -> Tensor:
        """Whether each row may exit after ``done`` layers, bool [b]."""
        end = self.without(done)
        return (end.agreement > agree) & (end.loss < loss_ratio * self.full.loss)

    @torch.no_grad()
    def masses(self, layer: int) -> Tensor:
        """Attention text to image, text to text, image to image, last prompt token to image: sums over rows [4]."""
        run, layout = self.run, self.layout
        every = torch.arange(run.real.shape[1], device=run.real.device).expand_as(run.real)
        attention = self.decoder.attention(layer, self.hidden[layer], layout, every).double()  # [b, t, t]
        image, (text, last) = run.image, read_tokens(run)
        to_image, to_text = ((attention * seen[:, None]).sum(-1) for seen in (image, run.real & ~image))
        pairs = ((to_image, text), (to_text, text), (to_image, image), (to_image, last))
        means = [(mass * who).sum(1) / who.sum(1).clamp(min=1) for mass, who in pairs]
        return torch.stack([mean.sum() for mean in means]).cpu()

    def _end(self, states: Tensor, likeliest: Tensor | None) -> tuple[End, Tensor]:
        model: Any = self.decoder.model
        logits = model.lm_head(states[self._predicts]).float()
        found = logits.argmax(-1)
        losses = F.cross_entropy(logits, self._targets, reduction="none")
        same = found == (found if likeliest is None else likeliest)
        end = End(self._each(losses), self._each(same.float()), self._each((found == self._targets).float()) == 1)
        return end, found

    def _each(self, values: Tensor) -> Tensor:
        """Mean over the answer tokens of each row."""
        rows = len(self._predicts)
        sums = torch.zeros(rows, device=values.device).index_add(0, self._rows, values)
        return sums / torch.bincount(self._rows, minlength=rows).clamp(min=1)


def passes(decoder: Decoder, rows: Sequence[Mapping[str, Any]], processor: Any, batch_size: int) -> Iterator[Pass]:
    """The plain model over ``rows``, batch by batch."""
    model: Any = decoder.model
    if getattr(model, Acceleration.slot, None) is not None:
        raise InputError("dyvte", must="see the plain model", got="an accelerated one", do="release it first")
    for start in range(0, len(rows), batch_size):
        batch = visual_batch(rows[start : start + batch_size], processor)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        yield Pass(decoder, {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()})
