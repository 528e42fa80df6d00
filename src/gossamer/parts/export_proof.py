"""The same prompts through a model and through what was written of it: top-1 agreement and KL at 640 positions.

    KL = mean over positions of sum_v p(v) (log p(v) - log q(v)),   p before, q after, in nats

The reference computes in float32 and is held whole, [positions, vocabulary]; the other side is read in chunks of
positions with a cache, so that the cache is proved too.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, InputError
from gossamer.parts.generation import end_ids

POSITIONS, CHUNK = 640, 64
_CODE = "def mean(values: list[float]) -> float:\n    total = 0.0\n    for value in values:\n        total += value\n"
TEXTS = (
    "The function returns the number of items in the list.",
    _CODE + "\treturn total / len(values)  # 0 < n\n\n\nprint(mean([1.5, 2, 1234567]))\n",
    "  Two spaces first; café, naïve, ß, 你好, Ελλάδα, 🙂!\r\nI'm sure they'll say: 100% <b>done</b>...   ",
)
_PROSE = _CODE + heapq.__about__
_MESSAGES = [{"role": "user", "content": "Say hello."}]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the model did: ``ids`` of a few windows and ``logits`` float32 [positions, vocabulary] on them."""

    ids: list[list[int]]
    logits: Tensor
    encoded: list[list[int]]  # of TEXTS
    ends: list[int]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Positions compared, share of equal most probable tokens, mean KL in nats, largest change of a log-probability
    (of tokens above 1e-5)."""

    positions: int
    top1: float
    kl: float
    largest: float

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 7) for key, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Bound:
    """What is taken as the same."""

    top1: float = 0.0
    kl: float = float("inf")
    largest: float = float("inf")


def text_tokenizer(processor: Any) -> Any:
    """The tokenizer of a processor, or itself. Raises InputError where there is none."""
    found = getattr(processor, "tokenizer", processor)
    if not hasattr(found, "decode"):
        raise InputError("export", must="get a model of text", got=type(processor).__name__, do="name its text model")
    return found


def windows(model: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids to compare on: :data:`POSITIONS` or more, in windows beyond the model's sliding one where it has one,
    or of its whole context where that is shorter."""
    config = model.config.get_text_config()
    length = max(POSITIONS, (getattr(config, "sliding_window", None) or 0) + POSITIONS // 5)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    bare = tokenizer(_PROSE, add_special_tokens=False, verbose=False)["input_ids"]
    first = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    room = length - len(first)
    bare = bare * -(-(POSITIONS + length) // len(bare))
    return [first + bare[start * room : (start + 1) * room] for start in range(-(-POSITIONS // length))]


def record(model: Any, processor: Any) -> Reference:
    """Run the model; it computes in the dtype that it has."""
    tokenizer = text_tokenizer(processor)
    ids = windows(model, tokenizer)
    logits = torch.cat(list(model_logits(model, ids)))
    return Reference(ids, logits, [tokenizer(text)["input_ids"] for text in TEXTS], end_ids(model, tokenizer))


@torch.no_grad()
def model_logits(model: Any, ids: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Logits float32 [at most CHUNK, vocabulary] of a model of transformers, on through its cache."""
    for row in ids:
        cache = None
        for start in range(0, len(row), CHUNK):
            chunk = torch.tensor([row[start : start + CHUNK]], device=model.device)
            out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits[0].float().cpu()


def compare(before: Tensor, after: Iterable[Tensor]) -> Agreement:
    """``before`` [positions, v] with chunks [n, v] of the same positions."""
    place, same, kl, largest = 0, 0, 0.0, 0.0
    for chunk in after:
        rows = before[place : place + len(chunk)]
        if rows.shape != chunk.shape:
            raise GossamerError("export", must=f"give logits {list(rows.shape)}", got=f"{list(chunk.shape)}")
        p, q = rows.log_softmax(-1), chunk.float().log_softmax(-1)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        change = p - q
        kl += float((p.exp() * change).sum(-1, dtype=torch.float64).sum())
        # nan stays nan, which no bound admits
        largest = max(largest, float(torch.where(p > -11.5, change, 0.0).abs().max()), key=lambda x: (x != x, x))
        place += len(chunk)
    assert place == len(before), (place, len(before))
    return Agreement(place, same / place, kl / place, largest)


def prove(found: Agreement, bound: Bound, what: str) -> dict[str, float]:
    """The figures of an agreement within the bound; raises GossamerError beyond it."""
    if not (found.top1 >= bound.top1 and found.kl <= bound.kl and found.largest <= bound.largest):
        got = f"{found.top1:.1%}, {found.kl:.3g} nats, {found.largest:.3g}"
        must = (
            f"keep the most probable token at {bound.top1:.1%} of {found.positions} positions, a KL of at most "
            f"{bound.kl:g} nats and every log-probability within {bound.largest:g}"
        )
        raise GossamerError(f"round trip, {what}", must=must, got=got, do="nothing was written")
    return found.as_dict()


def prove_tokens(before: Reference, encoded: list[list[int]], what: str) -> None:
    """The texts are cut into the same tokens."""
    for text, old, new in zip(TEXTS, before.encoded, encoded, strict=True):
        if old != new:
            place = next((i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), len(old))
            got = f"{new[place : place + 4]} for {old[place : place + 4]} at token {place} of {text[:40]!r}"
            raise GossamerError(
                f"round trip, {what}: tokenizer", must="cut texts as before", got=got, do="nothing was written"
            )


def prove_equal(before: Any, after: Any, what: str) -> None:
    """A chat template, an end token or the like is the same."""
    if before != after:
        got = f"{str(after)[:80]!r} for {str(before)[:80]!r}"
        raise GossamerError(f"round trip, {what}", must="be as before", got=got, do="nothing was written")


def render(processor: Any) -> str:
    """A chat as the template writes it; empty where there is none."""
    tokenizer = text_tokenizer(processor)
    if not getattr(tokenizer, "chat_template", None):
        return ""
    return str(tokenizer.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=True))
