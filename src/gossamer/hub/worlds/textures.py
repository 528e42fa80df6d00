"""Grain for surfaces: drawn patterns, and crops of the two photographs that scikit-learn ships.

A shade is a grey picture round 128 that is laid over a flat paint by hard light, so the paint's hue stays.
"""

from __future__ import annotations

import importlib.util
import random
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps, ImageStat

from gossamer.core.errors import MissingExtra

PATTERNS = ("stripes", "bars", "dots", "checks", "scribble", "grain")


def shifted(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """The chalk palette of the textured style: paler, and warmer in the shadows."""
    red, green, blue = colour
    grey = 0.3 * red + 0.6 * green + 0.1 * blue
    return (
        round(0.72 * red + 0.2 * grey + 26),
        round(0.72 * green + 0.2 * grey + 14),
        round(0.72 * blue + 0.2 * grey + 8),
    )


def shade(rng: random.Random, wide: int, high: int, *, photo: bool = False, contrast: int = 60) -> Image.Image:
    """A grey picture [high, wide] round 128, ``contrast`` being its spread: a pattern, or a photograph's grain."""
    if photo:
        grey = ImageOps.autocontrast(photo_crop(rng, wide, high).convert("L"), cutoff=2)
        mean = ImageStat.Stat(grey).mean[0]
        return grey.point([round(min(255, max(0, 128 + (value - mean) * contrast / 90))) for value in range(256)])
    return _pattern(rng.choice(PATTERNS), wide, high, contrast, rng)


def photo_crop(rng: random.Random, wide: int, high: int) -> Image.Image:
    """A random window, of any place and of 100 to 400 pixels, of one of the photographs, at ``wide`` x ``high``."""
    photo = rng.choice(photographs())
    across = rng.uniform(100, 400)
    down = min(across * high / wide, photo.height - 1)
    across = down * wide / high
    left, top = rng.uniform(0, photo.width - across), rng.uniform(0, photo.height - down)
    return photo.resize((wide, high), Image.Resampling.BILINEAR, (left, top, left + across, top + down))


@lru_cache(maxsize=1)
def photographs() -> tuple[Image.Image, ...]:
    """scikit-learn's two sample photographs (CC BY: flower.jpg by dany13, china.jpg by Dustin Lange)."""
    # Importing scikit-learn takes seconds and reseeds `random`; only its files are needed.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise MissingExtra("worlds: the photo style", "sklearn")
    folder = Path(package.origin).parent / "datasets" / "images"
    return tuple(Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg"))


def _pattern(name: str, wide: int, high: int, contrast: int, rng: random.Random) -> Image.Image:
    dark, bright = 128 - contrast, 128 + contrast * 2 // 3
    step = max(4, round(max(wide, high) * rng.uniform(0.09, 0.16)))
    if name == "grain":
        coarse = Image.frombytes("L", (24, 24), bytes(rng.choices(range(dark, bright), k=576)))
        return coarse.resize((wide, high), Image.Resampling.BILINEAR)
    image = Image.new("L", (wide, high), bright if name == "dots" else 128 + contrast // 4)
    pen = ImageDraw.Draw(image)
    if name == "stripes":
        for start in range(-high, wide, 2 * step):
            pen.line((start, 0, start + high, high), fill=dark, width=step)
    elif name == "bars":
        for top in range(0, high, 2 * step):
            pen.rectangle((0, top, wide, top + step - 1), fill=dark)
    elif name == "scribble":
        points = [(rng.uniform(0, wide), rng.uniform(0, high)) for _ in range(24)]
        pen.line(points, fill=dark, width=max(1, step // 4))
    else:
        for row, top in enumerate(range(0, high, step)):
            for left in range(row % 2 * step, wide, 2 * step):
                cell = (left, top, left + step - 1, top + step - 1)
                (pen.ellipse if name == "dots" else pen.rectangle)(cell, fill=dark)
    return image
