"""Still pictures with captions, descriptions and questions, split by scene.

A question's answer is one or two words of ANSWERS and follows from the picture alone; answers are balanced, so that
without the picture no kind of question is answered above about half. Difficulty: 1 the only or the big thing, 2 one
thing among several, 3 a count, a place or a relation, 4 a glyph, which needs local detail.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.hub.worlds import language
from gossamer.hub.worlds.backdrops import check_style
from gossamer.hub.worlds.draw import draw
from gossamer.hub.worlds.lexicon import NUMBERS, PLACE_WORDS, PLURALS
from gossamer.hub.worlds.scene import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    KINDS,
    LETTERS,
    PLACES,
    Scene,
    Thing,
    holds,
    sample_scene,
)

SPLITS = ("train", "validation", "test")
QUESTION_KINDS = ("colour", "shape", "place", "count", "relation", "glyph")
_SHARES = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
_MOST = 4  # highest count asked for
ANSWERS = (*COLOURS, *KINDS, *PLACES, *NUMBERS[: _MOST + 1], "yes", "no", "above", "below", *DIGITS, *LETTERS)


@dataclass(frozen=True)
class Question:
    """``kind`` is one of QUESTION_KINDS, ``answer`` one of ANSWERS, ``difficulty`` 1 to 4."""

    kind: str
    text: str
    answer: str
    difficulty: int


@dataclass(frozen=True)
class Still:
    """A scene with its picture and all that can be said and asked of it. ``key`` names it: split, seed, number."""

    scene: Scene
    style: str
    key: str

    def image(self, size: int = 112) -> Image.Image:
        """RGB picture, ``size`` pixels a side (48 to 448)."""
        return draw(self.scene, size, self.style)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Up to four short captions, different wordings and detail, all true."""
        return language.captions(self.scene, self._rng("captions"))

    def describe(self, length: str = "short", rng: random.Random | None = None) -> str:
        """Whole sentences, 20-25 ("short") or 60-70 words ("long"); ``rng`` picks other wordings."""
        return language.describe(self.scene, length, rng or self._rng(length))

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """One to three questions of each kind that this scene can be asked."""
        return tuple(_ask(self.scene, self._rng("questions")))

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.key} {purpose}")


def still_scenes(
    split: str,
    count: int,
    *,
    seed: int = 0,
    style: str = "flat",
    things: tuple[int, int] = (1, 4),
    grid: int = 3,
    kinds: Sequence[str] = KINDS,
    colours: Sequence[str] = COLOURS,
    backgrounds: Sequence[str] = BACKGROUNDS,
    glyphs: float = 0.5,
    actions: float = 0.3,
    glyph_grid: int = 2,
) -> list[Still]:
    """``count`` stills of a split; a shorter list is the beginning of a longer one.

    What a scene shows decides its split, so no scene of one split is in another, whatever the seed. ``things`` is the
    range of how many; a quarter of the scenes has the fewest, in the others the most frequent kind occurs 1 to 4
    times with equal chance. ``glyphs`` is the share of scenes in which things bear glyphs; those stand on a grid of
    ``glyph_grid`` where that has room, so that patches of 14 pixels show the glyphs well at 112 pixels (24 tall on a
    grid of 2, 21 on 3). ``actions`` is the chance that a big animal sleeps or sings. Raises OptionError for an unknown
    split or style, or ``things`` beyond the grid.
    """
    if split not in SPLITS:
        raise OptionError("worlds: split", must="be a known name", got=repr(split), do=did_you_mean(split, SPLITS))
    check_style(style)
    low, high = things
    if not 1 <= low <= high <= grid * grid:
        raise OptionError("worlds: things", must=f"be a range within 1 to {grid * grid}", got=things)
    result: list[Still] = []
    number = 0
    while len(result) < count:
        key = f"{split}-{seed}-{number}"
        number += 1
        rng = random.Random(key)
        same, total = 1, low
        if rng.random() >= 0.25:
            same = rng.randint(1, min(_MOST, high))
            total = rng.randint(max(low, same, min(2, high)), high)
        signs = rng.random() < glyphs
        scene = sample_scene(
            rng, things=total, same=same, kinds=kinds, colours=colours, backgrounds=backgrounds,
            grid=glyph_grid if signs and total <= glyph_grid**2 else grid, glyphs=0.7 if signs else 0.0,
            actions=actions,
        )  # fmt: skip
        if split_of(scene) == split:
            result.append(Still(scene, style, key))
    return result


def split_of(scene: Scene) -> str:
    """The split a scene belongs to, by the hash of what it shows: eight tenths train, one each the others."""
    share = hashlib.sha256(scene.key().encode()).digest()[0] % 10
    return next(name for name, shares in _SHARES.items() if share in shares)


def _ask(scene: Scene, rng: random.Random) -> Iterator[Question]:
    yield from _about_the_big_one(scene, rng)
    single = [thing for thing in scene.things if scene.count(thing.kind) == 1]
    if len(scene.things) > 1 and single:
        thing = rng.choice(single)
        yield Question("colour", f"What colour is the {thing.kind}?", thing.colour, 2)
        placed = rng.choice(single)
        yield Question("place", f"Where is the {placed.kind}?", scene.place(placed), 3)
    alone = [thing for thing in scene.things if len(scene.matching(place=scene.place(thing))) == 1]
    if len(scene.things) > 1 and alone:
        thing = rng.choice(alone)
        yield Question("shape", f"What is {_at(scene, thing)}?", thing.kind, 2)
    yield from _counts(scene, rng)
    yield from _relations(scene, single, rng)
    yield from _glyphs(scene, single, alone, rng)


def _about_the_big_one(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Easy: the only thing, or the only big one."""
    big = scene.matching(size="big")
    if len(scene.things) == 1:
        yield Question("shape", "What is in the picture?", scene.things[0].kind, 1)
        yield Question("colour", "What colour is it?", scene.things[0].colour, 1)
    elif len(big) == 1:
        yield Question("shape", "What is the big thing?", big[0].kind, 1)
        yield Question("colour", "What colour is the big thing?", big[0].colour, 1)


def _counts(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """How many of a kind: what there is most of, and now and then what there is none of; likewise of a colour."""
    if len(scene.things) < 2:
        return
    kinds = sorted({thing.kind for thing in scene.things}, key=lambda kind: (-scene.count(kind), kind))
    asked = rng.choice([kind for kind in KINDS if kind not in kinds]) if rng.random() < 0.17 else kinds[0]
    if scene.count(asked) <= _MOST:
        yield Question("count", f"How many {PLURALS[asked]} are there?", NUMBERS[scene.count(asked)], 3)
    wanted = rng.randint(0, 3)
    colours = [colour for colour in COLOURS if scene.count(colour=colour) == wanted]
    if colours:
        yield Question("count", f"How many {rng.choice(colours)} things are there?", NUMBERS[wanted], 3)


def _relations(scene: Scene, single: list[Thing], rng: random.Random) -> Iterator[Question]:
    pairs = [(first, second) for first in single for second in single if first is not second]
    beside = [pair for pair in pairs if pair[0].cell[1] != pair[1].cell[1]]
    stacked = [pair for pair in pairs if pair[0].cell[0] != pair[1].cell[0]]
    for choice, words in ((beside, ("left of", "right of")), (stacked, ("above", "below"))):
        if choice:
            first, second = rng.choice(choice)
            relation = rng.choice(words)
            answer = "yes" if holds(first, relation, second) else "no"
            yield Question("relation", f"Is the {first.kind} {relation} the {second.kind}?", answer, 3)
    if beside:
        first, second = rng.choice(beside)
        answer = "left" if holds(first, "left of", second) else "right"
        yield Question("relation", f"Is the {first.kind} left or right of the {second.kind}?", answer, 3)


def _glyphs(scene: Scene, single: list[Thing], alone: list[Thing], rng: random.Random) -> Iterator[Question]:
    named = [thing for thing in single if thing.glyph]
    if named:
        thing = rng.choice(named)
        yield Question("glyph", f"What is written on the {thing.kind}?", thing.glyph, 4)
    placed = [thing for thing in alone if thing.glyph]
    if placed:
        thing = rng.choice(placed)
        yield Question("glyph", f"What is written {_at(scene, thing)}?", thing.glyph, 4)


def _at(scene: Scene, thing: Thing) -> str:
    return PLACE_WORDS[scene.place(thing)][0]
