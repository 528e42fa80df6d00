"""Round-trip proof: the same probe before and after save, merge, quantise or export; a difference is an error.

A :class:`Probe` holds the model's next-token log-probabilities at every position of a few texts, the rendered chat
template, and the names and shapes of the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

_MESSAGES = ({"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."})
_LENGTH = 64
_VOCABULARY = 1024  # log-probabilities kept per position: the most probable ones at the first look


@dataclasses.dataclass
class Probe:
    """What a model does on ``ids``; ``log_probs`` [texts x positions, tokens] float32 over the tokens ``columns``."""

    ids: list[Tensor]
    columns: Tensor
    log_probs: Tensor
    top: Tensor
    template: str
    shapes: dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest change of a log-probability, mean KL(before || after) in nats, share of equal most probable tokens."""

    largest: float
    kl: float
    agreement: float

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 6) for key, value in dataclasses.asdict(self).items()}


def encode(tokenizer: Any, text: str) -> Tensor:
    """The first :data:`_LENGTH` tokens of a text, int64 [t]."""
    return torch.tensor(tokenizer(text)["input_ids"][:_LENGTH])


def probe(model: Any, tokenizer: Any, texts: Sequence[str], *, like: Probe | None = None) -> Probe:
    """Record the model on ``texts`` (their beginnings), on the tokens and columns of ``like`` where given."""
    ids = like.ids if like else [encode(tokenizer, text) for text in texts]
    training = model.training
    model.eval()
    with torch.no_grad():
        rows = [model(input_ids=row[None].to(model.device)).logits[0].float().log_softmax(-1).cpu() for row in ids]
    model.train(training)
    table = torch.cat(rows)
    columns = like.columns if like else table.amax(0).topk(min(_VOCABULARY, table.shape[1])).indices
    if int(columns.max()) >= table.shape[1]:
        raise GossamerError(
            "round trip", must="keep the vocabulary", got=f"{table.shape[1]} tokens", do="compare like with like"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Probe(ids, columns, table[:, columns], table.argmax(-1), _render(tokenizer), shapes)


def difference(before: Probe, after: Probe) -> Difference:
    """How far the two probes are apart."""
    change = (before.log_probs - after.log_probs).abs()
    probabilities = before.log_probs.exp()
    # tokens outside the columns are left out of the sum: their mass is negligible by choice of the columns
    kl = (probabilities * (before.log_probs - after.log_probs)).sum(-1).mean()
    weighted = change * (before.log_probs > -12)  # a change at a token of probability 1e-6 is no difference to anybody
    return Difference(float(weighted.max()), float(kl), float((before.top == after.top).float().mean()))


def prove_same(before: Probe, after: Probe, *, what: str, largest: float, weights: bool = True) -> Difference:
    """Raise unless the outputs agree within ``largest`` (a log-probability), the template and the weights are the same.

    ``weights=False`` lets names differ, as they do when an adapter is folded in.
    """
    if before.template != after.template:
        raise GossamerError(
            f"{what}: chat template",
            must="render as before",
            got=repr(after.template[:80]),
            do="save the tokenizer too",
        )
    if weights:
        _same_weights(before, after, what)
    found = difference(before, after)
    if not found.largest <= largest:
        raise GossamerError(
            what,
            must=f"change no log-probability by more than {largest:g}",
            got=f"{found.largest:.3g} (KL {found.kl:.3g}, same first choice {found.agreement:.1%})",
            do="do not use the result",
        )
    return found


def prove_changed(before: Probe, after: Probe, *, what: str) -> None:
    """Raise when nothing changed at all, as after a merge that folded nothing in."""
    if difference(before, after).largest == 0.0:
        raise GossamerError(
            what,
            must="change the model's output",
            got="the very same output",
            do="check that the adapter was trained and is active",
        )


def _same_weights(before: Probe, after: Probe, what: str) -> None:
    lost = sorted(set(before.shapes) - set(after.shapes))
    new = sorted(set(after.shapes) - set(before.shapes))
    moved = sorted(
        name for name in before.shapes.keys() & after.shapes.keys() if before.shapes[name] != after.shapes[name]
    )
    if lost or new or moved:
        got = f"lost {lost[:3]}, new {new[:3]}, other shape {moved[:3]}"
        raise GossamerError(f"{what}: weights", must="be the ones that were there", got=got, do="do not use the result")


def _render(tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    return str(tokenizer.apply_chat_template(list(_MESSAGES), tokenize=False))
