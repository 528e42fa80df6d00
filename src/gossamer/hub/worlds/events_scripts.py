"""What happens in the event videos, in words: verbs, places and the order of events in each place.

A place is a ring of events. From event i the next is i + 1 with probability ``MAIN``, else i + 2 or i + 3: what comes
next or came before follows from the event on show, and is not to be seen in it. The manner of an event (its postfix)
stays with probability ``KEEP``, else it is drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gossamer.hub.worlds.backdrops import Layer
from gossamer.hub.worlds.shapes import Part, arc, polygon, rectangle

MAIN, KEEP = 0.86, 0.85
POSTFIXES = (
    "", "with the left hand", "with the right hand", "by the window", "on the table", "with a cloth", "under the lamp",
)  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """``tool`` is drawn ``at`` a place by the object; ``motion`` moves one of them; ``detail`` is for long wording."""

    tool: str
    at: str
    motion: str
    effect: str
    detail: str


@dataclass(frozen=True)
class Place:
    """A scene: its backdrop, its ring of events (verb, object), and what of it training never shows.

    Of a place that is held out by "pairs", verbs and objects occur elsewhere, but no two of them together; of one held
    out by "words" they occur nowhere. Neither place is seen itself.
    """

    layers: tuple[Layer, ...]
    events: tuple[tuple[str, str], ...]
    held_out: Literal["", "pairs", "words"] = ""


VERBS: dict[str, Verb] = {
    "wash": Verb("tap", "above", "still", "drops", "under plenty of cold running water from the tap"),
    "peel": Verb("peeler", "on", "slide", "none", "from top to bottom with a small sharp peeler"),
    "cut": Verb("knife", "on", "chop", "none", "into thin even slices with a long steel knife"),
    "fry": Verb("pan", "under", "shake", "steam", "in a hot black pan over the open flame"),
    "salt": Verb("shaker", "above", "swing", "grains", "with a few good shakes from the glass shaker"),
    "serve": Verb("plate", "under", "lift", "none", "on a clean white plate beside a silver fork"),
    "dig": Verb("shovel", "on", "press", "clods", "over and over with a long heavy iron shovel"),
    "plant": Verb("mound", "front", "sink", "none", "in a little mound of dark and crumbly earth"),
    "water": Verb("can", "above", "swing", "drops", "all around with the big purple watering can"),
    "pick": Verb("basket", "front", "lift", "none", "and lay it down in the flat wicker basket"),
    "rake": Verb("rake", "on", "slide", "clods", "smooth and level with a wide red garden rake"),
    "trim": Verb("shears", "on", "swing", "leaves", "back into shape with the orange garden shears"),
    "measure": Verb("ruler", "on", "creep", "none", "from one end to the other with a yellow ruler"),
    "saw": Verb("saw", "on", "slide", "dust", "right through the middle with a long toothed saw"),
    "sand": Verb("block", "on", "slide", "dust", "until it is smooth with a rough sanding block"),
    "drill": Verb("drill", "right", "shake", "sparks", "in three places with the heavy electric power drill"),
    "hammer": Verb("hammer", "above", "swing", "sparks", "firmly together with a few blows of the hammer"),
    "glue": Verb("glue", "above", "tilt", "none", "along all its edges from the yellow glue bottle"),
    "paint": Verb("brush", "on", "slide", "paint", "in bright purple with a broad and soft brush"),
    "soak": Verb("tub", "front", "sink", "bubbles", "for a while in a tub of warm soapy water"),
    "hang": Verb("line", "top", "lift", "none", "up to dry on the line with two yellow pegs"),
    "iron": Verb("iron", "on", "slide", "steam", "flat and free of creases with the hot iron"),
    "fold": Verb("hamper", "front", "halve", "none", "neatly in half and put it on the purple hamper"),
    "mix": Verb("whisk", "on", "circle", "none", "quickly round and round with a big wire whisk"),
    "knead": Verb("fists", "on", "squash", "none", "again and again with both fists and much force"),
    "roll": Verb("pin", "on", "slide", "grains", "out to an even sheet with a wooden rolling pin"),
    "bake": Verb("oven", "behind", "still", "steam", "for half an hour in the very hot grey oven"),
    "decorate": Verb("bag", "above", "circle", "dots", "with little coloured dots of cream from the bag"),
    "open": Verb("scissors", "above", "press", "none", "carefully along the upper edge with the red scissors"),
    "read": Verb("glasses", "above", "circle", "none", "slowly and twice with the round blue reading glasses"),
    "sign": Verb("pen", "on", "circle", "none", "at the bottom in blue ink with the good pen"),
    "file": Verb("cabinet", "behind", "sink", "none", "under its proper name in the big green cabinet"),
    "tape": Verb("tape", "on", "creep", "none", "shut on every side with a roll of yellow tape"),
    "stamp": Verb("stamp", "above", "press", "paint", "in the right corner with the big red rubber stamp"),
    "weigh": Verb("scales", "front", "press", "none", "to the last gram on the red counter scales"),
    "stack": Verb("pile", "front", "lift", "none", "high up on the pile of the other brown boxes"),
    "pump": Verb("pump", "right", "press", "none", "up until it is hard with the red foot pump"),
    "oil": Verb("oilcan", "above", "tilt", "drips", "drop by drop from the yellow can of machine oil"),
    "tighten": Verb("wrench", "on", "swing", "none", "as far as it will go with a long wrench"),
    "scrub": Verb("sponge", "on", "circle", "bubbles", "clean of dust and mud with a yellow kitchen sponge"),
    "lift": Verb("hook", "top", "lift", "none", "high above the floor with the big steel hook"),
    "shape": Verb("wheel", "under", "spin", "none", "on the fast turning wheel with two wet hands"),
    "glaze": Verb("ladle", "above", "tilt", "drops", "from the inside out with a ladle of blue glaze"),
    "carve": Verb("chisel", "on", "chop", "dust", "with a pattern of fine lines by the small chisel"),
    "fire": Verb("kiln", "behind", "still", "steam", "for a whole day in the roaring red brick kiln"),
}  # fmt: skip

LOOKS = {
    "potato": "large brown", "fish": "fresh silver", "flower": "tall pink", "tree": "young green",
    "soil": "dry dark", "plank": "long wooden", "chair": "old wooden", "shirt": "striped blue", "sock": "long orange",
    "dough": "soft white", "bread": "crusty brown", "cake": "round pink", "letter": "sealed white",
        "parcel": "heavy brown",
    "tyre": "worn black", "bicycle": "old green", "chain": "rusty bicycle", "clay": "wet red", "pot": "round clay",
    "bowl": "small blue",
}  # fmt: skip


def _tint(red: int, green: int, blue: int, part: Part) -> Layer:
    return (red, green, blue), part[1]


def _box(red: int, green: int, blue: int, *sides: float) -> Layer:
    return _tint(red, green, blue, rectangle("", *sides))


def _disc(red: int, green: int, blue: int, x: float, y: float, radius: float) -> Layer:
    return (red, green, blue), arc(x, y, radius, radius)


PLACES: dict[str, Place] = {
    "kitchen": Place(
        layers=(
            _box(238, 230, 196, 0, 0, 1, 1), *(_box(222, 212, 172, 0, step / 8, 1,
                step / 8 + 0.012) for step in range(6)),
            *(_box(222, 212, 172, step / 8, 0, step / 8 + 0.012, 0.7) for step in range(9)),
            _box(170, 80, 60, 0.62, 0, 1, 0.16), _box(196, 104, 80, 0.64, 0.02, 0.8, 0.14), _box(196, 104, 80, 0.82,
                0.02, 0.98, 0.14),
            _box(150, 150, 156, 0, 0.72, 1, 0.78), _box(200, 190, 180, 0, 0.78, 1, 1), _box(180, 168, 156, 0.48, 0.78,
                0.5, 1),
        ),
        events=(
            ("wash", "potato"), ("peel", "potato"), ("cut", "potato"), ("fry", "potato"),
            ("wash", "fish"), ("salt", "fish"), ("fry", "fish"), ("serve", "fish"),
        ),
    ),
    "garden": Place(
        layers=(
            _box(168, 214, 248, 0, 0, 1, 1), _disc(255, 255, 255, 0.7, 0.14, 0.08), _disc(255, 255, 255, 0.8, 0.12,
                0.1), _disc(255, 255, 255, 0.9, 0.15, 0.07),
            _box(120, 176, 88, 0, 0.5, 1, 1), *(_tint(88, 148, 70, polygon("", step / 7, 0.52, step / 7 + 0.07, 0.36,
                step / 7 + 0.14, 0.52)) for step in range(7)),
            _box(98, 156, 70, 0, 0.8, 1, 0.84), _box(98, 156, 70, 0, 0.94, 1, 0.97),
        ),
        events=(
            ("dig", "soil"), ("rake", "soil"), ("plant", "flower"), ("water", "flower"),
            ("pick", "flower"), ("plant", "tree"), ("water", "tree"), ("trim", "tree"),
        ),
    ),
    "workshop": Place(
        layers=(
            _box(96, 104, 120, 0, 0, 1, 1), *(_disc(70, 78, 94, 0.05 + 0.1 * (step % 10), 0.06 + 0.1 * (step // 10),
                0.014) for step in range(60)),
            _box(230, 190, 70, 0.8, 0.04, 0.84, 0.3), _box(200, 80, 60, 0.9, 0.04, 0.94, 0.34),
                _box(60, 64, 74, 0, 0.68, 1, 1),
            *(_tint(226, 190, 60, polygon("", step / 5, 1, step / 5 + 0.1, 0.9, step / 5 + 0.2, 0.9, step / 5 + 0.1,
                1)) for step in range(5)),
        ),
        events=(
            ("measure", "plank"), ("saw", "plank"), ("sand", "plank"), ("drill", "plank"),
            ("glue", "chair"), ("hammer", "chair"), ("sand", "chair"), ("paint", "chair"),
        ),
    ),
    "laundry": Place(
        layers=(
            _box(206, 232, 240, 0, 0, 1, 1), *(_box(188, 220, 232, step / 6, 0, step / 6 + 0.06,
                0.72) for step in range(6)),
            _box(250, 250, 252, 0.7, 0.34, 1, 0.78), _disc(150, 160, 170, 0.85, 0.58, 0.13),
                _disc(70, 110, 160, 0.85, 0.58, 0.1), _box(150, 160, 170, 0.72, 0.37, 0.98, 0.41),
            _box(130, 160, 180, 0, 0.76, 1, 1), *(_box(150, 180, 198, step / 4, 0.76, step / 4 + 0.12,
                0.88) for step in range(4)),
            *(_box(150, 180, 198, step / 4 + 0.12, 0.88, step / 4 + 0.25, 1) for step in range(4)),
        ),
        events=(
            ("soak", "shirt"), ("wash", "shirt"), ("hang", "shirt"), ("iron", "shirt"),
            ("fold", "shirt"), ("soak", "sock"), ("hang", "sock"), ("fold", "sock"),
        ),
    ),
    "bakery": Place(
        layers=(
            _box(250, 214, 190, 0, 0, 1, 1), *(_box(176, 110, 70, 0, 0.2 + 0.2 * step, 1,
                0.24 + 0.2 * step) for step in range(2)),
            *(_disc(206, 150, 84, 0.08 + 0.14 * step, 0.16, 0.055) for step in range(7)), *(_disc(226, 176, 110,
                0.12 + 0.15 * step, 0.36, 0.05) for step in range(6)),
            _box(232, 176, 150, 0, 0.72, 1, 1), *(_box(214, 150, 124, step / 5, 0.72, step / 5 + 0.02,
                1) for step in range(6)),
        ),
        events=(
            ("mix", "dough"), ("knead", "dough"), ("roll", "dough"), ("bake", "bread"),
            ("cut", "bread"), ("bake", "cake"), ("decorate", "cake"), ("serve", "cake"),
        ),
    ),
    "office": Place(
        layers=(
            _box(214, 220, 204, 0, 0, 1, 1), _box(120, 84, 60, 0.56, 0, 1, 0.4),
            *(_box(60 + 60 * (step % 3), 70 + 40 * (step % 4), 160 - 30 * (step % 5), 0.58 + 0.05 * (step % 8),
                0.03 + 0.19 * (step // 8), 0.62 + 0.05 * (step % 8), 0.18 + 0.19 * (step // 8)) for step in range(16)),
            _box(140, 120, 150, 0, 0.74, 1, 1), _box(170, 150, 178, 0, 0.74, 1, 0.77),
        ),
        events=(
            ("open", "letter"), ("read", "letter"), ("sign", "letter"), ("file", "letter"),
            ("weigh", "parcel"), ("tape", "parcel"), ("stamp", "parcel"), ("stack", "parcel"),
        ),
    ),
    "garage": Place(
        held_out="pairs",
        layers=(
            _box(226, 120, 84, 0, 0, 1, 1), *(_box(200, 98, 66, 0, 0.09 * step, 1,
                0.09 * step + 0.012) for step in range(8)),
            *(_box(200, 98, 66, step / 6 + 0.08 * (row % 2), 0.09 * row, step / 6 + 0.08 * (row % 2) + 0.012,
                0.09 * row + 0.09) for row in range(8) for step in range(6)),
            _box(110, 112, 110, 0, 0.72, 1, 1), _tint(80, 82, 80, polygon("", 0.3, 0.9, 0.5, 0.84, 0.7, 0.9, 0.56,
                0.96)),
        ),
        events=(
            ("lift", "bicycle"), ("scrub", "bicycle"), ("tighten", "bicycle"), ("oil", "chain"),
            ("scrub", "tyre"), ("pump", "tyre"), ("tighten", "chain"), ("lift", "tyre"),
        ),
    ),
    "pottery": Place(
        held_out="words",
        layers=(
            _box(60, 52, 84, 0, 0, 1, 1), _box(92, 80, 120, 0, 0.22, 1, 0.26), _box(92, 80, 120, 0, 0.46, 1, 0.5),
            *(_disc(180, 120, 90, 0.1 + 0.2 * step, 0.16, 0.06) for step in range(5)), *(_disc(90, 150, 150,
                0.06 + 0.22 * step, 0.4, 0.06) for step in range(5)),
            _box(130, 100, 110, 0, 0.74, 1, 1), _box(108, 80, 92, 0, 0.86, 1, 0.88),
        ),
        events=(
            ("shape", "clay"), ("carve", "pot"), ("glaze", "pot"), ("fire", "pot"),
            ("shape", "bowl"), ("carve", "bowl"), ("glaze", "bowl"), ("fire", "bowl"),
        ),
    ),
}  # fmt: skip
