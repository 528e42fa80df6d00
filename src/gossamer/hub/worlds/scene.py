"""Scene graphs of the still-image world: what lies where, exactly, and nothing about pixels.

A scene is a grid of cells; each thing fills one cell of its own, so places, counts and relations are facts of the
graph. Light, shifts, tilts and texture numbers belong to the scene as well: the same scene always gives the same
picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer.core.errors import InputError, did_you_mean

KINDS = (
    "apple", "ball", "bell", "bird", "boat", "box", "butterfly", "car", "cat", "cup", "fish", "flower",
    "hat", "heart", "house", "key", "kite", "moon", "mushroom", "rocket", "star", "sun", "tree", "umbrella",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES = ("small", "big")
BACKGROUNDS = ("beach", "garden", "meadow", "night", "room", "sea", "snow", "street")
DIGITS = "0123456789"
# Capitals that look like a digit or are wider than a plate are left out.
LETTERS = "ACEFHJKLNPRTUVXY"
ANIMALS = ("bird", "butterfly", "cat", "fish")
ACTIONS = ("sleeping", "singing")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = (
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object. ``cell`` is (row, column) from the top left; ``glyph`` is a digit or capital on a plate, or "".

    ``shift`` (across, down; each -1 to 1) moves it within the room that its cell leaves, ``angle`` tilts it in degrees.
    """

    kind: str
    colour: str
    size: str = "big"
    cell: tuple[int, int] = (0, 0)
    glyph: str = ""
    action: str = ""
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0

    def __post_init__(self) -> None:
        _one_of("thing: kind", self.kind, KINDS)
        _one_of("thing: colour", self.colour, COLOURS)
        _one_of("thing: size", self.size, SIZES)
        if self.glyph and (len(self.glyph) != 1 or self.glyph not in DIGITS + LETTERS):
            raise InputError("thing: glyph", must=f"be one of {DIGITS + LETTERS} or empty", got=repr(self.glyph))
        if self.action:
            _one_of("thing: action", self.action, ACTIONS)


@dataclass(frozen=True)
class Scene:
    """Things on a ``grid`` x ``grid`` board before a background; ``light`` is the brightness, 1 being plain."""

    things: tuple[Thing, ...]
    background: str = "meadow"
    grid: int = 3
    light: float = 1.0
    texture: int = 0

    def __post_init__(self) -> None:
        _one_of("scene: background", self.background, BACKGROUNDS)
        if self.grid < 1:
            raise InputError("scene: grid", must="be at least 1", got=self.grid)
        cells = [thing.cell for thing in self.things]
        if len(set(cells)) < len(cells):
            raise InputError("scene: things", must="each have a cell of their own", got=sorted(cells))
        if any(not (0 <= row < self.grid and 0 <= column < self.grid) for row, column in cells):
            raise InputError("scene: cells", must=f"lie on the {self.grid} x {self.grid} grid", got=sorted(cells))
        if self.grid > 3 and any(thing.glyph for thing in self.things):
            raise InputError("scene: glyphs", must="stand on a grid of at most 3, to be read", got=self.grid)

    def matching(self, kind: str = "", colour: str = "", size: str = "", place: str = "") -> tuple[Thing, ...]:
        """The things that agree with all that is given ("" = anything)."""
        return tuple(
            thing
            for thing in self.things
            if kind in ("", thing.kind)
            and colour in ("", thing.colour)
            and size in ("", thing.size)
            and place in ("", self.place(thing))
        )

    def count(self, kind: str = "", colour: str = "", size: str = "") -> int:
        return len(self.matching(kind, colour, size))

    def place(self, thing: Thing) -> str:
        """One of PLACES: the third of the picture, across and down, in which the centre of the thing's cell lies."""
        row, column = (min(2, 3 * (2 * index + 1) // (2 * self.grid)) for index in thing.cell)
        return PLACES[3 * row + column]

    def key(self) -> str:
        """What is shown, without light, shifts, tilts and texture: equal keys tell the same."""
        things = sorted(f"{t.cell} {t.size} {t.colour} {t.kind} {t.glyph} {t.action}" for t in self.things)
        return f"{self.background} {self.grid} " + "; ".join(things)


def holds(first: Thing, relation: str, second: Thing) -> bool:
    """Whether ``first`` is ``relation`` (one of RELATIONS) ``second``, by columns or rows of their cells."""
    _one_of("relation", relation, RELATIONS)
    down, across = second.cell[0] - first.cell[0], second.cell[1] - first.cell[1]
    return {"left of": across > 0, "right of": across < 0, "above": down > 0, "below": down < 0}[relation]


def sample_scene(
    rng: random.Random,
    *,
    things: int | tuple[int, int] = (1, 4),
    kinds: Sequence[str] = KINDS,
    colours: Sequence[str] = COLOURS,
    backgrounds: Sequence[str] = BACKGROUNDS,
    grid: int = 3,
    same: int = 1,
    glyphs: float = 0.0,
    actions: float = 0.0,
    one_big: float = 0.5,
    jitter: bool = True,
) -> Scene:
    """Draw a scene; ``things`` is a number or a range with both ends.

    ``same`` things share one kind that no other thing has; ``glyphs`` and ``actions`` are the chances that a thing
    bears a glyph (which makes it big) and that an animal without one sleeps or sings; ``one_big`` is the chance that
    one thing alone is big, where nothing bears a glyph.
    """
    low, high = (things, things) if isinstance(things, int) else things
    number = max(same, rng.randint(low, high))
    if not 1 <= number <= grid * grid:
        raise InputError("scene: things", must=f"be 1 to {grid * grid} on a grid of {grid}", got=number)
    if not kinds or not colours or not backgrounds or (len(kinds) == 1 and number > same):
        raise InputError("scene: kinds, colours, backgrounds", must="leave a choice", do="name more of them")
    shared = rng.choice(kinds)
    others = [kind for kind in kinds if kind != shared]
    chosen = [shared] * same + [rng.choice(others) for _ in range(number - same)]
    rng.shuffle(chosen)
    cells = rng.sample([(row, column) for row in range(grid) for column in range(grid)], number)
    signs = [_glyph(rng) if rng.random() < glyphs else "" for _ in chosen]
    sizes = _sizes(rng, signs, one_big)
    placed = []
    for kind, cell, sign, size in zip(chosen, cells, signs, sizes, strict=True):
        acts = kind in ANIMALS and not sign and size == "big" and rng.random() < actions
        thing = Thing(kind, rng.choice(colours), size, cell, sign, rng.choice(ACTIONS) if acts else "")
        placed.append(_jittered(thing, rng) if jitter else thing)
    light = round(rng.uniform(0.82, 1.08), 3) if jitter else 1.0
    return Scene(tuple(placed), rng.choice(backgrounds), grid, light, rng.randrange(2**31) if jitter else 0)


def _glyph(rng: random.Random) -> str:
    return rng.choice(DIGITS if rng.random() < 0.5 else LETTERS)


def _sizes(rng: random.Random, signs: list[str], one_big: float) -> list[str]:
    if any(signs):
        return ["big" if sign else rng.choice(SIZES) for sign in signs]
    if rng.random() < one_big:
        biggest = rng.randrange(len(signs))
        return ["big" if index == biggest else "small" for index in range(len(signs))]
    return [rng.choice(SIZES) for _ in signs]


def _jittered(thing: Thing, rng: random.Random) -> Thing:
    shift = (round(rng.uniform(-1, 1), 3), round(rng.uniform(-1, 1), 3))
    return replace(thing, shift=shift, angle=round(rng.uniform(-8, 8), 2))


def _one_of(where: str, got: str, names: Sequence[str]) -> None:
    if got not in names:
        raise InputError(where, must="be a known name", got=repr(got), do=did_you_mean(got, names))
