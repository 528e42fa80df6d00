"""Pictures of scenes, with the exact box and mask of each thing.

Everything is drawn at twice the size and reduced, from the polygons of ``shapes``. ``draw_thing`` and
``paint_background`` work on any canvas, so other worlds draw with them too; ``KINDS`` names may be replaced by a shape.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.hub.worlds.backdrops import RGB, STYLES, check_style, paint_background
from gossamer.hub.worlds.scene import Scene, Thing
from gossamer.hub.worlds.shapes import SHAPES, Shape
from gossamer.hub.worlds.textures import shade, shifted

__all__ = ["PAINTS", "STYLES", "boxes", "draw", "draw_thing", "masks", "paint_background"]

Box = tuple[float, float, float, float]
PAINTS: dict[str, RGB] = {
    "red": (218, 36, 42), "orange": (250, 136, 16), "yellow": (252, 218, 44), "green": (40, 150, 66),
    "blue": (36, 92, 220), "purple": (128, 52, 176), "pink": (250, 138, 190), "brown": (122, 74, 38),
}  # fmt: skip
_FIXED: dict[str, RGB] = {"ink": (36, 36, 44), "wood": (126, 120, 116), "white": (252, 252, 248)}
_TINTED = ("main", "dark", "light")
_SCALE = 2
_FILL = {"big": 0.94, "small": 0.66}
_GLYPH = (0.6, 0.21)  # height, at most, of the thing's box and of the picture: 21 to 24 pixels at 112


def draw(scene: Scene, size: int = 112, style: str = "flat") -> Image.Image:
    """The RGB picture of a scene, ``size`` pixels a side (48 to 448); the same for the same scene, always.

    Raises OptionError for another size or style, MissingExtra where the photo style lacks its photographs.
    """
    _check(size, style)
    image = paint_background(scene.background, size * _SCALE, style, seed=scene.texture)
    for index, thing in enumerate(scene.things):
        box = _box(scene, thing, size * _SCALE)
        draw_thing(
            image, thing.kind, thing.colour, box, style,
            seed=scene.texture + 7919 * (index + 1), angle=thing.angle, glyph=thing.glyph, action=thing.action,
            glyph_tall=_glyph_tall(box, size * _SCALE),
        )  # fmt: skip
    return image.reduce(_SCALE).point(_light(scene.light))


def draw_thing(
    image: Image.Image,
    kind: str | Shape,
    colour: str | RGB,
    box: Box,
    style: str = "flat",
    *,
    seed: int = 0,
    angle: float = 0.0,
    mirror: bool = False,
    glyph: str = "",
    action: str = "",
    glyph_tall: float = 0.0,
) -> None:
    """Paint one thing into ``box`` (left, top, right, bottom in pixels of ``image``, fractions allowed), in place.

    ``kind`` names one of SHAPES or is a shape of one's own, ``colour`` one of PAINTS or RGB; ``angle`` turns it
    clockwise in degrees about the middle of the box, ``seed`` picks its texture, ``glyph_tall`` is the glyph's height
    in pixels (0: six tenths of the box). Draw at twice the size wanted, then reduce. Raises OptionError for an unknown
    kind, colour or style.
    """
    check_style(style)
    if isinstance(colour, str) and colour not in PAINTS:
        raise OptionError("colour", must="be a known name", got=repr(colour), do=did_you_mean(colour, PAINTS))
    outlines = _outlines(kind, box, angle, mirror)
    paint = PAINTS[colour] if isinstance(colour, str) else colour
    paints = _paints(shifted(paint) if style == "textured" else paint)
    width = _outline_width(box)
    pen = ImageDraw.Draw(image)
    edge = _FIXED["white"] if style == "photo" else _FIXED["ink"]
    rng = random.Random(seed)
    for _, points in outlines:
        pen.line(_wobbly(points, width / 3, rng) if style == "textured" else _closed(points), fill=edge, width=width)
    for role, points in outlines:
        pen.polygon(points, fill=paints[role])
    if style != "flat":
        _lay_grain(image, outlines, box, rng, style)
    _add_signs(pen, box, glyph, action, glyph_tall)


def masks(scene: Scene, size: int = 112) -> dict[int, NDArray[np.bool_]]:
    """For each index into ``scene.things`` the pixels [size, size] that the thing covers, plate and bubble included."""
    _check(size, "flat")
    result = {}
    for index, thing in enumerate(scene.things):
        box = _box(scene, thing, size * _SCALE)
        stencil = Image.new("L", (size * _SCALE, size * _SCALE))
        pen = ImageDraw.Draw(stencil)
        for _, points in _outlines(thing.kind, box, thing.angle, False):
            pen.line(_closed(points), fill=255, width=_outline_width(box))
            pen.polygon(points, fill=255)
        _add_signs(pen, box, thing.glyph, thing.action, _glyph_tall(box, size * _SCALE), stencil=True)
        result[index] = np.asarray(stencil.reduce(_SCALE)) >= 128
    return result


def boxes(scene: Scene, size: int = 112) -> dict[int, tuple[int, int, int, int]]:
    """For each index into ``scene.things`` the tightest (left, top, right, bottom) of its mask, the ends excluded."""
    result = {}
    for index, mask in masks(scene, size).items():
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        result[index] = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return result


def _box(scene: Scene, thing: Thing, side: int) -> Box:
    cell = side / scene.grid
    length = cell * _FILL[thing.size]
    room = (cell - length) / 2
    left = thing.cell[1] * cell + room * (1 + 0.8 * thing.shift[0])
    top = thing.cell[0] * cell + room * (1 + 0.8 * thing.shift[1])
    return left, top, left + length, top + length


def _glyph_tall(box: Box, side: int) -> float:
    return min(_GLYPH[0] * (box[2] - box[0]), _GLYPH[1] * side)


def _outlines(kind: str | Shape, box: Box, angle: float, mirror: bool) -> list[tuple[str, list[tuple[float, float]]]]:
    if isinstance(kind, str) and kind not in SHAPES:
        raise OptionError("kind", must="be a known name", got=repr(kind), do=did_you_mean(kind, SHAPES))
    shape = SHAPES[kind] if isinstance(kind, str) else kind
    left, top, right, bottom = box
    across, down = right - left, bottom - top
    turn = math.radians(angle)
    # A turned square sticks out of its box: shrink it so that its corners stay inside.
    shrink = 1 / (abs(math.cos(turn)) + abs(math.sin(turn)))
    cos, sin = math.cos(turn) * shrink, math.sin(turn) * shrink
    middle_x, middle_y, flip = left + across / 2, top + down / 2, -1 if mirror else 1
    return [
        (
            role,
            [
                (
                    middle_x + across * (flip * (x - 0.5) * cos - (y - 0.5) * sin),
                    middle_y + down * (flip * (x - 0.5) * sin + (y - 0.5) * cos),
                )
                for x, y in points
            ],
        )
        for role, points in shape
    ]


def _outline_width(box: Box) -> int:
    return max(2, round(0.045 * (box[2] - box[0])))


def _closed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [*points, points[0], points[1]]


def _wobbly(points: list[tuple[float, float]], reach: float, rng: random.Random) -> list[tuple[float, float]]:
    twice = points + _closed(points)
    return [(x + reach * (rng.random() - 0.5) * 2, y + reach * (rng.random() - 0.5) * 2) for x, y in twice]


@lru_cache(maxsize=256)
def _paints(main: RGB) -> dict[str, RGB]:
    dark = tuple(round(0.68 * value) for value in main)
    light = tuple(round(value + 0.45 * (255 - value)) for value in main)
    return {"main": main, "dark": dark, "light": light, **_FIXED}  # type: ignore[dict-item]


def _lay_grain(
    image: Image.Image,
    outlines: list[tuple[str, list[tuple[float, float]]]],
    box: Box,
    rng: random.Random,
    style: str,
) -> None:
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    wide, high = right - left, bottom - top
    stencil = Image.new("L", (wide, high))
    pen = ImageDraw.Draw(stencil)
    for role, points in outlines:
        pen.polygon([(x - left, y - top) for x, y in points], fill=255 if role in _TINTED else 0)
    grain = shade(rng, wide, high, photo=style == "photo", contrast=64 if style == "photo" else 56)
    area = image.crop((left, top, right, bottom))
    image.paste(ImageChops.hard_light(area, grain.convert("RGB")), (left, top), stencil)


def _add_signs(
    pen: ImageDraw.ImageDraw, box: Box, glyph: str, action: str, glyph_tall: float, *, stencil: bool = False
) -> None:
    """A plate with the glyph at the lower right of the box; a bubble at its top right: Z for sleep, a note for song."""
    ink: RGB | int = 255 if stencil else _FIXED["ink"]
    white: RGB | int = 255 if stencil else _FIXED["white"]
    length = box[2] - box[0]
    if glyph:
        tall = glyph_tall or _GLYPH[0] * length
        left, top, right, bottom = box[2] - 0.9 * tall, box[3] - 1.22 * tall, box[2], box[3]
        pen.rectangle((left, top, right, bottom), fill=white, outline=ink, width=max(1, round(0.03 * length)))
        _write(pen, glyph, (left + right) / 2, bottom - 0.11 * tall, tall, ink)
    if action:
        radius = 0.17 * length
        x, y = box[2] - radius, box[1] + radius
        pen.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=white, outline=ink, width=max(1, round(radius / 8))
        )
        if action == "sleeping":
            _write(pen, "Z", x, y + 0.55 * radius, 1.1 * radius, ink)
        else:
            _note(pen, x, y, 0.3 * radius, ink)


def _note(pen: ImageDraw.ImageDraw, x: float, y: float, dot: float, ink: RGB | int) -> None:
    pen.ellipse((x - 2 * dot, y + 0.6 * dot, x, y + 2.3 * dot), fill=ink)
    stem = x - dot / 4
    pen.line((stem, y + 1.4 * dot, stem, y - 2 * dot, x + 1.6 * dot, y - dot), fill=ink, width=max(1, round(dot / 1.6)))


def _write(pen: ImageDraw.ImageDraw, glyph: str, x: float, baseline: float, tall: float, ink: RGB | int) -> None:
    font, capital = _font(round(tall / 0.7))
    if capital != round(tall):
        font, _ = _font(round(round(tall / 0.7) * tall / capital))
    pen.text(
        (x, baseline), glyph, fill=ink, font=font, anchor="ms", stroke_width=max(0, round(tall / 28)), stroke_fill=ink
    )


@lru_cache(maxsize=64)
def _font(points: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """Pillow's own scalable font, and how tall its capitals are in pixels at this size."""
    font = ImageFont.load_default(points)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OptionError("worlds: glyphs", must="have a Pillow with FreeType", do="install Pillow from its wheel")
    top, bottom = font.getbbox("H", anchor="ls")[1::2]
    return font, round(bottom - top)


@lru_cache(maxsize=512)
def _light(light: float) -> list[int]:
    return [min(255, round(value * light)) for value in range(256)] * 3


def _check(size: int, style: str) -> None:
    check_style(style)
    if not 48 <= size <= 448:
        raise OptionError("worlds: size", must="be 48 to 448 pixels", got=size)
