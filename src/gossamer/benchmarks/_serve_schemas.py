"""Fifty JSON schemas such as applications ask for, every one bounded, so that an answer ends.

Strings, lists and numbers have bounds: a small model that is free to may write one string until its tokens are used up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

Schema = dict[str, Any]


def text(most: int = 16, least: int = 0) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def shaped(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^{pattern}$"}


def several(item: Schema, most: int = 3, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def record(optional: Sequence[str] = (), **properties: Schema) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def among(*values: Any) -> Schema:
    return {"enum": list(values)}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


YES = {"type": "boolean"}
DATE = {"type": "string", "format": "date"}
CODE = shaped("[A-Z]{2}-[0-9]{3}")
PLACE = record(name=text(), country=shaped("[A-Z]{2}"))
TREE: Schema = {
    "$defs": {
        "leaf": record(value=whole(0, 9)),
        "branch": record(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
    },
    "$ref": "#/$defs/branch",
}
# in each line one shape, filled with different things
_SHAPES: list[tuple[Callable[..., Schema], Sequence[Sequence[Any]]]] = [
    (
        lambda *parts: record(name=parts[0], size=parts[1]),
        [
            (text(), whole(0, 9)),
            (text(20, 1), whole(-50, 50)),
            (among("cup", "bowl", "jug"), whole(1, 12)),
            (CODE, whole(1000, 9999)),
            (text(8, 3), among(1, 2.5, 4)),
        ],
    ),
    (
        lambda *parts: record(title=parts[0], tags=several(parts[1])),
        [
            (text(), text(8)),
            (text(12, 2), among("new", "old", "rare")),
            (text(), CODE),
            (text(6), whole(0, 3)),
            (text(), YES),
        ],
    ),
    (
        lambda *parts: record(("note",), when=parts[0], done=YES, note=parts[1]),
        [
            (DATE, text()),
            (shaped("[0-9]{2}:[0-5][0-9]"), maybe(text(10))),
            (DATE, among("a", "b")),
            ({"type": "string", "format": "time"}, text(12)),
            (whole(1900, 2100), text()),
        ],
    ),
    (
        lambda *parts: record(at=parts[0], people=several(record(name=text(10), age=parts[1]), 2, 1)),
        [
            (PLACE, whole(0, 120)),
            (text(), whole(18, 99)),
            (maybe(PLACE), whole(0, 9)),
            (CODE, maybe(whole(0, 120))),
            (among("here", "there"), among("young", "old")),
        ],
    ),
    (
        lambda *parts: record(kind={"const": parts[0]}, value=parts[1]),
        [
            ("number", whole(0, 999)),
            ("text", text()),
            ("flag", YES),
            ("list", several(whole(0, 9), 4)),
            ("none", {"type": "null"}),
        ],
    ),
    (
        lambda *parts: several(parts[0], parts[1], parts[2]),
        [
            (whole(0, 99), 5, 1),
            (text(8), 3, 3),
            (YES, 4, 0),
            (record(x=whole(0, 9), y=whole(0, 9)), 3, 1),
            (CODE, 2, 2),
        ],
    ),
    (
        lambda *parts: {"anyOf": list(parts)},
        [
            (record(ok=YES), record(error=text())),
            (whole(0, 5), text(5)),
            (several(YES, 2), {"type": "null"}),
            (record(a=whole(0, 1)), record(b=whole(0, 1)), record(c=whole(0, 1))),
            (CODE, DATE),
        ],
    ),
    (
        lambda *parts: record(outer=record(inner=record(core=parts[0])), rest=parts[1]),
        [
            (text(), YES),
            (whole(0, 9), several(text(4), 2)),
            (CODE, maybe(text(4))),
            (among("x", "y"), whole(0, 9)),
            (several(several(whole(0, 1), 2), 2), YES),
        ],
    ),
    (
        lambda *parts: {
            "type": "object",
            "additionalProperties": parts[0],
            "properties": {"id": parts[1]},
            "required": ["id"],
            "maxProperties": 1,
        },
        [(text(4), whole(0, 9)), (YES, CODE), (whole(0, 9), text(6)), (text(2), DATE), (YES, YES)],
    ),
    (
        lambda *parts: parts[0],
        [
            (TREE,),
            (record(ip={"type": "string", "format": "ipv4"}, port=whole(1, 65535)),),
            (record(id={"type": "string", "format": "uuid"}),),
            (record(price=shaped("[0-9]{1,4}\\.[0-9]{2}"), currency=among("EUR", "USD", "JPY")),),
            ({"type": "array", "prefixItems": [text(6), whole(0, 9), YES], "items": False, "minItems": 3},),
        ],
    ),
]

SCHEMAS: list[Schema] = [shape(*parts) for shape, fillings in _SHAPES for parts in fillings]
_THINGS = ("a teapot", "the harbour", "a blue bird", "my calendar", "an old bridge")
_WAYS = (
    "Describe {} as JSON.",
    "JSON about {}:",
    "Fill in the form for {}.",
    "What do you know of {}? Answer in JSON.",
)
PROMPTS = [way.format(thing) for thing, way in itertools.product(_THINGS, _WAYS)]
