"""Reads texts about still scenes: what they state, which sentences the grammar accepts, and what of it is true.

Works on any text, also one that a model wrote: an accepted sentence gives all that it states; of another one, the noun
phrases in it still count as stated. Noun phrases are tied together as a reader would: "a red ball" brings a new thing
up, "the ball" is the last one that fits, "it" is the last one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

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
from gossamer.hub.worlds.scene import ACTIONS, COLOURS, KINDS, Scene, Thing, holds

ASPECTS = ("kind", "colour", "size", "place", "count", "relation", "glyph", "action", "background", "absent")


@dataclass(frozen=True)
class Fact:
    """One statement: ``aspect`` (one of ASPECTS) of an entity is ``value``.

    ``entity`` is an index into ``Parsed.entities``, -1 for the picture; ``other`` is the second one of a relation.
    """

    aspect: str
    value: str
    entity: int = -1
    other: int = -1


@dataclass(frozen=True)
class Entity:
    """What a text speaks of; "" where it does not say. ``number`` is 1 for "a", else what the text counts."""

    kind: str
    colour: str = ""
    size: str = ""
    number: int = 1
    counted: bool = False


@dataclass(frozen=True)
class Parsed:
    """Facts without repeats, in order; ``accepted[i]`` says whether ``sentences[i]`` is in the grammar."""

    facts: tuple[Fact, ...]
    entities: tuple[Entity, ...]
    sentences: tuple[str, ...]
    accepted: tuple[bool, ...]


@dataclass(frozen=True)
class Checked:
    """``true`` and ``false`` facts, and ``recalled``: the share of the scene's own facts that were rightly stated.

    The scene's own facts are kind, colour, size and place of each thing, and the background.
    """

    true: tuple[Fact, ...]
    false: tuple[Fact, ...]
    recalled: float


def parse(text: str) -> Parsed:
    """Read a text: whole sentences, or one caption without a full stop."""
    reader = _Reader()
    sentences = tuple(part for part in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if part)
    accepted = tuple(reader.read(sentence) for sentence in sentences)
    return Parsed(tuple(dict.fromkeys(reader.facts)), tuple(reader.entities), sentences, accepted)


def check_facts(parsed: Parsed, scene: Scene) -> Checked:
    """Hold each fact against the scene.

    Each entity is taken for the thing of its kind with which most of what is said of it agrees, no thing twice; where
    no thing of that kind is left, all that is said of it is false. Counts must be exact.
    """
    pairs = _pair(parsed, scene)
    true: list[Fact] = []
    false: list[Fact] = []
    recalled = set()
    for fact in parsed.facts:
        (true if _holds(fact, parsed, scene, pairs) else false).append(fact)
    for fact in true:
        if fact.aspect == "background":
            recalled.add((-1, "background"))
        elif fact.aspect in ("kind", "colour", "size", "place") and fact.entity >= 0:
            entity = parsed.entities[fact.entity]
            met = _meant(entity, scene) if entity.counted else (pairs[fact.entity],)
            recalled.update((scene.things.index(thing), fact.aspect) for thing in met if thing is not None)
    return Checked(tuple(true), tuple(false), len(recalled) / (4 * len(scene.things) + 1))


def accepts(sentence: str) -> bool:
    """Whether one sentence is in the grammar."""
    return _Reader().read(sentence)


def _meant(entity: Entity, scene: Scene) -> tuple[Thing, ...]:
    return scene.matching(entity.kind, entity.colour, entity.size)


def _said(thing: Thing, fact: Fact, scene: Scene) -> bool:
    said = {
        "kind": thing.kind, "colour": thing.colour, "size": thing.size, "place": scene.place(thing),
        "glyph": thing.glyph, "action": thing.action,
    }  # fmt: skip
    return said.get(fact.aspect, fact.value) == fact.value


def _pair(parsed: Parsed, scene: Scene) -> dict[int, Thing | None]:
    """The thing that each uncounted entity stands for: of all ways to pair them within a kind, one with most truth."""
    about: dict[int, list[Fact]] = {index: [] for index in range(len(parsed.entities))}
    for fact in parsed.facts:
        if fact.entity >= 0:
            about[fact.entity].append(fact)
    pairs: dict[int, Thing | None] = {}
    for kind in dict.fromkeys(entity.kind for entity in parsed.entities):
        wanted = [i for i, entity in enumerate(parsed.entities) if entity.kind == kind and not entity.counted]
        things: list[Thing | None] = [*scene.matching(kind)]

        def truth(index: int, thing: Thing | None) -> int:
            return sum(_said(thing, fact, scene) for fact in about[index]) if thing else 0

        if not kind or len(things) > 6:
            pairs.update(_greedy(wanted, things, truth))
            continue
        first = wanted[: len(things)] if len(wanted) > 6 else wanted
        free = things + [None] * max(0, len(first) - len(things))
        orders = itertools.permutations(free, len(first))
        best = max(orders, key=lambda order: sum(map(truth, first, order)))
        pairs.update(dict.fromkeys(wanted) | dict(zip(first, best, strict=True)))
    return pairs


def _greedy(
    wanted: list[int], things: list[Thing | None], truth: Callable[[int, Thing | None], int]
) -> dict[int, Thing | None]:
    pairs: dict[int, Thing | None] = dict.fromkeys(wanted)
    free = list(things)
    for index in sorted(wanted, key=lambda index: -max((truth(index, thing) for thing in things), default=0)):
        if free:
            scores = [truth(index, thing) for thing in free]
            pairs[index] = free.pop(scores.index(max(scores)))
    return pairs


def _holds(fact: Fact, parsed: Parsed, scene: Scene, pairs: dict[int, Thing | None]) -> bool:
    if fact.aspect == "background":
        return scene.background == fact.value
    if fact.aspect == "absent":
        return scene.count(fact.value) == 0
    if fact.entity < 0:
        return scene.count(fact.value) > 0
    entity = parsed.entities[fact.entity]
    if fact.aspect == "count":
        return len(_meant(entity, scene)) == int(fact.value)
    if entity.counted:
        near = _meant(entity, scene) if fact.aspect in ("place", "relation") else scene.matching(entity.kind)
        return any(_said(thing, fact, scene) for thing in near)
    thing = pairs[fact.entity]
    if thing is None:
        return False
    if fact.aspect == "relation":
        other = pairs.get(fact.other)
        return other is not None and other is not thing and holds(thing, fact.value, other)
    return _said(thing, fact, scene)


@dataclass
class _Reader:
    facts: list[Fact] = field(default_factory=list)
    entities: list[Entity] = field(default_factory=list)
    last: int = -1

    def read(self, sentence: str) -> bool:
        bare = " ".join(sentence.lower().replace(",", " , ").split()).rstrip(" .!?").replace(" ,", ",")
        if bare in _lore():
            self._state("kind", _lore()[bare])
            return True
        if bare in _FILLERS:
            return True
        for name, slots, pattern in _patterns():
            found = pattern.fullmatch(bare)
            if found:
                phrases = list(zip(slots, found.groups(), strict=True))
                if all(_agrees(phrase) for slot, phrase in phrases if slot in _NOUN_SLOTS):
                    self._take(name, phrases)
                    return True
        for phrase in _noun_phrases(bare):
            self._mention(phrase)
        return False

    def _state(self, aspect: str, value: str, entity: int = -1, other: int = -1) -> None:
        self.facts.append(Fact(aspect, value, entity, other))

    def _take(self, name: str, phrases: list[tuple[str, str]]) -> None:
        met = [self.last] if name.startswith("its_") else []
        said = dict(phrases)
        if "n" in said:
            met.append(self._mention(f"{said['n']} {said.get('nouns', 'things')}"))
        for slot, phrase in phrases:
            if slot in _NOUN_SLOTS:
                met += [self._mention(noun) for noun in _noun_phrases(phrase)]
            elif slot in ("bg", "at"):
                self._state("background", _SCENERY[phrase])
            elif slot in ("kind", "kinds"):
                self._state("absent", _KINDS[phrase])
        subject = met[0] if met else -1
        if subject >= 0:
            for slot, aspect, words in _ASPECT_SLOTS:
                if slot in said:
                    self._state(aspect, words.get(said[slot], said[slot]), subject)
            if "glyph" in said:
                self._state("glyph", said["glyph"][-1].upper(), subject)
            if "rel" in said:
                self._state("relation", _RELATIONS[said["rel"]], subject, met[-1])
        if len(met) == 1 or "rel" in said:
            self.last = subject

    def _mention(self, phrase: str) -> int:
        words = phrase.split()
        kind = _KINDS[words[-1]]
        size = next((_SIZES[word] for word in words if word in _SIZES), "")
        colour = next((word for word in words if word in COLOURS), "")
        counted = words[0] in NUMBERS
        number = NUMBERS.index(words[0]) if counted else 1
        index = self._known(kind, colour, size) if words[0] == "the" else -1
        if index < 0:
            index = len(self.entities)
            self.entities.append(Entity(kind, colour, size, number, counted))
        for aspect, value in (("kind", kind), ("colour", colour), ("size", size)):
            if value and number:
                self._state(aspect, value, index)
        if counted:
            self._state("count", str(number), index)
        return index

    def _known(self, kind: str, colour: str, size: str) -> int:
        """The one that "the" means: of those spoken of that do not clash, the one most alike, then the last."""
        said: dict[int, set[tuple[str, str]]] = {}
        for fact in self.facts:
            said.setdefault(fact.entity, set()).add((fact.aspect, fact.value))
        fits = []
        for index, entity in enumerate(self.entities):
            given = {aspect: {value for name, value in said[index] if name == aspect} for aspect in ("colour", "size")}
            pairs = [(colour, given["colour"]), (size, given["size"])]
            clash = any(wanted and has - {wanted} for wanted, has in pairs)
            if entity.kind == kind and not entity.counted and not clash:
                known = sum(wanted in has for wanted, has in pairs)
                fits.append((known, index))
        return max(fits)[1] if fits else -1


_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_PLACES = {phrase: place for place, phrases in PLACE_WORDS.items() for phrase in phrases}
_RELATIONS = {phrase: name for name, phrases in RELATION_WORDS.items() for phrase in phrases}
_SCENERY = {word: name for table in (SCENERY, WHEREABOUTS) for name, words in table.items() for word in words}
_KINDS = {word: kind for kind in KINDS for word in (kind, PLURALS[kind])} | {"thing": "", "things": ""}
_ASPECT_SLOTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("place", "place", _PLACES),
    ("colour", "colour", {}),
    ("size", "size", _SIZES),
    ("doing", "action", {}),
)
_NOUN_SLOTS = ("a", "the", "other", "list")
_FILLERS = frozenset(filler.lower().rstrip("?") for filler in FILLERS)


def _either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_ADJECTIVES = f"(?:{_either(_SIZES)} )?(?:{_either(COLOURS)} )?"
_NOUN = _ADJECTIVES + _either(_KINDS)
_ANY = f"{_either(('a', 'an', 'the', *NUMBERS))} {_NOUN}"
_ONE = f"{_either(('a', 'an', *NUMBERS))} {_NOUN}"
_SLOTS = {
    "a": _ONE, "the": f"the {_NOUN}", "other": f"the {_NOUN}",
    "list": f"{_ONE}(?:, {_ONE})*(?:,? and {_ONE})?", "nouns": _NOUN,
    "place": _either(_PLACES), "bg": _either(w for ws in SCENERY.values() for w in ws),
    "at": _either(w for ws in WHEREABOUTS.values() for w in ws), "colour": _either(COLOURS), "size": _either(_SIZES),
    "n": _either(NUMBERS), "rel": _either(_RELATIONS), "glyph": "the (?:number [0-9]|letter [a-z])",
    "doing": _either(ACTIONS), "kind": _either(KINDS), "kinds": _either(PLURALS.values()),
}  # fmt: skip


@lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...]:
    """(template's name, its slots in order, its regex) of all templates."""
    result = []
    for name, templates in TEMPLATES.items():
        for template in templates:
            slots = tuple(re.findall(r"{(\w+)}", template))
            pattern = re.sub(r"{(\w+)}", lambda slot: f"({_SLOTS[slot[1]]})", template.lower())
            result.append((name, slots, re.compile(pattern)))
    return tuple(result)


@lru_cache(maxsize=1)
def _lore() -> dict[str, str]:
    return {sentence.lower().rstrip("?"): kind for kind, sentences in LORE.items() for sentence in sentences}


def _noun_phrases(text: str) -> Iterator[str]:
    return (found[0] for found in re.finditer(rf"\b{_ANY}\b", text))


def _agrees(phrases: str) -> bool:
    """Whether article, number and noun of each noun phrase go together: an apple, two apples."""
    for phrase in _noun_phrases(phrases):
        first, second, noun = phrase.split()[0], phrase.split()[1], phrase.split()[-1]
        if first in ("a", "an") and (first == "an") != (second[0] in "aeiou"):
            return False
        plural = noun in PLURALS.values() or noun == "things"
        singular = noun in KINDS or noun == "thing"
        if not (singular if first in ("a", "an", "one", "the") else plural):
            return False
    return True
