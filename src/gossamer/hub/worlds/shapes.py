"""Outlines of the things, as filled polygons on the unit square (x to the right, y down), painted in this order.

A shape is a tuple of parts; a part is (role, points). The role names the paint: ``main``, ``dark`` and ``light`` are
shades of the thing's colour, ``ink``, ``wood`` and ``white`` are the same on every thing.
"""

from __future__ import annotations

import math

Point = tuple[float, float]
Part = tuple[str, tuple[Point, ...]]
Shape = tuple[Part, ...]
ROLES = ("main", "dark", "light", "ink", "wood", "white")


def polygon(role: str, *numbers: float) -> Part:
    """A polygon from x, y, x, y ..."""
    return role, tuple(zip(numbers[::2], numbers[1::2], strict=True))


def rectangle(role: str, left: float, top: float, right: float, bottom: float) -> Part:
    return polygon(role, left, top, right, top, right, bottom, left, bottom)


def arc(x: float, y: float, across: float, down: float, start: float = 0, stop: float = 360) -> tuple[Point, ...]:
    """Points of an elliptic arc round (x, y) with the two radii; degrees run clockwise from the right."""
    steps = max(4, round(abs(stop - start) / 15))
    turns = [math.radians(start + (stop - start) * step / steps) for step in range(steps + 1)]
    return tuple((x + across * math.cos(turn), y + down * math.sin(turn)) for turn in turns)


def ellipse(role: str, x: float, y: float, across: float, down: float | None = None) -> Part:
    return role, arc(x, y, across, across if down is None else down)[:-1]


def pie(role: str, x: float, y: float, across: float, down: float, start: float, stop: float) -> Part:
    """A slice of an ellipse; half a turn is a dome or a bowl."""
    return role, (*arc(x, y, across, down, start, stop), (x, y))


def ring(role: str, x: float, y: float, outer: float, inner: float, start: float = 0, stop: float = 360) -> Part:
    """A ring or a part of one, with a true hole."""
    return role, arc(x, y, outer, outer, start, stop) + arc(x, y, inner, inner, stop, start)


def stroke(role: str, width: float, *numbers: float) -> Part:
    """A line of that width through x, y, x, y ..., as one polygon: there on one side, back on the other."""
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    there, back = [], []
    for index, (x, y) in enumerate(points):
        before, after = points[max(0, index - 1)], points[min(len(points) - 1, index + 1)]
        across, down = after[0] - before[0], after[1] - before[1]
        scale = width / 2 / (math.hypot(across, down) or 1.0)
        there.append((x - down * scale, y + across * scale))
        back.append((x + down * scale, y - across * scale))
    return role, (*there, *reversed(back))


def _star(role: str, x: float, y: float, outer: float, inner: float, rays: int = 5) -> Part:
    points = []
    for step in range(2 * rays):
        turn, radius = math.pi * step / rays - math.pi / 2, outer if step % 2 == 0 else inner
        points.append((x + radius * math.cos(turn), y + radius * math.sin(turn)))
    return role, tuple(points)


def _heart(role: str, scale: float) -> Part:
    points = []
    for step in range(32):
        turn = 2 * math.pi * step / 32
        x = 16 * math.sin(turn) ** 3
        y = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
        points.append((0.5 + scale * x / 34, 0.47 - scale * y / 32))
    return role, tuple(points)


def _eye(x: float, y: float, radius: float = 0.06) -> tuple[Part, Part]:
    return ellipse("white", x, y, radius), ellipse("ink", x + radius / 4, y, radius * 0.55)


def _petals(x: float, y: float, reach: float, radius: float) -> tuple[Part, ...]:
    turns = [2 * math.pi * step / 6 for step in range(6)]
    return tuple(ellipse("main", x + reach * math.cos(turn), y + reach * math.sin(turn), radius) for turn in turns)


_CRESCENT: Part = ("main", arc(0.46, 0.5, 0.46, 0.48, 50, 310) + arc(0.66, 0.5, 0.36, 0.37, 285, 75))

SHAPES: dict[str, Shape] = {
    "apple": (
        ellipse("main", 0.34, 0.6, 0.32, 0.36), ellipse("main", 0.66, 0.6, 0.32, 0.36),
        stroke("wood", 0.07, 0.5, 0.32, 0.52, 0.14, 0.58, 0.04),
        polygon("dark", 0.56, 0.18, 0.72, 0.05, 0.94, 0.08, 0.8, 0.22), ellipse("light", 0.24, 0.48, 0.07, 0.12),
    ),
    "ball": (
        ellipse("main", 0.5, 0.5, 0.48), pie("light", 0.5, 0.5, 0.48, 0.48, 20, 80),
        pie("white", 0.5, 0.5, 0.48, 0.48, 140, 200), pie("dark", 0.5, 0.5, 0.48, 0.48, 260, 320),
        ellipse("white", 0.5, 0.5, 0.09),
    ),
    "bell": (
        ellipse("ink", 0.5, 0.9, 0.11, 0.09), ring("wood", 0.5, 0.11, 0.11, 0.05),
        polygon("main", 0.5, 0.12, 0.66, 0.18, 0.75, 0.34, 0.8, 0.62, 0.93, 0.8,
                0.07, 0.8, 0.2, 0.62, 0.25, 0.34, 0.34, 0.18),
        rectangle("dark", 0.04, 0.74, 0.96, 0.86), polygon("light", 0.36, 0.28, 0.44, 0.24, 0.38, 0.62, 0.28, 0.62),
    ),
    "bird": (
        stroke("ink", 0.05, 0.42, 0.74, 0.4, 0.97), stroke("ink", 0.05, 0.56, 0.74, 0.56, 0.97),
        polygon("dark", 0.24, 0.5, 0.0, 0.3, 0.02, 0.62), ellipse("main", 0.46, 0.56, 0.32, 0.25),
        polygon("wood", 0.84, 0.26, 1.0, 0.36, 0.84, 0.42), ellipse("main", 0.72, 0.32, 0.19, 0.18),
        polygon("dark", 0.3, 0.46, 0.62, 0.5, 0.44, 0.74, 0.26, 0.68), *_eye(0.76, 0.28),
    ),
    "boat": (
        rectangle("wood", 0.46, 0.03, 0.52, 0.66), polygon("light", 0.55, 0.05, 0.55, 0.6, 0.94, 0.6),
        polygon("white", 0.43, 0.16, 0.43, 0.6, 0.12, 0.6),
        polygon("main", 0.02, 0.66, 0.98, 0.66, 0.8, 0.96, 0.2, 0.96), rectangle("dark", 0.06, 0.66, 0.94, 0.74),
    ),
    "box": (
        rectangle("main", 0.08, 0.34, 0.92, 0.97), rectangle("dark", 0.03, 0.2, 0.97, 0.4),
        rectangle("white", 0.43, 0.2, 0.57, 0.97),
        polygon("light", 0.5, 0.2, 0.2, 0.02, 0.2, 0.2), polygon("light", 0.5, 0.2, 0.8, 0.02, 0.8, 0.2),
    ),
    "butterfly": (
        ellipse("main", 0.26, 0.34, 0.25, 0.27), ellipse("main", 0.74, 0.34, 0.25, 0.27),
        ellipse("dark", 0.3, 0.73, 0.2, 0.21), ellipse("dark", 0.7, 0.73, 0.2, 0.21),
        ellipse("light", 0.24, 0.33, 0.11), ellipse("light", 0.76, 0.33, 0.11),
        ellipse("ink", 0.5, 0.54, 0.06, 0.34),
        stroke("ink", 0.04, 0.49, 0.24, 0.36, 0.04), stroke("ink", 0.04, 0.51, 0.24, 0.64, 0.04),
    ),
    "car": (
        polygon("main", 0.18, 0.5, 0.32, 0.2, 0.7, 0.2, 0.84, 0.5),
        polygon("main", 0.02, 0.52, 0.1, 0.46, 0.9, 0.46, 0.99, 0.56, 0.99, 0.76, 0.02, 0.76),
        polygon("white", 0.27, 0.46, 0.36, 0.27, 0.48, 0.27, 0.48, 0.46),
        polygon("white", 0.54, 0.46, 0.54, 0.27, 0.66, 0.27, 0.75, 0.46), rectangle("dark", 0.02, 0.63, 0.99, 0.7),
        ellipse("ink", 0.25, 0.77, 0.15), ellipse("ink", 0.76, 0.77, 0.15),
        ellipse("white", 0.25, 0.77, 0.06), ellipse("white", 0.76, 0.77, 0.06),
    ),
    "cat": (
        stroke("main", 0.1, 0.66, 0.88, 0.88, 0.86, 0.93, 0.66, 0.84, 0.5),
        ellipse("main", 0.46, 0.76, 0.27, 0.22), ellipse("light", 0.46, 0.8, 0.14, 0.14),
        polygon("main", 0.16, 0.36, 0.14, 0.01, 0.42, 0.16), polygon("main", 0.76, 0.36, 0.78, 0.01, 0.5, 0.16),
        ellipse("main", 0.46, 0.36, 0.31, 0.25), *_eye(0.34, 0.32, 0.075), *_eye(0.58, 0.32, 0.075),
        polygon("ink", 0.42, 0.42, 0.5, 0.42, 0.46, 0.47),
        stroke("ink", 0.025, 0.36, 0.47, 0.06, 0.42), stroke("ink", 0.025, 0.36, 0.51, 0.06, 0.54),
        stroke("ink", 0.025, 0.56, 0.47, 0.86, 0.42), stroke("ink", 0.025, 0.56, 0.51, 0.86, 0.54),
    ),
    "cup": (
        ring("dark", 0.7, 0.55, 0.25, 0.15, -90, 90),
        polygon("main", 0.06, 0.26, 0.76, 0.26, 0.68, 0.9, 0.6, 0.97, 0.22, 0.97, 0.14, 0.9),
        ellipse("light", 0.41, 0.26, 0.35, 0.11), ellipse("wood", 0.41, 0.27, 0.27, 0.07),
        stroke("white", 0.05, 0.3, 0.16, 0.34, 0.1, 0.3, 0.02), stroke("white", 0.05, 0.5, 0.16, 0.54, 0.1, 0.5, 0.02),
    ),
    "fish": (
        polygon("dark", 0.68, 0.5, 0.99, 0.22, 0.92, 0.5, 0.99, 0.78),
        polygon("dark", 0.3, 0.3, 0.5, 0.08, 0.64, 0.34), polygon("dark", 0.34, 0.7, 0.5, 0.9, 0.58, 0.68),
        ellipse("main", 0.4, 0.5, 0.39, 0.27), ring("light", 0.2, 0.5, 0.27, 0.22, -48, 48),
        *_eye(0.2, 0.43, 0.065),
    ),
    "flower": (
        stroke("wood", 0.06, 0.5, 0.5, 0.5, 0.98),
        polygon("wood", 0.5, 0.88, 0.62, 0.72, 0.82, 0.7, 0.7, 0.84), *_petals(0.5, 0.34, 0.2, 0.15),
        ellipse("white", 0.5, 0.34, 0.13), ellipse("dark", 0.5, 0.34, 0.06),
    ),
    "hat": (
        ellipse("main", 0.5, 0.8, 0.49, 0.14), polygon("main", 0.24, 0.14, 0.76, 0.14, 0.72, 0.8, 0.28, 0.8),
        ellipse("light", 0.5, 0.14, 0.26, 0.07), polygon("dark", 0.27, 0.58, 0.73, 0.58, 0.72, 0.75, 0.28, 0.75),
    ),
    "heart": (_heart("main", 1.0), pie("light", 0.32, 0.32, 0.13, 0.13, 150, 300)),
    "house": (
        rectangle("wood", 0.7, 0.08, 0.82, 0.34), rectangle("main", 0.13, 0.44, 0.87, 0.98),
        polygon("dark", 0.5, 0.03, 0.99, 0.47, 0.01, 0.47), rectangle("ink", 0.42, 0.66, 0.6, 0.98),
        rectangle("white", 0.2, 0.56, 0.36, 0.74), rectangle("white", 0.66, 0.56, 0.82, 0.74),
    ),
    "key": (
        ring("main", 0.26, 0.34, 0.25, 0.11), stroke("main", 0.13, 0.42, 0.48, 0.94, 0.9),
        stroke("main", 0.12, 0.7, 0.7, 0.58, 0.86), stroke("main", 0.12, 0.88, 0.85, 0.76, 0.99),
    ),
    "kite": (
        stroke("ink", 0.035, 0.5, 0.7, 0.62, 0.8, 0.46, 0.87, 0.58, 0.99),
        polygon("main", 0.5, 0.01, 0.86, 0.32, 0.5, 0.74, 0.14, 0.32),
        polygon("light", 0.5, 0.01, 0.86, 0.32, 0.5, 0.32), polygon("dark", 0.14, 0.32, 0.5, 0.32, 0.5, 0.74),
        polygon("white", 0.54, 0.84, 0.36, 0.78, 0.38, 0.92), polygon("white", 0.54, 0.84, 0.72, 0.76, 0.72, 0.92),
    ),
    "moon": (_CRESCENT, ellipse("dark", 0.12, 0.44, 0.05), ellipse("dark", 0.2, 0.68, 0.07)),
    "mushroom": (
        polygon("white", 0.38, 0.46, 0.62, 0.46, 0.68, 0.92, 0.6, 0.98, 0.4, 0.98, 0.32, 0.92),
        pie("main", 0.5, 0.54, 0.49, 0.5, 180, 360), ellipse("white", 0.5, 0.2, 0.09),
        ellipse("white", 0.26, 0.38, 0.08),
        ellipse("white", 0.74, 0.38, 0.08),
    ),
    "rocket": (
        polygon("white", 0.4, 0.78, 0.6, 0.78, 0.5, 1.0), polygon("dark", 0.32, 0.5, 0.08, 0.76, 0.1, 0.9, 0.34, 0.78),
        polygon("dark", 0.68, 0.5, 0.92, 0.76, 0.9, 0.9, 0.66, 0.78),
        polygon("main", 0.5, 0.0, 0.64, 0.16, 0.7, 0.36, 0.66, 0.8, 0.34, 0.8, 0.3, 0.36, 0.36, 0.16),
        polygon("light", 0.5, 0.0, 0.64, 0.16, 0.36, 0.16), ellipse("white", 0.5, 0.4, 0.12),
        ellipse("ink", 0.5, 0.4, 0.07),
    ),
    "star": (_star("main", 0.5, 0.53, 0.52, 0.22), _star("light", 0.5, 0.53, 0.22, 0.1)),
    "sun": (
        _star("dark", 0.5, 0.5, 0.5, 0.3, 10), ellipse("main", 0.5, 0.5, 0.31), ellipse("ink", 0.4, 0.44, 0.04),
        ellipse("ink", 0.6, 0.44, 0.04), ring("ink", 0.5, 0.5, 0.17, 0.13, 25, 155),
    ),
    "tree": (
        rectangle("wood", 0.42, 0.76, 0.58, 0.99), polygon("main", 0.5, 0.36, 0.96, 0.8, 0.04, 0.8),
        polygon("dark", 0.5, 0.18, 0.86, 0.56, 0.14, 0.56), polygon("main", 0.5, 0.01, 0.76, 0.34, 0.24, 0.34),
    ),
    "umbrella": (
        stroke("ink", 0.05, 0.5, 0.1, 0.5, 0.86), ring("ink", 0.6, 0.86, 0.125, 0.075, 0, 180),
        pie("main", 0.5, 0.52, 0.49, 0.5, 180, 360),
        polygon("light", 0.5, 0.02, 0.62, 0.24, 0.66, 0.52, 0.34, 0.52, 0.38, 0.24),
    ),
}  # fmt: skip
