"""Speculation on the decoding runner: guessed trees of tokens, verified in one step, the text the model's own.

For each request the last accepted token and the tree of its draft are run together. Row 0 of the logits says what
follows the accepted text, row i + 1 what follows token i of the draft. :func:`settle` walks down from the root:

    t = the model's own choice at this place (greedy: argmax; sampled: drawn from its processed distribution p)
    if t is a child of the place, go on below it, else stop:  t is then the model's own next token

so a step emits one token more than it accepts, and the tokens are those of plain decoding (greedy: the same; sampled:
the same law, see :meth:`~gossamer.parts.requests.Choice.among`). It stops at an end token inside an accepted path. The
accepted path is gathered in the memory of the request, the rest of the tree is forgotten.

Guessing is left off while it does not pay: with g tokens emitted by a guessing step on average, it has to hold that

    g / (seconds of drafting and verifying)  >=  1 / (seconds of a plain step)

both measured here, for each number of requests in a step by itself. A request that is left off tries again
after 16 plain steps, then 32, up to 512. A guess is also cut to the tokens that pay (:mod:`~gossamer.parts.guessing`),
and a drafter is told of the least joint probability of a place at which looking a level deeper does: with s the seconds
of a level and r the tokens a second of guessing steps, s r. None of this changes the text.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gossamer.parts.decode_runner import BLOCK, Runner
from gossamer.parts.decode_state import Chunk, chain, tree_from
from gossamer.parts.guessing import Chances, Pace, Rate, Times
from gossamer.parts.look_up import with_copy
from gossamer.parts.requests import Draft

TRIAL = 8  # guessing steps by which a request is judged
FIRST_WAIT, LAST_WAIT = 16, 512  # plain steps until the next trial

Drafting = Callable[[Sequence[Any]], Sequence[Draft]]
Observing = Callable[[Sequence[Any], Sequence[Sequence[int]], Sequence[Tensor] | None], None]
Settling = Callable[[Any, Draft, Tensor], tuple[list[int], list[int]]]


@dataclasses.dataclass
class Record:
    """What speculation did for one request, and whether it goes on.

    ``offered[k]`` steps had a draft more than k deep, ``accepted[k]`` of them took more than k of its tokens.
    """

    steps: int = 0
    guesses: int = 0
    emitted: int = 0
    emitted_guessing: int = 0
    drafted: int = 0
    offered: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    wait: int = 0
    next_wait: int = FIRST_WAIT
    gains: collections.deque[int] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=TRIAL))

    def count(self, draft: Draft, taken: int, emitted: int, tried: bool) -> None:
        """Take note of a step that accepted ``taken`` drafted tokens and emitted ``emitted``; ``tried``: a guess was
        asked for, whether or not there was one that paid."""
        self.steps += 1
        self.emitted += emitted
        if tried:
            self.gains.append(emitted)
        if not draft.tokens:
            return
        self.guesses += 1
        self.emitted_guessing += emitted
        self.drafted += len(draft.tokens)
        deepest = _deepest(draft)
        for counts, reached in ((self.offered, deepest), (self.accepted, taken)):
            counts.extend([0] * (deepest - len(counts)))
            for depth in range(reached):
                counts[depth] += 1

    def wants(self, cost: float | None) -> bool:
        """Whether to guess now, a guessing step costing ``cost`` plain ones (``None``: not known yet)."""
        if self.wait:
            self.wait -= 1
            return False
        if cost is None or len(self.gains) < TRIAL:
            return True
        if statistics.fmean(self.gains) >= cost:
            self.next_wait = FIRST_WAIT
            return True
        self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, LAST_WAIT)
        self.gains.clear()
        return False

    def chances(self, draft: Draft) -> list[float]:
        """How often guesses as deep as each token were right so far, halves before there were any."""
        shares = [(right + 1) / (made + 2) for right, made in zip(self.accepted, self.offered, strict=True)]
        depths, found = list[int](), list[float]()
        for parent in draft.tree:
            depths.append(0 if parent < 0 else depths[parent] + 1)
            above = found[parent] if parent >= 0 else 1.0
            found.append(min(above, shares[depths[-1]] if depths[-1] < len(shares) else above / 2))
        return found

    def summary(self) -> dict[str, Any]:
        """``accepted_length``: tokens emitted by a guessing step (tau); ``forwards_per_token``: the prompt's not
        counted; ``acceptance[k]``: of drafts more than k deep, the share that was accepted more than k deep."""
        return {
            "tokens": self.emitted,
            "forwards": self.steps,
            "forwards_per_token": self.steps / max(1, self.emitted),
            "accepted_length": self.emitted_guessing / max(1, self.guesses),
            "guessing_steps": self.guesses,
            "drafted": self.drafted,
            "acceptance": [a / n for a, n in zip(self.accepted, self.offered, strict=True) if n],
        }


class Speculator:
    """Steps requests of a ``runner``. ``hidden`` are the states that :meth:`step` hands to ``observe``; with
    ``switch_off`` requests stop guessing while it does not pay. ``look_up``: beside the drafter's guesses, and where
    those are left off, what followed an earlier occurrence of the last tokens, of at most so many (0: nothing)."""

    def __init__(
        self, runner: Runner, *, hidden: Sequence[int] = (), switch_off: bool = True, look_up: int = 0
    ) -> None:
        self.runner, self.hidden, self.switch_off, self.look_up = runner, tuple(hidden), switch_off, look_up
        # by the number of requests in a step: seconds a token without the drafter, seconds of a step with it
        self.plain: dict[int, Rate] = collections.defaultdict(Rate)
        self.guessed: dict[int, Times] = collections.defaultdict(Times)
        self.pace = Pace()
        self.chances: dict[bool, Chances] = collections.defaultdict(Chances)  # by whether tokens are sampled
        self._level, self._rate = Times(), Times()  # seconds of a level of one draft, tokens a second of guessing steps

    @property
    def floor(self) -> float:
        """The least joint log-probability of a place that is worth looking behind; minus infinity while not known."""
        if not self.switch_off or self._level.median is None or self._rate.median is None:
            return -math.inf
        return math.log(max(self._level.median * self._rate.median, 1e-9))

    def open(self, state: Any) -> Any:
        """Give a :class:`~gossamer.parts.requests.RequestState` what it needs to be stepped here."""
        state.past, state.record = self.runner.open(), Record()
        return state

    def step(self, states: Sequence[Any], draft: Drafting, observe: Observing, settle: Settling) -> list[list[int]]:
        """Draft for each request that guesses, verify all in one step; the tokens that each emitted, at least one.

        ``observe(states, emitted, hidden)`` is told of every token that came into a request's past: hidden states
        [layers, m, d] of those m tokens (``None`` where none were asked for). The tokens of a prompt come with no
        emitted ones.
        """
        self.read_prompt(states, observe)
        guessing = self._guessing(states)
        began = time.perf_counter()
        drafts, tried, levels = [Draft(())] * len(states), set(guessing), 0
        for place, found in zip(guessing, draft([states[n] for n in guessing]) if guessing else [], strict=True):
            drafts[place] = found
            levels += _deepest(found)
        drafted = time.perf_counter()
        if levels:
            self._level.note((drafted - began) / levels)
        for place, (state, found) in enumerate(zip(states, drafts, strict=True)):
            guess = with_copy(found, state.ids, self.look_up) if self.look_up else found
            depth = len(guess.tokens) if state.room is None else max(0, state.room - 1)
            drafts[place] = self._paying(state, guess.cut(depth, state.past.room - 1), len(states) - 1)
        verifying = time.perf_counter()
        outputs = self.runner.run([_chunk(s, d) for s, d in zip(states, drafts, strict=True)], self.hidden)
        self.pace.note(len(states) + sum(len(guess.tokens) for guess in drafts), time.perf_counter() - verifying)
        emitted, hidden = [], list[Any]()
        for place, (state, guess, out) in enumerate(zip(states, drafts, outputs, strict=True)):
            path, tokens = settle(state, guess, out.logits)
            kept = [0, *(place + 1 for place in path)]
            state.past.keep(kept)
            state.record.count(guess, len(path), len(tokens), place in tried)
            if guess.joint is not None:
                self.chances[state.choice.sample].note(guess, path)
            emitted.append(tokens)
            hidden.append(None if out.hidden is None else out.hidden[:, kept])
        observe(states, emitted, hidden if self.hidden else None)
        seconds = time.perf_counter() - began
        if not guessing:
            self.plain[len(states)].note(seconds, sum(map(len, emitted)) / len(states))
        elif len(guessing) == len(states):
            self.guessed[len(states)].note(seconds)
            self._rate.note(sum(map(len, emitted)) / seconds)
        return emitted

    def read_prompt(self, states: Sequence[Any], observe: Observing) -> None:
        """Run what is not in the past yet, all but the last token; :meth:`step` begins with it."""
        for state in states:
            ids = state.ids
            for start in range(state.past.length, len(ids) - 1, BLOCK):
                part = ids[start : min(start + BLOCK, len(ids) - 1)]
                out = self.runner.run([Chunk(state.past, part, chain(len(part)), "none")], self.hidden)[0]
                observe([state], [[]], None if out.hidden is None else [out.hidden])

    def cost(self, count: int) -> float | None:
        """Tokens that are made without the drafter in the time of a step of ``count`` requests with it; ``None`` where
        not measured."""
        plain, guessed = self.plain[count], self.guessed[count]
        if len(plain) < 2 or len(guessed) < 2 or guessed.median is None:
            return None
        return guessed.median / plain.seconds

    def _paying(self, state: Any, guess: Draft, company: int) -> Draft:
        """The part of a guess that it pays to verify."""
        if not self.switch_off or not guess.tokens:
            return guess
        own = guess.joint is not None
        chances = self.chances[state.choice.sample].of(guess) if own else state.record.chances(guess)
        least = self.pace.worth(chances, company)
        return guess.part([place for place, chance in enumerate(chances) if chance >= least])

    def _guessing(self, states: Sequence[Any]) -> list[int]:
        """Places of the requests that guess now. The first steps of a number of requests are plain, to be timed."""
        free = [place for place, state in enumerate(states) if state.room is None or state.room > 1]
        if not self.switch_off:
            return free
        if len(self.plain[len(states)]) < 2:
            return []
        cost = self.cost(len(states))
        return [place for place in free if states[place].record.wants(cost)]


def settle(state: Any, draft: Draft, logits: Tensor) -> tuple[list[int], list[int]]:
    """Accept what the model itself would have chosen: the path of accepted places in the draft, and the tokens emitted.

    ``logits`` [1 + drafted tokens, V]. The tokens are accepted into ``state``; none follows one of ``state.ends``.
    """
    children, path, tokens, at = draft.children(), list[int](), list[int](), -1
    while True:
        below = children.get(at, [])
        drawn = None if draft.probs is None else [draft.probs[place] for place in below]
        token = state.choice.among(state.ids, logits[at + 1], [draft.tokens[place] for place in below], drawn)
        state.accept(token)
        tokens.append(token)
        found = next((place for place in below if draft.tokens[place] == token), None)
        if found is None or token in state.ends:
            return path, tokens
        path.append(found)
        at = found


def _chunk(state: Any, draft: Draft) -> Chunk:
    parents = [-1, *(parent + 1 for parent in draft.tree)]
    tree = tree_from(len(parents), parents, None, None)
    return Chunk(state.past, [state.ids[-1], *draft.tokens], dataclasses.replace(tree, chain=False), "all")


def _deepest(draft: Draft) -> int:
    depths = list[int]()
    for parent in draft.tree:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)
