"""Backgrounds of the worlds: coloured polygons on the unit square, painted in order; nothing looks like a thing.

``paint_background`` renders one in a style. The photographic style lays the grain of real photographs over it.
"""

from __future__ import annotations

import random
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.hub.worlds.shapes import Part, arc, rectangle
from gossamer.hub.worlds.textures import photo_crop, shade, shifted

STYLES = ("flat", "textured", "photo")
RGB = tuple[int, int, int]
Layer = tuple[RGB, tuple[tuple[float, float], ...]]


def check_style(style: str) -> None:
    """Raises OptionError for a name that is not in STYLES."""
    if style not in STYLES:
        raise OptionError("style", must="be a known name", got=repr(style), do=did_you_mean(style, STYLES))


def _layer(colour: RGB, part: Part) -> Layer:
    return colour, part[1]


def _band(colour: RGB, top: float, bottom: float = 1.0) -> Layer:
    return _layer(colour, rectangle("", 0, top, 1, bottom))


def _spots(colour: RGB, radius: float, *numbers: float) -> tuple[Layer, ...]:
    return tuple((colour, arc(x, y, radius, radius)) for x, y in zip(numbers[::2], numbers[1::2], strict=True))


def _wave(colour: RGB, top: float) -> Layer:
    crests = [(step / 12, top + (0.02 if step % 2 else -0.02)) for step in range(13)]
    return colour, (*crests, (1.0, 1.0), (0.0, 1.0))


BACKDROPS: dict[str, tuple[Layer, ...]] = {
    "beach": (
        _band((190, 228, 246), 0), _band((120, 196, 216), 0.38), _wave((244, 224, 176), 0.52),
        *_spots((226, 202, 150), 0.012, 0.1, 0.7, 0.3, 0.86, 0.52, 0.74, 0.7, 0.92, 0.9, 0.68),
    ),
    "garden": (
        _band((214, 238, 240), 0), _band((196, 216, 150), 0.62),
        *(_layer((250, 248, 240), rectangle("", 0.02 + step / 8, 0.3, 0.1 + step / 8, 0.68)) for step in range(8)),
        _band((250, 248, 240), 0.38, 0.43), _band((250, 248, 240), 0.56, 0.61),
    ),
    "meadow": (
        _band((206, 234, 250), 0), ((178, 218, 156), arc(0.22, 1.05, 0.6, 0.62)),
        ((160, 206, 136), arc(0.85, 1.1, 0.6, 0.6)),
        _band((170, 212, 142), 0.82),
    ),
    "night": (
        _band((40, 46, 92), 0), _band((58, 64, 112), 0.5), _band((30, 34, 66), 0.86),
        *_spots((236, 236, 214), 0.009, 0.08, 0.1, 0.24, 0.3, 0.37, 0.07, 0.5, 0.4, 0.64, 0.16, 0.78, 0.34, 0.93, 0.09,
                0.12, 0.56, 0.36, 0.68, 0.6, 0.62, 0.88, 0.6),
    ),
    "room": (
        _band((246, 226, 206), 0),
        *(_layer((238, 214, 192), rectangle("", step / 6, 0, step / 6 + 0.08, 0.7)) for step in range(6)),
        _band((250, 246, 240), 0.67, 0.71), _band((206, 170, 136), 0.71), _band((190, 152, 118), 0.84, 0.855),
    ),
    "sea": (
        _band((216, 240, 248), 0), _wave((132, 202, 226), 0.3), _wave((104, 182, 216), 0.54),
        _wave((80, 160, 202), 0.78),
    ),
    "snow": (
        _band((206, 216, 230), 0), ((240, 244, 250), arc(0.3, 1.1, 0.7, 0.6)),
        ((250, 252, 255), arc(0.9, 1.2, 0.7, 0.6)),
        *_spots((255, 255, 255), 0.014, 0.1, 0.12, 0.26, 0.36, 0.42, 0.16, 0.58, 0.34, 0.74, 0.1, 0.9, 0.3, 0.06, 0.5),
    ),
    "street": (
        _band((222, 226, 230), 0), *(
            _layer((204 - 10 * (step % 2), 200, 206), rectangle("", step / 5, 0.12 + step % 3 / 10, 0.2 + step / 5, 1))
            for step in range(5)
        ),
        _band((190, 188, 186), 0.58), _band((136, 138, 144), 0.66),
        *(_layer((240, 238, 226), rectangle("", 0.04 + step / 4, 0.81, 0.18 + step / 4, 0.84)) for step in range(4)),
    ),
}  # fmt: skip


def paint_background(
    name: str,
    size: int | tuple[int, int],
    style: str = "flat",
    *,
    seed: int = 0,
    layers: tuple[Layer, ...] | None = None,
) -> Image.Image:
    """A fresh RGB picture of ``size`` (side, or width and height, in pixels).

    ``layers`` paints another backdrop than the one of BACKDROPS; ``seed`` picks texture or photograph. Raises
    OptionError for an unknown name or style, MissingExtra where the photographs are not installed.
    """
    check_style(style)
    if layers is None and name not in BACKDROPS:
        raise OptionError("background", must="be a known name", got=repr(name), do=did_you_mean(name, BACKDROPS))
    wide, high = (size, size) if isinstance(size, int) else size
    flat = _flat(layers or BACKDROPS[name], wide, high, style == "textured")
    if style == "flat":
        return flat.copy()
    rng = random.Random(seed)
    if style == "textured":
        return ImageChops.hard_light(flat, shade(rng, wide, high, contrast=26).convert("RGB"))
    grey = shade(rng, wide, high, photo=True, contrast=50)
    return Image.blend(ImageChops.hard_light(flat, grey.convert("RGB")), photo_crop(rng, wide, high), 0.25)


@lru_cache(maxsize=64)
def _flat(layers: tuple[Layer, ...], wide: int, high: int, shift: bool) -> Image.Image:
    image = Image.new("RGB", (wide, high))
    pen = ImageDraw.Draw(image)
    for colour, points in layers:
        pen.polygon([(x * wide, y * high) for x, y in points], fill=shifted(colour) if shift else colour)
    return image
