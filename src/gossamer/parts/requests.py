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

    def among(self, ids: Sequence[int], scores: Tensor, tokens: Sequence[int], drafted: Sequence[Tensor] | None) -> int:
        """The next token, given that ``tokens`` were drafted for its place; distributed as :meth:`pick`'s.

        ``drafted[i]`` [V] is what token i was drawn from, given the tokens before it. They are tried in order: token x
        is kept with probability min(1, p(x) / q(x)), else p becomes max(0, p - q), normalised, for the next one; the
        last p is drawn from (Leviathan et al. 2023, arXiv 2211.17192; of siblings Miao et al. 2023, arXiv 2305.09781).
        For tokens that were not drawn (``None``) keeping x with probability p(x) and striking it out otherwise is the
        same as one draw from p, which is what is done: the text is then that of plain sampling with the same generator.
        """
        if not self.sample or drafted is None:
            return self.pick(ids, scores)
        p = self.scores(ids, scores).softmax(-1)
        for token, q in zip(tokens, drafted, strict=True):
            q = q.to(p)
            if float(torch.rand((), generator=self.generator)) * float(q[token]) < float(p[token]):
                return token
            left = (p - q).clamp(min=0)
            total = left.sum()
            # p = q leaves nothing but rounding
            p = left / total if float(total) > 0 else p
        return self._draw(p)

    def _draw(self, weights: Tensor) -> int:
        weights = weights if self.generator is None else weights.to(self.generator.device)
        return int(torch.multinomial(weights, 1, generator=self.generator))


class RequestState:
    """One request: its ``prompt`` and the ``tokens`` accepted since. Systems derive from it to keep more.

    ``choice`` says how its tokens are drawn, ``room`` how many it may still emit (``None``: no limit known),
    ``ends`` after which token it is over; all are the caller's. ``past`` is the base model's memory where the step is
    run here and not by transformers: a row, or a state of the decoding runner. ``record`` is the speculation engine's.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt, self.tokens = list(prompt), list[int]()
        self.choice, self.room = Choice(), None
        self.ends: frozenset[int] = frozenset()
        self.past: Any = Row()
        self.record: Any = None

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
        twin.tokens, twin.past, twin.record = list(self.tokens), self.past.fork(), copy.deepcopy(self.record)
        return twin

    def close(self) -> None:
        """Release what the state holds; it is not used again."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """Guessed tokens. ``parents[i]`` < i is the place of the token before token i, -1 for the accepted text; ``None``
    for a chain. ``probs[i]`` [V] is what token i was drawn from, given its earlier siblings; ``None`` where tokens were
    chosen and not drawn, as the best ones of a drafter are. ``joint[i]`` is the log-probability that the drafter gives
    to the path to token i, never above its parent's. ``copied[i]``: how many tokens matched where token i was copied
    from, 0 for a drafter's own, below 0 where both have it."""

    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    probs: Sequence[Tensor] | Tensor | None = None
    joint: Sequence[float] | None = None
    copied: Sequence[int] | None = None

    @property
    def tree(self) -> list[int]:
        """``parents``, of a chain too."""
        return list(range(-1, len(self.tokens) - 1)) if self.parents is None else list(self.parents)

    def children(self) -> dict[int, list[int]]:
        """Places of the tokens that follow each place, in order; -1 is the accepted text."""
        found: dict[int, list[int]] = {}
        for place, parent in enumerate(self.tree):
            found.setdefault(parent, []).append(place)
        return found

    def cut(self, depth: int, count: int) -> Draft:
        """The tokens at most ``depth`` deep, of them the first ``count``."""
        depths, kept = list[int](), list[int]()
        for place, parent in enumerate(self.tree):
            depths.append(1 if parent < 0 else depths[parent] + 1)
            if depths[place] <= depth and len(kept) < count:
                kept.append(place)
        return self.part(kept)

    def part(self, kept: Sequence[int]) -> Draft:
        """The tokens at the rising places ``kept``, with which come their parents."""
        if len(kept) == len(self.tokens):
            return self
        new = {-1: -1} | {place: i for i, place in enumerate(kept)}
        probs = None if self.probs is None else [self.probs[place] for place in kept]
        joint = None if self.joint is None else [self.joint[place] for place in kept]
        copied = None if self.copied is None else [self.copied[place] for place in kept]
        parents = self.tree
        return Draft(
            [self.tokens[place] for place in kept], [new[parents[place]] for place in kept], probs, joint, copied
        )
