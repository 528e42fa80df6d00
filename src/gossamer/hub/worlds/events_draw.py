"""Frames of the event videos: backdrop, place cue, object, tool, effect and hands, drawn at twice the size and reduced.

All that matters lies in a square of the frame's short side; a longer frame continues the backdrop mirrored on both
sides, so the middle square of a wide frame is the square frame. Motion has one cycle a clip: at the start and in the
middle of a clip, where two frames a second look, tool and object stand far apart.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from gossamer.core.errors import OptionError
from gossamer.hub.worlds.draw import draw_thing, paint_background
from gossamer.hub.worlds.events_scripts import PLACES, VERBS
from gossamer.hub.worlds.events_shapes import OBJECTS, RGB, TOOLS, Drawing
from gossamer.hub.worlds.shapes import Shape, polygon, rectangle, ring

_SCALE = 2
_OBJECT = (0.52, 0.58, 0.44)
# middle and size of a tool round the object, and whether the object hides it
_AT = {
    "above": (0.6, 0.27, 0.36, False),
    "on": (0.56, 0.46, 0.4, False),
    "right": (0.76, 0.5, 0.36, False),
    "top": (0.5, 0.42, 0.5, False),
    "front": (0.5, 0.68, 0.5, False),
    "under": (0.53, 0.62, 0.62, True),
    "behind": (0.56, 0.56, 0.64, True),
}  # fmt: skip
_EFFECTS: dict[str, tuple[RGB, float, int]] = {
    "drops": ((40, 120, 235), 0.022, 14), "drips": ((20, 20, 20), 0.022, 8), "grains": ((255, 255, 255), 0.013, 22),
    "dust": ((240, 214, 160), 0.018, 22), "sparks": ((255, 226, 60), 0.018, 18), "clods": ((80, 48, 26), 0.026, 12),
    "leaves": ((70, 170, 50), 0.024, 14), "paint": ((170, 40, 170), 0.022, 10), "dots": ((220, 60, 200), 0.022, 14),
    "bubbles": ((235, 248, 255), 0.034, 12), "steam": ((250, 250, 250), 0.045, 9),
}  # fmt: skip
_KEY = (1, 254, 3)
_RISING = ("steam", "bubbles")
_SKIN: RGB = (238, 184, 150)
_LEFT_ARM: Shape = (polygon("main", 0.0, 1.0, 0.5, 1.0, 0.72, 0.36, 0.46, 0.24),)
_STRIPES: Shape = tuple(
    polygon(
        "white",
        0.04 + 0.13 * step,
        0.86 - 0.2 * step,
        0.56 + 0.06 * step,
        0.92 - 0.2 * step,
        0.54 + 0.06 * step,
        1.0 - 0.2 * step,
        0.0 + 0.13 * step,
        0.94 - 0.2 * step,
    )
    for step in range(3)
)
_HAND: Shape = (
    polygon("main", 0.44, 0.3, 0.5, 0.06, 0.72, 0.0, 0.9, 0.1, 0.88, 0.3, 0.74, 0.42),
    polygon("main", 0.46, 0.26, 0.36, 0.08, 0.44, 0.02, 0.58, 0.16),
    rectangle("dark", 0.66, 0.06, 0.68, 0.22), rectangle("dark", 0.76, 0.08, 0.78, 0.22),
)  # fmt: skip
ARMS: dict[str, Drawing] = {
    "with the left hand": ((_LEFT_ARM, (232, 60, 60)), (_STRIPES, (232, 60, 60)), (_HAND, _SKIN)),
    "with the right hand": ((_LEFT_ARM, (30, 60, 150)), (_HAND, _SKIN)),
}
CUES: dict[str, tuple[tuple[float, float, float], Drawing]] = {
    "by the window": (
        (0.2, 0.24, 0.4),
        (
            ((rectangle("main", 0.0, 0.0, 1.0, 1.0),), (250, 250, 250)),
            ((rectangle("main", 0.08, 0.07, 0.92, 0.92),), (90, 190, 250)),
            ((ring("main", 0.68, 0.3, 0.17, 0.01), ), (255, 220, 40)),
            ((rectangle("main", 0.46, 0.04, 0.54, 0.96), rectangle("main", 0.04, 0.46, 0.96, 0.54)), (250, 250, 250)),
            ((polygon("main", -0.1, -0.06, 0.3, -0.06, 0.0, 0.8, -0.1, 0.8), polygon("main", 1.1, -0.06, 0.7, -0.06,
                1.0, 0.8, 1.1, 0.8)), (226, 70, 90)),
        ),
    ),
    "on the table": (
        (0.5, 0.94, 0.92),
        (
            ((rectangle("dark", 0.06, 0.4, 0.16, 0.8), rectangle("dark", 0.84, 0.4, 0.94, 0.8),
                rectangle("main", -0.02, 0.3, 1.02, 0.42)), (150, 92, 44)),
            ((polygon("main", 0.1, 0.29, 0.9, 0.29, 0.9, 0.5, 0.8, 0.44, 0.7, 0.5, 0.6, 0.44, 0.5, 0.5, 0.4, 0.44,
                0.3, 0.5, 0.2, 0.44, 0.1, 0.5),), (250, 250, 246)),
        ),
    ),
    "with a cloth": (
        (0.2, 0.82, 0.36),
        (
            ((polygon("main", 0.06, 0.2, 0.5, 0.06, 0.98, 0.2, 0.92, 0.6, 1.0, 0.9, 0.54, 1.0, 0.0, 0.88, 0.1,
                0.56),), (255, 250, 250)),
            ((rectangle("main", 0.2, 0.16, 0.32, 0.92), rectangle("main", 0.46, 0.1, 0.58, 0.98),
                rectangle("main", 0.72, 0.14, 0.84, 0.94),
              rectangle("main", 0.08, 0.3, 0.95, 0.42), rectangle("main", 0.08, 0.6, 0.94, 0.72)), (220, 40, 50)),
        ),
    ),
    "under the lamp": (
        (0.3, 0.2, 0.44),
        (
            ((polygon("light", 0.16, 0.5, 0.84, 0.5, 1.5, 1.9, -0.5, 1.9),), (255, 226, 90)),
            ((rectangle("main", 0.46, -0.5, 0.54, 0.2),), (40, 40, 40)),
            ((polygon("main", 0.36, 0.16, 0.64, 0.16, 0.92, 0.54, 0.08, 0.54),), (30, 130, 90)),
            ((ring("light", 0.5, 0.56, 0.13, 0.01),), (255, 236, 120)),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What one video has of its own: shifts of the object, its size, light, mirrored backdrop, texture."""

    seed: int
    shift: tuple[float, float]
    grow: float
    light: float
    mirror: bool


def random_look(rng: random.Random) -> Look:
    return Look(
        seed=rng.randrange(1 << 30),
        shift=(rng.uniform(-0.03, 0.03), rng.uniform(-0.02, 0.02)),
        grow=rng.uniform(0.94, 1.06),
        light=rng.uniform(0.88, 1.08),
        mirror=rng.random() < 0.5,
    )


class Painter:
    """Draws one video's frames at one size (height, width); keeps the still parts of the clip on show."""

    def __init__(self, scene: str, look: Look, style: str, size: tuple[int, int]) -> None:
        height, width = size
        if min(size) < 48 or max(size) > 3 * min(size) or max(size) > 1920:
            raise OptionError(
                "frames: size", must="be 48 to 1920 pixels, at most 3 to 1", got=size, do="give (height, width)"
            )
        self.look, self.style, self.side = look, style, min(size)
        square = paint_background(scene, self.side * _SCALE, style, seed=look.seed, layers=PLACES[scene].layers)
        self.square = ImageOps.mirror(square) if look.mirror else square
        self.light = [min(255, round(value * look.light)) for value in range(256)] * 3
        small = self.square.reduce(_SCALE).point(self.light)
        self.wide = Image.new("RGB", (width, height))
        left, top = (width - self.side) // 2, (height - self.side) // 2
        self.corner = (left, top)
        turn, across = (ImageOps.mirror, True) if width >= height else (ImageOps.flip, False)
        for step in (-1, 1):
            self.wide.paste(turn(small), (left + step * self.side * across, top + step * self.side * (not across)))
        self.clip: tuple[str, str, str] | None = None
        self.still = self.square
        self.sprite = lru_cache(maxsize=64)(self._sprite)

    def frame(self, verb: str, thing: str, postfix: str, phase: float) -> npt.NDArray[np.uint8]:
        """uint8 [h, w, 3]; ``phase`` in [0, 1) is how far the clip has come."""
        if self.clip != (verb, thing, postfix):
            self.clip, self.still = (verb, thing, postfix), self._still(postfix)
        canvas = self.still.copy()
        how = VERBS[verb]
        x, y, size, behind = _AT[how.at]
        across, down, turn, wide, high = _motion(how.motion, phase)
        moves_object = how.motion in _OBJECT_MOTIONS
        tool = (x, y, size, 1.0, 1.0, 0.0) if moves_object else (x + across, y + down, size, wide, high, turn)
        item = (*_OBJECT, 1.0, 1.0, 0.0)
        if moves_object:
            item = (_OBJECT[0] + across, _OBJECT[1] + down, _OBJECT[2], wide, high, turn)
        if behind:
            self._draw(canvas, TOOLS[how.tool], *tool)
        self._draw(canvas, OBJECTS[thing], *item)
        if not behind:
            self._draw(canvas, TOOLS[how.tool], *tool)
        self._effect(canvas, how.effect, phase)
        if postfix in ARMS:
            side = -1 if "left" in postfix else 1
            grip = (
                0.5 + side * 0.27 + (0 if moves_object else 0.6 * across),
                0.74 + (0 if moves_object else 0.6 * down),
            )
            self._draw(canvas, ARMS[postfix], *grip, 0.56, 1.0, 1.0, 0.0, mirror=side > 0)
        picture = canvas.reduce(_SCALE).point(self.light)
        if self.wide.size == picture.size:
            return np.array(picture)
        frame = self.wide.copy()
        frame.paste(picture, self.corner)
        return np.array(frame)

    def _still(self, postfix: str) -> Image.Image:
        canvas = self.square.copy()
        if postfix in CUES:
            place, drawing = CUES[postfix]
            self._draw(canvas, drawing, *place, 1.0, 1.0, 0.0, fixed=True)
        return canvas

    def _draw(
        self, canvas: Image.Image, drawing: Drawing, x: float, y: float, size: float, wide: float, high: float,
        turn: float, *, mirror: bool = False, fixed: bool = False,
    ) -> None:  # fmt: skip
        look, side = self.look, self.side * _SCALE
        if not fixed:
            x, y, size = x + look.shift[0], y + look.shift[1], size * look.grow
        across, down = size * wide * side / 2, size * high * side / 2
        left, top = x * side - across, y * side - down
        if self.style == "flat":
            _paint(canvas, drawing, (left, top, left + 2 * across, top + 2 * down), self.style, look.seed, turn, mirror)
            return
        picture, stencil, reach = self.sprite(drawing, round(2 * across), round(2 * down), round(turn), mirror)
        canvas.paste(picture, (round(left) - reach, round(top) - reach), stencil)

    def _sprite(
        self, drawing: Drawing, wide: int, high: int, turn: int, mirror: bool
    ) -> tuple[Image.Image, Image.Image, int]:
        """A grained drawing cut out, with a rim for what reaches out of its box: grain is slow to lay."""
        points = [number for shape, _ in drawing for _, outline in shape for point in outline for number in point]
        rim = max(0.5 - min(points), max(points) - 0.5, 0.5) - 0.5
        reach = round((rim + 0.05) * max(wide, high)) + 2
        picture = Image.new("RGB", (wide + 2 * reach, high + 2 * reach), _KEY)
        box = (float(reach), float(reach), float(reach + wide), float(reach + high))
        _paint(picture, drawing, box, self.style, self.look.seed, turn, mirror)
        return picture, Image.fromarray((np.asarray(picture) != _KEY).any(axis=2)), reach

    def _effect(self, canvas: Image.Image, effect: str, phase: float) -> None:
        if effect == "none":
            return
        colour, radius, count = _EFFECTS[effect]
        pen, side = ImageDraw.Draw(canvas), self.side * _SCALE
        reach = -0.34 if effect in _RISING else 0.34
        for x, start in _places(effect, count):
            way = (start + phase) % 1.0
            middle_x, middle_y = (x + self.look.shift[0]) * side, (0.5 - reach / 2 + way * reach) * side
            size = radius * side * (0.8 + 0.4 * start)
            pen.ellipse(
                (middle_x - size, middle_y - size, middle_x + size, middle_y + size), fill=colour, outline=(90, 90, 100)
            )


def _paint(
    canvas: Image.Image, drawing: Drawing, box: tuple[float, float, float, float], style: str, seed: int, turn: float,
    mirror: bool,
) -> None:  # fmt: skip
    for index, (shape, colour) in enumerate(drawing):
        draw_thing(canvas, shape, colour, box, style, seed=seed + index, angle=turn, mirror=mirror)


@lru_cache(maxsize=32)
def _places(effect: str, count: int) -> tuple[tuple[float, float], ...]:
    rng = random.Random(effect)
    return tuple((rng.uniform(0.28, 0.74), rng.random()) for _ in range(count))


_OBJECT_MOTIONS = ("lift", "sink", "squash", "halve", "spin", "shake")


def _motion(name: str, phase: float) -> tuple[float, float, float, float, float]:
    """Shift across and down, turn in degrees, and growth across and down, after ``phase`` of a clip."""
    wave, other = math.cos(2 * math.pi * phase), math.sin(2 * math.pi * phase)
    return {
        "still": (0.0, 0.0, 0.0, 1.0, 1.0),
        "slide": (0.13 * wave, 0.0, 0.0, 1.0, 1.0),
        "creep": (0.1 - 0.2 * phase, 0.0, 0.0, 1.0, 1.0),
        "chop": (0.05 * wave, -0.08 * wave, 14 * wave, 1.0, 1.0),
        "press": (0.0, -0.08 * wave, 0.0, 1.0, 1.0),
        "circle": (0.07 * wave, 0.07 * other, 0.0, 1.0, 1.0),
        "swing": (0.0, 0.0, 24 * wave, 1.0, 1.0),
        "tilt": (0.0, 0.0, 150 + 12 * wave, 1.0, 1.0),
        "lift": (0.0, 0.04 - 0.24 * phase, 0.0, 1.0, 1.0),
        "sink": (0.0, -0.2 + 0.3 * phase, 0.0, 1.0, 1.0),
        "shake": (0.04 * wave, 0.0, 5 * wave, 1.0, 1.0),
        "spin": (0.0, -0.06, 0.0, 0.85 + 0.2 * wave, 1.0),
        "squash": (0.0, 0.04 + 0.04 * wave, 0.0, 1.08 - 0.12 * wave, 0.75 + 0.2 * wave),
        "halve": (0.0, -0.08, 0.0, 0.75 + 0.25 * wave, 1.0),
    }[name]
