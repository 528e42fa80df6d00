"""One answer on its way: what was asked, what the engine holds for it, and the pieces that it sends out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gossamer.core.errors import GossamerError
from gossamer.serving.sampling import Sampling, scored
from gossamer.serving.text import Detokeniser, Stops, token_bytes


@dataclasses.dataclass(frozen=True)
class Ask:
    """One answer that is wanted. ``index`` tells it from the others of its request; ``judged`` are the texts that
    guards see; ``stages`` the names of those that are on; at most ``max_tokens`` tokens, at least one."""

    prompt: Sequence[int]
    max_tokens: int
    index: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stops: Sequence[str] = ()
    judged: Sequence[str] = ()
    stages: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Token:
    """A token as log-probabilities show it: text, UTF-8 bytes (``None``: it has none), nats, and the best tokens."""

    text: str
    data: list[int] | None
    logprob: float
    top: tuple[Token, ...] = ()


@dataclasses.dataclass
class Tally:
    """What an answer took: tokens, those of the prompt that were reused among them, and what the stages report."""

    prompt: int
    cached: int = 0
    written: int = 0
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def spend(self, stage: str, seconds: float) -> None:
        """Time that the answer waited for a stage."""
        row = self.stages.setdefault(stage, {"ms": 0.0})
        row["ms"] += 1000 * seconds


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of answer ``index``; the last one has ``finish`` ("stop", "length", "content_filter") and a tally."""

    index: int
    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None
    tally: Tally | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """Answer ``index`` ended by an error."""

    index: int
    error: Exception


Sink = Callable[[Piece | Failure], None]


class Ticket:
    """A request in the engine; ``cancel()`` may be called from any thread."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Writing:
    """An answer in the engine. ``state`` is its request state once it is open, ``prompt`` what is being read."""

    def __init__(self, ask: Ask, ticket: Ticket, sink: Sink, tokenizer: Any, ends: frozenset[int]) -> None:
        self.ask, self.ticket, self.sink, self.ends = ask, ticket, sink, ends
        self.first: Writing | None = None  # of the same prompt and request: this one begins when that one has read it
        self.tally = Tally(len(ask.prompt))
        self.choice, self.recorder, self.grammar = ask.sampling.choice(len(ask.prompt), ask.index)
        self.state: Any = None
        self.drafting = False  # the decoding stage keeps a memory of its own for it
        self.judged = False  # or no guard has to
        self.over = False
        self._tokenizer = tokenizer
        self._text, self._stops = Detokeniser(tokenizer, ask.prompt), Stops(ask.stops)
        self._length = self._shown = 0  # letters known, and sent
        self._waiting: list[tuple[int, Token]] = []  # tokens by the place where their text begins

    @property
    def read(self) -> bool:
        """Whether all but the last token of the prompt are in its past."""
        return self.state is not None and self.state.past.length >= len(self.ask.prompt) - 1

    @property
    def settled(self) -> list[int]:
        """The tokens in its past."""
        return list(self.state.ids[: self.state.past.length])

    def take(self, tokens: Sequence[int], summary: Callable[[], Mapping[str, Any]]) -> None:
        """Send out what new tokens give; ``summary`` is asked for at the end."""
        scores = self.recorder.take() if self.recorder is not None else []
        text, finish = "", None
        for number, token in enumerate(tokens):
            self.tally.written += 1
            if token in self.ends:
                self._check_grammar()
                finish = "stop"
                break
            begins, new = self._length, self._text.add(token)
            self._length += len(new)
            if scores:
                self._waiting.append((begins, self._scored(scores[number], token)))
            text += self._stops.add(new)
            if self._stops.found or self.tally.written >= self.ask.max_tokens:
                finish = "stop" if self._stops.found else "length"
                break
        if finish is not None and not self._stops.found:
            text += self._stops.add(self._text.rest())
            finish = "stop" if self._stops.found else finish
            text += self._stops.rest()
        self._shown += len(text)
        if finish is not None:
            self.over = True
            for stage, found in summary().items():
                self.tally.stages.setdefault(stage, {"ms": 0.0}).update(found)
        told = self._told(all_of_it=finish is not None and not self._stops.found)
        if text or told or finish:
            self.sink(Piece(self.ask.index, text, told, finish, self.tally if finish else None))

    def refuse(self, text: str, written: int) -> None:
        """End with the words of a guard."""
        self.over, self.tally.written = True, written
        self.sink(Piece(self.ask.index, text, (), "content_filter", self.tally))

    def fail(self, error: Exception) -> None:
        self.over = True
        self.sink(Failure(self.ask.index, error))

    def _told(self, all_of_it: bool) -> list[Token]:
        """The tokens whose text has begun to be shown."""
        count = sum(all_of_it or begins < self._shown for begins, _ in self._waiting)
        told, self._waiting = [token for _, token in self._waiting[:count]], self._waiting[count:]
        return told

    def _scored(self, scores: Any, token: int) -> Token:
        own, best = scored(scores, token, self.ask.sampling.top_logprobs or 0)
        return self._shape(token, own, tuple(self._shape(other, logprob) for other, logprob in best))

    def _shape(self, token: int, logprob: float, top: tuple[Token, ...] = ()) -> Token:
        # JSON has no minus infinity; the OpenAI API writes -9999 for it
        text = str(self._tokenizer.decode([token]))
        return Token(text, token_bytes(self._tokenizer, token), max(logprob, -9999.0), top)

    def _check_grammar(self) -> None:
        if self.grammar is not None and not self.grammar.finished(self.state.ids):
            why = getattr(self.grammar, "problem", "") or "it ended early"
            raise GossamerError("an answer under a grammar", must="be completed", got=why)
