"""Real facts for closed-book questions: capitals, opposites, elements, and what Python's standard library knows.

The tables are common knowledge; calendar, HTTP phrases and file types are read from the standard library.
"""

from __future__ import annotations

import calendar
import http
import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass

_CAPITALS = (
    "Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing, Colombia Bogota, "
    "Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Egypt Cairo, Finland Helsinki, France Paris, Germany Berlin, "
    "Greece Athens, Hungary Budapest, Iceland Reykjavik, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, "
    "Italy Rome, Japan Tokyo, Kenya Nairobi, Lebanon Beirut, Nepal Kathmandu, Netherlands Amsterdam, Norway Oslo, "
    "Peru Lima, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Russia Moscow, Serbia Belgrade, Spain Madrid, "
    "Sweden Stockholm, Syria Damascus, Thailand Bangkok, Turkey Ankara, Ukraine Kyiv, Uruguay Montevideo"
)
_OPPOSITES = (
    "hot cold, big small, up down, left right, open closed, early late, wet dry, hard soft, light dark, rich poor, "
    "young old, fast slow, high low, loud quiet, full empty, strong weak, near far, true false, first last, good bad, "
    "black white, long short, thick thin, day night, buy sell, win lose, push pull, alive dead, inside outside"
)
_ELEMENTS = (
    "H hydrogen, He helium, Li lithium, C carbon, N nitrogen, O oxygen, Ne neon, Na sodium, Mg magnesium, "
    "Al aluminium, Si silicon, S sulphur, Cl chlorine, K potassium, Ca calcium, Fe iron, Ni nickel, Cu copper, "
    "Zn zinc, Ag silver, Sn tin, I iodine, Pt platinum, Au gold, Hg mercury, Pb lead, U uranium"
)
_SPELLINGS = {"aluminium": "aluminum", "sulphur": "sulfur", "Kyiv": "Kiev"}
_PHRASES = (200, 301, 400, 401, 403, 404, 408, 410, 500, 502, 503)
_ENDINGS = (".html", ".txt", ".png", ".jpg", ".gif", ".pdf", ".csv", ".json", ".css", ".mp4", ".wav", ".zip")


@dataclass(frozen=True)
class Fact:
    """``answers``: accepted ones, the usual one first. ``statement`` says it; ``kind`` has what else might be said."""

    kind: str
    question: str
    statement: str
    answers: tuple[str, ...]


def facts() -> list[Fact]:
    """All facts, in a fixed order."""
    return list(_facts())


def _facts() -> Iterator[Fact]:
    for country, city in _pairs(_CAPITALS):
        yield _fact("capital", f"What is the capital of {country}?", f"The capital of {country} is {city}.", city)
    for word, other in _pairs(_OPPOSITES):
        yield _fact("opposite", f'What is the opposite of "{word}"?', f'The opposite of "{word}" is "{other}".', other)
    for symbol, name in _pairs(_ELEMENTS):
        told = f"The chemical symbol {symbol} stands for {name}."
        yield _fact("element", f"Which chemical element has the symbol {symbol}?", told, name)
    months, days = list(calendar.month_name)[1:], list(calendar.day_name)
    for kind, names in (("month", months), ("day", days)):
        for name, after in zip(names, [*names[1:], names[0]], strict=True):
            yield _fact(kind, f"Which {kind} comes after {name}?", f"The {kind} after {name} is {after}.", after)
    for number in _PHRASES:
        phrase = http.HTTPStatus(number).phrase
        yield _fact("status", f"What does the HTTP status {number} mean?", f"HTTP status {number} is {phrase}.", phrase)
    for ending in _ENDINGS:
        found = mimetypes.types_map[ending]
        told = f"Files that end in {ending} have the MIME type {found}."
        yield _fact("type", f"What is the MIME type of files that end in {ending}?", told, found)


def _fact(kind: str, question: str, statement: str, answer: str) -> Fact:
    other = _SPELLINGS.get(answer)
    return Fact(kind, question, statement, (answer, other) if other else (answer,))


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(pair.split()[0], pair.split()[1]) for pair in text.split(", ")]
