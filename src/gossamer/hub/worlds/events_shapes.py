"""What the event videos show: objects and tools, each a few painted shapes on the unit square (x right, y down).

An entry is drawn in order, every layer in the same box with its own colour; the roles are those of ``shapes``.
"""

from __future__ import annotations

from gossamer.hub.worlds.shapes import SHAPES, Shape, ellipse, pie, polygon, rectangle, ring, stroke

RGB = tuple[int, int, int]
Drawing = tuple[tuple[Shape, RGB], ...]

RED, GREEN, BLUE, YELLOW = (206, 44, 40), (66, 150, 60), (52, 104, 206), (246, 204, 62)
BROWN, TAN, STEEL, GREY = (140, 88, 46), (222, 178, 116), (184, 194, 204), (120, 126, 134)
ORANGE, PINK, CREAM, NAVY, BLACK = (240, 130, 36), (240, 140, 176), (250, 236, 202), (34, 50, 110), (52, 52, 60)
TEAL, PURPLE, WATER = (38, 160, 160), (124, 66, 170), (110, 180, 240)

OBJECTS: dict[str, Drawing] = {
    "potato": (
        (
            (
                ellipse("main", 0.36, 0.52, 0.34, 0.3), ellipse("main", 0.64, 0.58, 0.34, 0.3),
                ellipse("dark", 0.3, 0.44, 0.04), ellipse("dark", 0.52, 0.62, 0.04), ellipse("dark", 0.74, 0.5, 0.04),
                ellipse("dark", 0.4, 0.7, 0.03), ellipse("light", 0.5, 0.38, 0.1, 0.04),
            ),
            (178, 128, 70),
        ),
    ),
    "fish": ((SHAPES["fish"], (96, 150, 190)),),
    "flower": (
        ((stroke("main", 0.07, 0.5, 0.4, 0.5, 0.98), polygon("main", 0.5, 0.9, 0.78, 0.62, 0.94, 0.68, 0.7, 0.9),
          polygon("main", 0.5, 0.9, 0.22, 0.66, 0.06, 0.72, 0.3, 0.92)), GREEN),
        ((*(ellipse("main", x, y, 0.17) for x, y in ((0.5, 0.13), (0.7, 0.27), (0.63, 0.5), (0.37, 0.5), (0.3, 0.27))),
          ellipse("white", 0.5, 0.33, 0.12)), PINK),
    ),
    "tree": (
        ((rectangle("main", 0.42, 0.6, 0.58, 0.99),), BROWN),
        ((ellipse("main", 0.5, 0.26, 0.3, 0.25), ellipse("main", 0.28, 0.46, 0.26, 0.22), ellipse("main", 0.72, 0.46,
            0.26, 0.22),
          ellipse("light", 0.42, 0.2, 0.08), ellipse("dark", 0.7, 0.5, 0.08), ellipse("dark", 0.3, 0.5, 0.07)), GREEN),
    ),
    "soil": (
        ((polygon("main", 0.0, 0.95, 0.12, 0.66, 0.3, 0.5, 0.5, 0.42, 0.7, 0.52, 0.88, 0.66, 1.0, 0.95),
          ellipse("dark", 0.3, 0.74, 0.06, 0.04), ellipse("dark", 0.6, 0.64, 0.06, 0.04), ellipse("dark", 0.74, 0.84,
              0.06, 0.04),
          ellipse("light", 0.46, 0.84, 0.06, 0.03)), (96, 60, 34)),
    ),
    "plank": (
        ((rectangle("main", 0.0, 0.52, 1.0, 0.78), stroke("dark", 0.025, 0.04, 0.6, 0.4, 0.58, 0.96, 0.62),
          stroke("dark", 0.025, 0.04, 0.71, 0.5, 0.7, 0.96, 0.72), ellipse("dark", 0.7, 0.66, 0.06, 0.04)), TAN),
    ),
    "chair": (
        ((rectangle("main", 0.14, 0.02, 0.26, 0.98), rectangle("main", 0.14, 0.08, 0.66, 0.18),
            rectangle("main", 0.14, 0.3, 0.66, 0.4),
          rectangle("dark", 0.56, 0.02, 0.68, 0.6), rectangle("light", 0.1, 0.54, 0.92, 0.66),
              rectangle("main", 0.8, 0.62, 0.92, 0.98),
          rectangle("dark", 0.5, 0.66, 0.58, 0.9)), (168, 104, 52)),
    ),
    "shirt": (
        ((polygon("main", 0.3, 0.06, 0.42, 0.14, 0.58, 0.14, 0.7, 0.06, 1.0, 0.3, 0.88, 0.48, 0.76, 0.4, 0.76, 0.98,
            0.24, 0.98,
                  0.24, 0.4, 0.12, 0.48, 0.0, 0.3), rectangle("light", 0.24, 0.5, 0.76, 0.6),
                      rectangle("light", 0.24, 0.72, 0.76, 0.82),
          polygon("white", 0.38, 0.1, 0.5, 0.28, 0.62, 0.1, 0.5, 0.18)), BLUE),
    ),
    "sock": (
        ((polygon("main", 0.3, 0.02, 0.66, 0.02, 0.64, 0.56, 0.92, 0.74, 0.96, 0.9, 0.84, 0.98, 0.6, 0.96, 0.3, 0.76),
          rectangle("white", 0.3, 0.02, 0.66, 0.16), polygon("white", 0.84, 0.7, 0.96, 0.8, 0.94, 0.96, 0.78, 0.97),
          rectangle("light", 0.3, 0.3, 0.65, 0.42)), ORANGE),
    ),
    "dough": (
        ((pie("main", 0.5, 0.84, 0.48, 0.52, 180, 360), rectangle("main", 0.02, 0.82, 0.98, 0.9),
          ring("dark", 0.5, 0.8, 0.28, 0.24, 200, 300), ellipse("white", 0.36, 0.56, 0.1, 0.05)), CREAM),
    ),
    "bread": (
        ((ellipse("main", 0.5, 0.6, 0.49, 0.3), polygon("light", 0.24, 0.42, 0.34, 0.4, 0.28, 0.66, 0.2, 0.62),
          polygon("light", 0.46, 0.36, 0.56, 0.36, 0.5, 0.66, 0.42, 0.64), polygon("light", 0.68, 0.38, 0.78, 0.42,
              0.72, 0.66, 0.64, 0.66)),
         (190, 118, 48)),
    ),
    "cake": (
        ((rectangle("main", 0.08, 0.4, 0.92, 0.96), rectangle("dark", 0.08, 0.64, 0.92, 0.72)), (236, 176, 120)),
        ((rectangle("main", 0.06, 0.3, 0.94, 0.48), *(ellipse("main", 0.15 + 0.175 * step, 0.5, 0.08,
            0.08) for step in range(5)),
          ellipse("light", 0.5, 0.3, 0.44, 0.07)), PINK),
        ((ellipse("main", 0.5, 0.2, 0.1),), RED),
    ),
    "letter": (
        ((rectangle("light", 0.02, 0.24, 0.98, 0.86), polygon("white", 0.02, 0.24, 0.98, 0.24, 0.5, 0.6),
          stroke("dark", 0.03, 0.02, 0.24, 0.5, 0.6, 0.98, 0.24), stroke("dark", 0.03, 0.02, 0.86, 0.38, 0.52),
          stroke("dark", 0.03, 0.98, 0.86, 0.62, 0.52)), (196, 206, 226)),
        ((rectangle("main", 0.78, 0.66, 0.92, 0.8),), RED),
    ),
    "parcel": (
        ((polygon("light", 0.02, 0.32, 0.2, 0.14, 0.98, 0.14, 0.8, 0.32), polygon("dark", 0.8, 0.32, 0.98, 0.14, 0.98,
            0.76, 0.8, 0.96),
          rectangle("main", 0.02, 0.32, 0.8, 0.96)), (186, 134, 78)),
        ((rectangle("main", 0.36, 0.32, 0.48, 0.96), polygon("main", 0.36, 0.32, 0.54, 0.14, 0.66, 0.14, 0.48, 0.32)),
            GREEN),
    ),
    "tyre": (
        ((ring("main", 0.5, 0.5, 0.49, 0.31), *(ring("light", 0.5, 0.5, 0.49, 0.43, step * 30,
            step * 30 + 12) for step in range(12))),
         BLACK),
    ),
    "bicycle": (
        ((ring("main", 0.22, 0.66, 0.22, 0.17), ring("main", 0.78, 0.66, 0.22, 0.17)), BLACK),
        ((stroke("main", 0.05, 0.22, 0.66, 0.4, 0.34, 0.7, 0.34, 0.78, 0.66), stroke("main", 0.05, 0.4, 0.34, 0.5,
            0.66, 0.7, 0.34),
          stroke("main", 0.05, 0.22, 0.66, 0.5, 0.66), stroke("main", 0.05, 0.7, 0.34, 0.66, 0.2, 0.8, 0.16),
          rectangle("dark", 0.3, 0.24, 0.48, 0.3), stroke("main", 0.04, 0.4, 0.34, 0.39, 0.27)), TEAL),
    ),
    "chain": (
        (tuple(ring("main", 0.14 + 0.18 * step, 0.62 + (0.05 if step % 2 else -0.05), 0.13,
            0.07) for step in range(5)), GREY),
        ((ellipse("main", 0.5, 0.3, 0.2), ellipse("white", 0.5, 0.3, 0.07)), YELLOW),
    ),
    "clay": (
        ((polygon("main", 0.06, 0.95, 0.1, 0.5, 0.3, 0.3, 0.56, 0.22, 0.8, 0.36, 0.94, 0.6, 0.96, 0.95),
            stroke("dark", 0.03, 0.2, 0.6, 0.4, 0.5),
          stroke("dark", 0.03, 0.5, 0.76, 0.8, 0.7)), (168, 96, 82)),
    ),
    "pot": (
        ((polygon("main", 0.3, 0.06, 0.7, 0.06, 0.66, 0.22, 0.92, 0.5, 0.84, 0.84, 0.66, 0.98, 0.34, 0.98, 0.16, 0.84,
            0.08, 0.5, 0.34, 0.22),
          rectangle("dark", 0.28, 0.04, 0.72, 0.12), polygon("light", 0.1, 0.48, 0.9, 0.48, 0.9, 0.6, 0.1, 0.6)),
              (190, 96, 56)),
    ),
    "bowl": (
        ((pie("main", 0.5, 0.4, 0.49, 0.54, 0, 180), ellipse("dark", 0.5, 0.4, 0.49, 0.1), rectangle("dark", 0.34,
            0.9, 0.66, 0.98)), TEAL),
    ),
}  # fmt: skip


TOOLS: dict[str, Drawing] = {
    "tap": (
        ((rectangle("main", 0.62, 0.0, 0.8, 0.9), rectangle("main", 0.2, 0.14, 0.8, 0.32), rectangle("main", 0.2,
            0.14, 0.36, 0.5),
          rectangle("dark", 0.16, 0.44, 0.4, 0.54)), STEEL),
        ((rectangle("main", 0.5, 0.02, 0.92, 0.12),), RED),
    ),
    "peeler": (
        ((ring("main", 0.24, 0.3, 0.24, 0.16, 120, 420), rectangle("white", 0.02, 0.24, 0.46, 0.34)), STEEL),
        ((stroke("main", 0.14, 0.38, 0.46, 0.92, 0.94),), GREEN),
        ((stroke("main", 0.09, 0.2, 0.4, 0.1, 0.56, 0.22, 0.7, 0.08, 0.84, 0.2, 0.98),), TAN),
    ),
    "knife": (
        ((polygon("main", 0.0, 0.62, 0.06, 0.4, 0.66, 0.4, 0.66, 0.66), polygon("white", 0.0, 0.62, 0.66, 0.6, 0.66,
            0.66)), STEEL),
        ((rectangle("main", 0.64, 0.38, 1.0, 0.56),), BLACK),
    ),
    "pan": (
        ((rectangle("main", 0.8, 0.62, 1.0, 0.7),), BROWN),
        ((polygon("main", 0.0, 0.56, 0.84, 0.56, 0.76, 0.86, 0.08, 0.86), ellipse("dark", 0.42, 0.56, 0.42, 0.07)),
            BLACK),
        ((polygon("main", 0.14, 1.0, 0.2, 0.87, 0.28, 0.95, 0.36, 0.86, 0.44, 0.95, 0.52, 0.86, 0.6, 0.95, 0.66, 0.87,
            0.72, 1.0),), ORANGE),
    ),
    "shaker": (
        ((polygon("main", 0.3, 0.34, 0.7, 0.34, 0.78, 0.98, 0.22, 0.98),), WATER),
        ((pie("main", 0.5, 0.34, 0.22, 0.3, 180, 360), ellipse("ink", 0.42, 0.2, 0.03), ellipse("ink", 0.58, 0.2,
            0.03)), GREY),
    ),
    "plate": (
        ((ellipse("light", 0.5, 0.8, 0.5, 0.17), ellipse("white", 0.5, 0.78, 0.34, 0.1)), (190, 200, 240)),
        ((rectangle("main", 0.02, 0.3, 0.06, 0.8), rectangle("main", -0.02, 0.1, 0.1, 0.16),
            rectangle("main", -0.02, 0.1, 0.01, 0.34),
          rectangle("main", 0.07, 0.1, 0.1, 0.34), rectangle("main", -0.02, 0.3, 0.1, 0.36)), GREY),
    ),
    "shovel": (
        ((rectangle("main", 0.45, 0.1, 0.55, 0.6), rectangle("main", 0.3, 0.0, 0.7, 0.1)), BROWN),
        ((polygon("main", 0.26, 0.54, 0.74, 0.54, 0.74, 0.8, 0.5, 1.0, 0.26, 0.8),), GREY),
    ),
    "mound": (((polygon("main", 0.0, 1.0, 0.14, 0.82, 0.5, 0.74, 0.86, 0.82, 1.0, 1.0), ellipse("dark", 0.4, 0.9,
        0.06, 0.03)), (96, 60, 34)),),
    "can": (
        ((stroke("main", 0.08, 0.4, 0.7, 0.12, 0.36), polygon("main", 0.0, 0.36, 0.14, 0.2, 0.24, 0.3, 0.08, 0.46),
          rectangle("main", 0.38, 0.34, 0.86, 0.96), ring("main", 0.8, 0.5, 0.2, 0.13, -90, 90),
              ring("dark", 0.62, 0.34, 0.22, 0.15, 180, 360),
          rectangle("light", 0.38, 0.56, 0.86, 0.68)), PURPLE),
    ),
    "basket": (
        ((polygon("main", 0.0, 0.6, 1.0, 0.6, 0.86, 1.0, 0.14, 1.0), rectangle("light", 0.06, 0.7, 0.94, 0.76),
            rectangle("light", 0.1, 0.84, 0.9, 0.9),
          rectangle("dark", 0.0, 0.56, 1.0, 0.64)), (196, 146, 66)),
    ),
    "rake": (
        ((rectangle("main", 0.46, 0.0, 0.54, 0.72),), TAN),
        ((rectangle("main", 0.08, 0.7, 0.92, 0.8), *(rectangle("main", 0.08 + 0.13 * step, 0.78, 0.14 + 0.13 * step,
            1.0) for step in range(7))), RED),
    ),
    "shears": (
        ((polygon("main", 0.0, 0.14, 0.14, 0.04, 0.6, 0.56, 0.52, 0.64), polygon("light", 0.0, 0.86, 0.14, 0.96, 0.6,
            0.44, 0.52, 0.36)), STEEL),
        ((stroke("main", 0.11, 0.56, 0.54, 0.98, 0.9), stroke("main", 0.11, 0.56, 0.46, 0.98, 0.1)), ORANGE),
    ),
    "ruler": (
        ((rectangle("main", 0.0, 0.6, 1.0, 0.86), *(rectangle("ink", 0.05 + 0.1 * step, 0.6, 0.075 + 0.1 * step,
            0.74) for step in range(10))), YELLOW),
    ),
    "saw": (
        ((polygon("main", 0.0, 0.5, 0.7, 0.36, 0.7, 0.7, 0.63, 0.64, 0.56, 0.74, 0.49, 0.64, 0.42, 0.74, 0.35, 0.64,
            0.28, 0.72, 0.21, 0.62,
                  0.14, 0.7, 0.07, 0.6, 0.0, 0.66),), STEEL),
        ((polygon("main", 0.68, 0.3, 1.0, 0.34, 0.98, 0.74, 0.7, 0.74), polygon("white", 0.78, 0.44, 0.9, 0.46, 0.88,
            0.62, 0.78, 0.62)), ORANGE),
    ),
    "block": (
        ((rectangle("main", 0.1, 0.5, 0.9, 0.82), rectangle("dark", 0.1, 0.82, 0.9, 0.98)), (112, 160, 96)),
        ((rectangle("main", 0.3, 0.34, 0.7, 0.52),), BROWN),
    ),
    "drill": (
        ((rectangle("main", 0.26, 0.14, 0.94, 0.46), polygon("main", 0.6, 0.46, 0.86, 0.46, 0.92, 0.92, 0.68, 0.92),
            rectangle("dark", 0.62, 0.86, 1.0, 1.0)), TEAL),
        ((rectangle("main", 0.14, 0.2, 0.28, 0.4), polygon("main", 0.14, 0.26, 0.14, 0.34, -0.14, 0.3)), GREY),
    ),
    "hammer": (
        ((rectangle("main", 0.44, 0.3, 0.58, 1.0),), TAN),
        ((rectangle("main", 0.14, 0.06, 0.72, 0.34), polygon("main", 0.72, 0.1, 0.98, 0.24, 0.72, 0.3),
            rectangle("dark", 0.06, 0.02, 0.2, 0.38)), BLACK),
    ),
    "glue": (
        ((polygon("main", 0.3, 0.5, 0.44, 0.3, 0.56, 0.3, 0.7, 0.5, 0.7, 1.0, 0.3, 1.0), rectangle("white", 0.3, 0.62,
            0.7, 0.86)), YELLOW),
        ((polygon("main", 0.42, 0.32, 0.58, 0.32, 0.5, 0.02),), RED),
    ),
    "brush": (
        ((stroke("main", 0.13, 0.5, 0.5, 0.96, 0.02),), BROWN),
        ((polygon("main", 0.2, 0.54, 0.42, 0.32, 0.62, 0.52, 0.42, 0.74),), STEEL),
        ((polygon("main", 0.22, 0.54, 0.42, 0.74, 0.14, 0.98, 0.0, 0.96, 0.0, 0.84),), PURPLE),
    ),
    "tub": (
        ((polygon("main", 0.0, 0.5, 1.0, 0.5, 0.88, 1.0, 0.12, 1.0), rectangle("light", 0.0, 0.46, 1.0, 0.56)), TEAL),
        (tuple(ellipse("light", 0.1 + 0.16 * step, 0.44 + (0.04 if step % 2 else -0.02), 0.1) for step in range(6)),
            WATER),
    ),
    "line": (
        ((rectangle("main", -0.2, 0.02, 1.2, 0.06),), BLACK),
        ((rectangle("main", 0.18, 0.0, 0.26, 0.26), rectangle("main", 0.74, 0.0, 0.82, 0.26)), YELLOW),
    ),
    "iron": (
        ((polygon("main", 0.0, 0.86, 0.16, 0.56, 0.4, 0.42, 0.96, 0.42, 1.0, 0.86), rectangle("dark", 0.0, 0.82, 1.0,
            0.94)), RED),
        ((ring("main", 0.64, 0.42, 0.32, 0.2, 180, 360),), BLACK),
    ),
    "hamper": (
        ((rectangle("main", 0.06, 0.56, 0.94, 1.0), *(rectangle("white", 0.14 + 0.2 * step, 0.66, 0.24 + 0.2 * step,
            0.92) for step in range(4)),
          rectangle("dark", 0.0, 0.52, 1.0, 0.62)), PURPLE),
    ),
    "whisk": (
        ((rectangle("main", 0.44, 0.0, 0.56, 0.44),), RED),
        ((ring("main", 0.5, 0.68, 0.28, 0.23), ring("dark", 0.5, 0.68, 0.12, 0.07), ellipse("main", 0.5, 0.44, 0.1,
            0.05)), GREY),
    ),
    "fists": (
        ((ellipse("main", 0.22, 0.7, 0.22, 0.2), ellipse("main", 0.78, 0.7, 0.22, 0.2), stroke("dark", 0.03, 0.14,
            0.86, 0.14, 0.7),
          stroke("dark", 0.03, 0.26, 0.88, 0.26, 0.7), stroke("dark", 0.03, 0.72, 0.88, 0.72, 0.7),
              stroke("dark", 0.03, 0.84, 0.86, 0.84, 0.7)), (236, 190, 160)),
        ((rectangle("light", 0.06, 0.1, 0.38, 0.54), rectangle("light", 0.62, 0.1, 0.94, 0.54)), (220, 220, 226)),
    ),
    "pin": (
        ((rectangle("main", 0.16, 0.4, 0.84, 0.74), rectangle("light", 0.16, 0.44, 0.84, 0.52)), TAN),
        ((rectangle("main", -0.04, 0.5, 0.16, 0.64), rectangle("main", 0.84, 0.5, 1.04, 0.64)), RED),
    ),
    "oven": (
        ((rectangle("main", 0.0, 0.0, 1.0, 1.0), rectangle("dark", 0.0, 0.0, 1.0, 0.14), *(ellipse("white",
            0.2 + 0.2 * step, 0.07, 0.05) for step in range(4))), GREY),
        ((rectangle("main", 0.1, 0.22, 0.9, 0.92), rectangle("light", 0.2, 0.34, 0.8, 0.88)), (232, 84, 24)),
    ),
    "bag": (
        ((polygon("main", 0.1, 0.06, 0.9, 0.06, 0.58, 0.8, 0.42, 0.8), rectangle("light", 0.06, 0.0, 0.94, 0.1)), TEAL),
        ((polygon("main", 0.42, 0.8, 0.58, 0.8, 0.5, 1.0),), YELLOW),
    ),
    "scissors": (
        ((polygon("main", 0.02, 0.02, 0.14, 0.0, 0.58, 0.66, 0.46, 0.7), polygon("light", 0.98, 0.02, 0.86, 0.0, 0.42,
            0.66, 0.54, 0.7)), STEEL),
        ((ring("main", 0.26, 0.82, 0.19, 0.1), ring("main", 0.74, 0.82, 0.19, 0.1)), RED),
    ),
    "glasses": (
        ((ring("main", 0.22, 0.5, 0.23, 0.16), ring("main", 0.78, 0.5, 0.23, 0.16), ring("main", 0.5, 0.5, 0.1, 0.05,
            180, 360),
          stroke("main", 0.06, 0.0, 0.46, -0.08, 0.2), stroke("main", 0.06, 1.0, 0.46, 1.08, 0.2)), NAVY),
        ((ellipse("light", 0.22, 0.5, 0.16), ellipse("light", 0.78, 0.5, 0.16)), WATER),
    ),
    "pen": (
        ((stroke("main", 0.14, 0.2, 0.74, 0.84, 0.1), stroke("dark", 0.15, 0.72, 0.22, 0.9, 0.04)), BLUE),
        ((polygon("main", 0.12, 0.7, 0.24, 0.82, 0.02, 0.94),), BLACK),
        ((stroke("main", 0.05, 0.0, 0.98, 0.12, 0.88, 0.2, 1.0, 0.32, 0.88, 0.42, 1.0, 0.6, 0.92),), BLUE),
    ),
    "cabinet": (
        ((rectangle("main", 0.0, 0.0, 1.0, 1.0), rectangle("light", 0.08, 0.06, 0.92, 0.3), rectangle("light", 0.08,
            0.36, 0.92, 0.6), rectangle("light", 0.08, 0.66, 0.92, 0.94),
          rectangle("ink", 0.38, 0.14, 0.62, 0.2), rectangle("ink", 0.38, 0.44, 0.62, 0.5), rectangle("ink", 0.38,
              0.76, 0.62, 0.82)), (96, 130, 120)),
    ),
    "stamp": (
        ((ellipse("main", 0.5, 0.16, 0.2, 0.16), rectangle("main", 0.4, 0.2, 0.6, 0.64)), BROWN),
        ((rectangle("main", 0.1, 0.62, 0.9, 0.84), rectangle("dark", 0.14, 0.84, 0.86, 0.94)), RED),
    ),
    "tape": (
        ((ring("main", 0.58, 0.42, 0.38, 0.2), stroke("main", 0.14, 0.3, 0.7, 0.0, 0.98)), YELLOW),
        ((ring("main", 0.58, 0.42, 0.2, 0.14),), BROWN),
    ),
    "pile": (
        ((rectangle("main", 0.04, 0.72, 0.96, 1.0), rectangle("light", 0.16, 0.46, 0.84, 0.72),
            rectangle("dark", 0.42, 0.72, 0.54, 1.0),
          rectangle("dark", 0.42, 0.46, 0.54, 0.72)), (206, 120, 60)),
    ),
    "scales": (
        ((rectangle("main", 0.0, 0.56, 1.0, 0.66), polygon("main", 0.24, 0.66, 0.76, 0.66, 0.92, 1.0, 0.08, 1.0)), RED),
        ((ellipse("white", 0.5, 0.83, 0.15), stroke("ink", 0.03, 0.5, 0.84, 0.58, 0.73)), GREY),
    ),
    "pump": (
        ((rectangle("main", 0.46, 0.12, 0.54, 0.5), rectangle("main", 0.2, 0.0, 0.8, 0.12)), BLACK),
        ((rectangle("main", 0.36, 0.42, 0.64, 0.94), rectangle("dark", 0.2, 0.92, 0.8, 1.0)), RED),
        ((stroke("main", 0.06, 0.36, 0.86, 0.1, 0.8, -0.1, 0.98),), BLACK),
    ),
    "oilcan": (
        ((polygon("main", 0.3, 0.98, 0.4, 0.5, 0.8, 0.5, 0.94, 0.98), stroke("main", 0.07, 0.52, 0.5, 0.3, 0.2, 0.02,
            0.34)), YELLOW),
        ((ring("main", 0.88, 0.72, 0.18, 0.11, -90, 90), rectangle("main", 0.36, 0.7, 0.86, 0.8)), GREEN),
    ),
    "wrench": (
        ((stroke("main", 0.15, 0.3, 0.3, 0.86, 0.86), ring("main", 0.22, 0.22, 0.24, 0.1, 270, 540),
            ring("main", 0.88, 0.88, 0.17, 0.07)), GREY),
    ),
    "sponge": (
        ((rectangle("main", 0.04, 0.4, 0.96, 0.9), ellipse("dark", 0.24, 0.56, 0.06), ellipse("dark", 0.54, 0.7,
            0.07), ellipse("dark", 0.8, 0.52, 0.05)), YELLOW),
        ((rectangle("main", 0.04, 0.76, 0.96, 0.94),), GREEN),
    ),
    "wheel": (
        ((ellipse("main", 0.5, 0.76, 0.5, 0.12), rectangle("dark", 0.42, 0.84, 0.58, 1.0), ring("light", 0.5, 0.74,
            0.3, 0.27, 20, 160)), GREY),
    ),
    "kiln": (
        ((rectangle("main", 0.0, 0.3, 1.0, 1.0), pie("main", 0.5, 0.32, 0.5, 0.32, 180, 360),
            *(rectangle("dark", 0.0, 0.4 + 0.2 * step, 1.0, 0.42 + 0.2 * step) for step in range(3))),
         (156, 74, 60)),
        ((rectangle("main", 0.16, 0.4, 0.84, 1.0), pie("main", 0.5, 0.42, 0.34, 0.28, 180, 360)), (250, 160, 30)),
    ),
    "ladle": (
        ((stroke("main", 0.08, 0.36, 0.6, 0.94, 0.02),), BLACK),
        ((pie("main", 0.26, 0.56, 0.28, 0.3, 0, 180), ellipse("light", 0.26, 0.56, 0.28, 0.07)), BLUE),
    ),
    "chisel": (
        ((stroke("main", 0.1, 0.04, 0.96, 0.5, 0.5), polygon("white", 0.0, 1.0, 0.02, 0.88, 0.12, 0.98)), STEEL),
        ((stroke("main", 0.2, 0.48, 0.52, 0.92, 0.08),), ORANGE),
    ),
    "hook": (
        ((rectangle("main", 0.46, -0.3, 0.54, 0.3), ring("main", 0.4, 0.36, 0.16, 0.09, -90, 180)), STEEL),
    ),
}  # fmt: skip
