"""State facts: what is true of a model between the steps of a recipe, and which step may follow which.

A step requires, forbids, provides and removes facts (its card). The validator runs a recipe over the facts alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

from gossamer.core.card import Card

FACTS = {
    "float_weights": "weights are floating point",
    "quantised": "weights are packed integers",
    "adapter_attached": "an adapter is attached",
    "trained": "something was trained in this run",
    "merged": "an adapter was folded into the weights",
    "vocabulary_trimmed": "the vocabulary was cut to a corpus",
    "pruned": "weights or parts of the layers were removed",
    "small_copy": "a small copy stands for the model",
    "drafter_fitted": "a drafter was fitted",
    "guard_fitted": "a guard was fitted",
    "decoder_set": "a decoding system rules generation",
    "saved": "the model was written to the run folder",
}
START = frozenset({"float_weights"})


@dataclasses.dataclass(frozen=True)
class Move:
    """A step as the validator sees it."""

    name: str
    card: Card


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Step ``index`` cannot stand where it does."""

    index: int
    reason: str


def follow(moves: Sequence[Move], start: Iterable[str] = START) -> Conflict | None:
    """Run the steps over the facts; the first conflict, or ``None``."""
    facts = set(start)
    by: dict[str, str] = {}  # fact -> the step that last set or removed it
    for index, move in enumerate(moves):
        for need in move.card.requires:
            alternatives = need.split("|")
            if not facts & set(alternatives):
                return Conflict(index, _missing(move.name, alternatives, by))
        for fact in move.card.forbids:
            if fact in facts:
                cause = f" since {by[fact]}" if fact in by else ""
                return Conflict(index, f"{move.name} cannot follow: {FACTS[fact]}{cause}")
        for fact in move.card.removes:
            facts.discard(fact)
            by[fact] = move.name
        for fact in move.card.provides:
            facts.add(fact)
            by[fact] = move.name
    return None


def mend(moves: Sequence[Move], fixers: Sequence[Move], start: Iterable[str] = START) -> list[Move] | None:
    """The nearest order that works: one step moved, else one step of ``fixers`` put in, else both."""
    works: Callable[[list[Move]], bool] = lambda order: follow(order, start) is None  # noqa: E731
    moved = list(_moved(moves))
    candidates = itertools.chain(
        moved,
        _inserted(moves, fixers),
        (longer for order in moved for longer in _inserted(order, fixers)),
        (twice for order in moved for twice in _moved(order)),
    )
    return next((order for order in candidates if works(order)), None)


def _missing(name: str, alternatives: list[str], by: dict[str, str]) -> str:
    needs = " or ".join(FACTS[fact] for fact in alternatives)
    lost = [f"{by[fact]} ended that" for fact in alternatives if fact in by]
    return f"{name} needs that {needs}" + (f", and {lost[0]}" if lost else ", and no step before it sees to that")


def _moved(moves: Sequence[Move]) -> Iterable[list[Move]]:
    for source in range(len(moves)):
        for target in range(len(moves)):
            if source != target:
                order = [*moves[:source], *moves[source + 1 :]]
                yield [*order[:target], moves[source], *order[target:]]


def _inserted(moves: Sequence[Move], fixers: Sequence[Move]) -> Iterable[list[Move]]:
    for fixer in fixers:
        for place in range(len(moves) + 1):
            yield [*moves[:place], fixer, *moves[place:]]
