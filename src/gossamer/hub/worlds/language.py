"""Writes about still scenes in a child's words, and never a word that is not so; ``reading`` reads it back.

``captions`` are short noun phrases in several wordings; ``describe`` gives whole sentences, 20 to 25 words ("short") or
60 to 70 ("long"). Both are drawn from the templates of ``lexicon``.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.hub.worlds.lexicon import (
    FILLERS,
    LORE,
    NUMBERS,
    PLACE_WORDS,
    PLURALS,
    RELATION_WORDS,
    SCENERY,
    SIZE_WORDS,
    TEMPLATES,
    WHEREABOUTS,
)
from gossamer.hub.worlds.reading import Checked, Entity, Fact, Parsed, accepts, check_facts, parse
from gossamer.hub.worlds.scene import ACTIONS, COLOURS, DIGITS, KINDS, RELATIONS, Scene, Thing, holds

__all__ = [
    "LENGTHS", "Checked", "Entity", "Fact", "Parsed", "accepts", "captions", "check_facts", "describe", "parse",
    "vocabulary",
]  # fmt: skip

_Any = TypeVar("_Any")
LENGTHS = {"short": (20, 25), "long": (60, 70)}


def captions(scene: Scene, rng: random.Random, count: int = 4) -> tuple[str, ...]:
    """``count`` different captions (fewer where there are not so many), from full detail to the bare kinds."""
    writer = _Writer(scene, rng)
    found: dict[str, None] = {}
    for attempt in range(8 * count):
        detail = ("full", "colour", "colour", "kind")[attempt % 4]
        found[writer.fill("caption", list=writer.listing(detail))] = None
        if len(found) == count:
            break
    return tuple(found)


def describe(scene: Scene, length: str = "short", rng: random.Random | None = None) -> str:
    """Whole sentences about a scene, as many words as LENGTHS says; ``rng`` picks the wording (None: a fixed one)."""
    if length not in LENGTHS:
        raise OptionError(
            "describe: length", must="be a known name", got=repr(length), do=did_you_mean(length, LENGTHS)
        )
    low, high = LENGTHS[length]
    rng = rng or random.Random(0)
    for _ in range(1000):
        sentences = _Writer(scene, rng).sentences(low, high)
        text = " ".join(_sentence(sentence) for sentence in sentences)
        if low <= len(text.split()) <= high:
            return text
    raise AssertionError(f"no wording of {low} to {high} words for {scene.key()}")


def vocabulary() -> tuple[str, ...]:
    """All words that captions and descriptions are made of, lower case, sorted (glyphs and commas aside)."""
    texts = [re.sub(r"{\w+}", " ", template) for templates in TEMPLATES.values() for template in templates]
    texts += [*FILLERS, *(sentence for sentences in LORE.values() for sentence in sentences)]
    for table in (PLACE_WORDS, SCENERY, WHEREABOUTS, RELATION_WORDS, SIZE_WORDS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    texts += [*NUMBERS[1:], *COLOURS, *KINDS, *PLURALS.values(), *ACTIONS, "a an the and number letter"]
    return tuple(sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())}))


class _Writer:
    """Fills templates with what is so in one scene; ``named`` are the things brought up so far."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        self.named: list[Thing] = []

    def fill(self, name: str, **given: str) -> str:
        """A template of that name, the given slots filled, the background drawn."""
        background = self.scene.background
        scenery = {"bg": self._pick(SCENERY[background]), "at": self._pick(WHEREABOUTS[background])}
        return re.sub(r"{(\w+)}", lambda slot: {**scenery, **given}[slot[1]], self._pick(TEMPLATES[name]))

    def sentences(self, low: int, high: int) -> list[str]:
        """Sentences of at most ``high`` words in all, and of at least ``low`` where the draw comes so far."""
        things = self._shuffled(self.scene.things)
        chosen: list[str] = []
        if len(things) > 2 and self.rng.random() < (0.9 if high < 40 else 0.3):
            opening = [[self.fill("background")]] if self.rng.random() < 0.6 else []
            detail = self._pick(("full", "colour", "colour", "kind"))
            self._add([*opening, [self.fill("list", list=self.listing(detail, self.rng.randint(2, 5)))]], chosen, high)
            details = self._details(complete=False)
        else:
            self._add([[self.fill("background")]], chosen, high)
            for thing in things:
                if self._add([self._introduction(thing)], chosen, high):
                    self.named.append(thing)
            details = self._details(complete=True)
        kinds = dict.fromkeys(thing.kind for thing in self.named)
        lore = [sentence for kind in kinds for sentence in self.rng.sample(LORE[kind], 3)]
        for more in (details, lore, self.rng.sample(FILLERS, 6)):
            self._add([[sentence] for sentence in self._shuffled(more)], chosen, self.rng.randint(low, high))
        return chosen

    def listing(self, detail: str, limit: int = 16) -> str:
        """The things (of at most ``limit`` sorts) as one list of noun phrases, like ones counted."""
        sorts: dict[str, list[Thing]] = {}
        words = {size: self._pick(SIZE_WORDS[size]) for size in SIZE_WORDS}
        for thing in self._shuffled(self.scene.things):
            adjectives = {"full": [words[thing.size], thing.colour], "colour": [thing.colour], "kind": []}[detail]
            sorts.setdefault(" ".join([*adjectives, thing.kind]), []).append(thing)
        told = list(sorts.items())[:limit]
        self.named = [thing for _, things in told for thing in things]
        phrases = [_counted(len(things), noun) for noun, things in told]
        return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]

    def _add(self, groups: Iterable[list[str]], chosen: list[str], high: int) -> bool:
        """Append each group of sentences that still fits into ``high`` words; whether the last one did."""
        fits = False
        for group in groups:
            fits = sum(len(sentence.split()) for sentence in [*chosen, *group]) <= high
            if fits:
                chosen += group
        return fits

    def _introduction(self, thing: Thing) -> list[str]:
        """One thing brought up, with more sentences for what the first left out."""
        size, colour = self._pick(SIZE_WORDS[thing.size]), thing.colour
        place = self._pick(PLACE_WORDS[self.scene.place(thing)])
        full = _counted(1, f"{size} {colour} {thing.kind}")
        more = [self.fill("its_glyph", glyph=_glyph(thing.glyph))] if thing.glyph else []
        more += [self.fill("its_doing", doing=thing.action)] if thing.action else []
        style = self.rng.randrange(5)
        if style == 0:
            return [self.fill("found", a=full), self.fill("its_place", place=place), *more]
        if style == 1:
            first = self.fill("thing", a=_counted(1, thing.kind), place=place)
            return [first, self.fill("its_both", size=size, colour=colour), *more]
        if style == 2:
            first = self.fill("thing", a=_counted(1, f"{colour} {thing.kind}"), place=place)
            return [first, self.fill("its_size", size=size), *more]
        if style == 3:
            first = self.fill("thing", a=_counted(1, f"{size} {thing.kind}"), place=place)
            return [first, self.fill("its_colour", colour=colour), *more]
        return [self.fill("thing", a=full, place=place), *more]

    def _details(self, *, complete: bool) -> list[str]:
        """What else is so, a sentence each, of the things named; where not ``complete``, also its attributes."""
        result = []
        names = {thing: name for thing in self.named if (name := self._definite(thing))}
        for thing, the in names.items():
            result += [] if complete else self._attributes(thing, the)
            for other, name in names.items():
                true = [relation for relation in RELATIONS if other is not thing and holds(thing, relation, other)]
                if true:
                    relation = self._pick(RELATION_WORDS[self._pick(true)])
                    result.append(self.fill("relation", the=the, rel=relation, other=name))
        missing = [kind for kind in KINDS if not self.scene.count(kind)]
        for kind in self.rng.sample(missing, 2):
            result.append(self.fill("absent", kind=kind, kinds=PLURALS[kind]))
        return result + self._counts()

    def _attributes(self, thing: Thing, the: str) -> list[str]:
        size, place = self._pick(SIZE_WORDS[thing.size]), self._pick(PLACE_WORDS[self.scene.place(thing)])
        result = [self.fill("place", the=the, place=place)]
        if thing.colour in the:
            result.append(self.fill("size", the=the, size=size))
        else:
            name = self._pick(("size", "colour", "both"))
            result.append(self.fill(name, the=the, size=size, colour=thing.colour))
        if thing.glyph:
            result.append(self.fill("glyph", the=the, glyph=_glyph(thing.glyph)))
        if thing.action:
            result.append(self.fill("doing", the=the, doing=thing.action))
        return result

    def _counts(self) -> list[str]:
        result = []
        if len(self.scene.things) > 1:
            result.append(self.fill("total", n=NUMBERS[len(self.scene.things)]))
        for kind, number in Counter(thing.kind for thing in self.scene.things).items():
            if number > 1:
                result.append(self.fill("count", n=NUMBERS[number], nouns=PLURALS[kind]))
        for colour, number in Counter(thing.colour for thing in self.scene.things).items():
            if number > 1:
                result.append(self.fill("count", n=NUMBERS[number], nouns=f"{colour} things"))
        return result

    def _definite(self, thing: Thing) -> str:
        """ "the ball" where that is the only one, else "the red ball", else nothing: no words pick it out."""
        if self.scene.count(thing.kind) == 1 and self.rng.random() < 0.5:
            return f"the {thing.kind}"
        return f"the {thing.colour} {thing.kind}" if self.scene.count(thing.kind, thing.colour) == 1 else ""

    def _shuffled(self, items: Sequence[_Any]) -> list[_Any]:
        return self.rng.sample(items, len(items))

    def _pick(self, words: Sequence[_Any]) -> _Any:
        return self.rng.choice(words)


def _counted(number: int, noun: str) -> str:
    if number > 1:
        *adjectives, kind = noun.split()
        return " ".join([NUMBERS[number], *adjectives, PLURALS[kind]])
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _glyph(glyph: str) -> str:
    return f"the {'number' if glyph in DIGITS else 'letter'} {glyph}"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + ("" if words.endswith("?") else ".")
