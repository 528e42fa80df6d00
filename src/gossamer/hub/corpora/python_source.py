"""Python functions with their docstrings as plain text, from installed distributions and the standard library.

Rows: ``text`` (dedented source, 120 to 2,000 characters), ``source`` (package.module:qualname), ``package``. A
function that is mostly made of token sequences seen before is dropped, held-out splits first.
"""

from __future__ import annotations

from typing import Any

from gossamer.hub.corpora import _reading
from gossamer.hub.corpora._reading import LICENCE, LIGHT, STANDARD_LIBRARY, Function, SeenShingles

__all__ = ["LICENCE", "build", "sources"]

_DISTRIBUTIONS = (STANDARD_LIBRARY, *LIGHT)


def sources() -> tuple[str, ...]:
    """What is read, as name==version."""
    return _reading.versions(_DISTRIBUTIONS)


def build() -> dict[str, list[dict[str, Any]]]:
    """Read, drop repeats, split by package."""
    found: dict[str, list[Function]] = {"test": [], "validation": [], "train": []}
    for module in _reading.modules(_DISTRIBUTIONS):
        found[_reading.split_of(module.package)].extend(_reading.functions(module))
    seen = SeenShingles(share=0.6)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, items in found.items():
        splits[split] = [
            {"text": item.source + "\n", "source": item.where, "package": item.package}
            for item in items
            if 120 <= len(item.source) <= 2000 and item.source.isascii() and not seen.repeats(item.source)
        ]
    return splits
