"""One request of a decoding system: what it holds, how its tokens are drawn, and what a drafter guesses for it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gossamer.parts.several_models import Row


@dataclasses.dataclass
class Choice:
    """How a token is drawn from scores [V]: ``processors`` as transformers has them, then the best or a sample.

    ``left`` is the padding before the prompt in the caller's batch: length rules of the processors count it.
    """

    processors: Sequence[Callable[[Any, Any], Tensor]] = ()
    sample: bool = False
    generator: torch.Generator | None = None
    left: tuple[int, ...] = ()

    def scores(self, ids: Sequence[int], scores: Tensor) -> Tensor:
        """Scores [V] after the processors, for a request that holds ``ids``."""
        if not self.processors:
            return scores
        row, table = torch.tensor([[*self.left, *ids]], device=scores.device), scores[None]
        for processor in self.processors:
            table = processor(row, table)
        return table[0]

    def pick(self, ids: Sequence[int], scores: Tensor) -> int:
        """The next token."""
        scores = self.scores(ids, scores)
        return self._draw(scores.softmax(-1)) if self.sample else int(scores.argmax())

    def verify(self, ids: Sequence[int], scores: Tensor, token: int, drafted: Tensor | None) -> int:
        """The next token, given that ``token`` was drafted from ``drafted`` [V] (``None``: with certainty).

        It is distributed as :meth:`pick`'s: the draft is kept with probability min(1, p/q), else the token comes from
        max(0, p - q), normalised (Leviathan et al. 2023, arXiv 2211.17192).
        """
        if not self.sample:
            return self.pick(ids, scores)
        p = self.scores(ids, scores).softmax(-1)
        q = torch.zeros_like(p).index_fill_(0, torch.tensor([token], device=p.device), 1.0)
        q = q if drafted is None else drafted.to(p)
        if float(torch.rand((), generator=self.generator)) * float(q[token]) < float(p[token]):
            return token
        return self._draw((p - q).clamp(min=0))

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))


class RequestState:
    """One request: its ``prompt`` and the ``tokens`` accepted since. Systems derive from it to keep more.

    ``choice`` says how its tokens are drawn and ``room`` how many it may still emit (``None``: no limit known); both
    are the caller's. ``past`` is the base model's row where the step is run here and not by transformers.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt, self.tokens = list(prompt), list[int]()
        self.choice, self.room = Choice(), None
        self.past = Row()

    choice: Choice
    room: int | None

    @property
    def ids(self) -> list[int]:
        """Prompt and accepted tokens."""
        return self.prompt + self.tokens

    def accept(self, token: int) -> None:
        """Take ``token`` as the next one."""
        self.tokens.append(token)
        self.room = None if self.room is None else self.room - 1

    def rewind(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens."""
        assert 0 <= count <= len(self.tokens), (count, len(self.tokens))
        if count:
            del self.tokens[-count:]
            self.room = None if self.room is None else self.room + count
            self.past.crop(min(self.past.length, len(self.ids) - 1))

    def fork(self) -> Self:
        """A state with the same history that goes its own way (beams)."""
        twin = copy.copy(self)
        twin.tokens, twin.past = list(self.tokens), self.past.fork()
        return twin

    def close(self) -> None:
        """Release what the state holds; it is not used again."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """Guessed tokens. ``parents[i]`` is the place of the token before token i, -1 for the accepted text; ``None`` for
    a chain. ``probs`` [tokens, V] are the drafter's own probabilities; ``None`` where it is certain of each token."""

    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    probs: Tensor | None = None

    def chain(self) -> tuple[list[int], Tensor | None]:
        """The path of first children, and its probabilities."""
        if self.parents is None:
            return list(self.tokens), self.probs
        path, at = list[int](), -1
        while at in self.parents:
            at = list(self.parents).index(at)
            path.append(at)
        return [self.tokens[i] for i in path], None if self.probs is None else self.probs[path]
