"""How one request draws its tokens: penalties, bias, grammar, temperature, top-k and top-p, in this order.

With z [V] the scores that the model (and a decoding stage) gives, c(v) how often token v came in the answer so far:

    z(v) - frequency c(v) - presence [c(v) > 0] + bias(v),  what the grammar forbids is -inf,  / temperature,
    the k best, the smallest set of tokens whose chance reaches p

Log-probabilities are those of z, before all of this.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.parts.requests import Choice

_COLDEST = 1e-4  # a lower temperature is greedy: scores divided by it would overflow


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a request asks for. ``top_logprobs``: how many of the best tokens are told beside each chosen one; ``None``:
    no log-probabilities. ``seed`` None draws one. ``grammar`` is one of the token constraints."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None
    grammar: Any = None

    def choice(self, start: int, index: int) -> tuple[Choice, Recorder | None, Any]:
        """For the answer number ``index`` of a request whose prompt has ``start`` tokens: how tokens are drawn, what
        remembers scores, and the grammar's processor where there is one."""
        processors: list[Any] = []
        recorder = None if self.top_logprobs is None else Recorder()
        if recorder is not None:
            processors.append(recorder)
        if self.presence or self.frequency:
            processors.append(Penalties(start, self.presence, self.frequency))
        if self.bias:
            processors.append(Bias(self.bias))
        constraint = None
        if self.grammar is not None:
            from gossamer.parts.token_constraints import GrammarProcessor

            constraint = GrammarProcessor(self.grammar, start)
            processors.append(constraint)
        if self.temperature < _COLDEST:
            return Choice(processors), recorder, constraint
        processors += self._warpers()
        seed = secrets.randbits(62) if self.seed is None else (self.seed + index) % 2**63
        return Choice(processors, True, torch.Generator().manual_seed(seed)), recorder, constraint

    def _warpers(self) -> list[Any]:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        found: list[Any] = [] if self.temperature == 1.0 else [TemperatureLogitsWarper(self.temperature)]
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(max(self.top_p, 1e-6)))
        return found


class Recorder:
    """The first processor: keeps the scores [V] of every place that a token was drawn for since :meth:`take`."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores[0])
        return scores

    def take(self) -> list[Tensor]:
        seen, self.seen = self.seen, []
        return seen


class Penalties:
    """Tokens of the answer so far, from place ``start`` on, lose score."""

    def __init__(self, start: int, presence: float, frequency: float) -> None:
        self.start, self.presence, self.frequency = start, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = input_ids[0, self.start :].unique(return_counts=True)
        out = scores.clone()
        out[0, tokens] -= self.presence + self.frequency * counts.to(scores.dtype)
        return out


class Bias:
    """Adds to the scores of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.tokens, self.values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = scores.clone()
        out[0, self.tokens] += self.values.to(scores.dtype)
        return out


def scored(scores: Sequence[float] | Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability (nats) of ``token`` under scores [V], and the ``count`` best tokens with theirs."""
    logs = torch.as_tensor(scores).float().log_softmax(-1)
    best = logs.topk(min(count, len(logs)))
    return float(logs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
