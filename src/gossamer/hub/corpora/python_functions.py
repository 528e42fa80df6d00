"""Say what a Python function does, in one line: functions of installed distributions with their docstrings' summary.

Rows: ``prompt`` (the source without its docstring, then a comment that asks for the line, and ``#``), ``completion``
(a space, the summary, a newline), ``source`` (package.module:qualname), ``package``. The prompt is a Python file that
a base model can simply go on with. Summaries that the source itself contains, that only repeat the name, and exact or
near duplicates of summaries and of bodies are dropped, across splits too; no package has more than 500 rows in train
or 250 in a held-out split.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from gossamer.hub.corpora import _reading
from gossamer.hub.corpora._reading import LICENCE, LIGHT, STANDARD_LIBRARY, Function

__all__ = ["LICENCE", "build", "sources", "summary"]

_DISTRIBUTIONS = (STANDARD_LIBRARY, *LIGHT)
_QUESTION = "\n\n# In one line, what this function does:\n#"
_LONGEST = 700
_PER_PACKAGE = {"train": 500, "validation": 250, "test": 250}
_SMALLEST_BODY = 14  # syntax nodes: below it a body is a constant, an attribute or one plain call
_UNUSABLE = re.compile(
    r">>>|\.\. |::|https?:|^(see|deprecated|todo|fixme|xxx|note|undocumented|internal|alias|same as|like|inherited"
    r"|override[sn]?|overridden|implements?|wrapper|helper|test|private|used (by|in|for)|call(ed|back)\b)\b"
    r"|\b(refer to|see also|for (more )?(details|documentation)|docstring)\b",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)\s*(<[^`]*>)?`")
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|cf|vs|resp|approx|al|Eq|Fig|No)\.$")


def sources() -> tuple[str, ...]:
    """What is read, as name==version."""
    return _reading.versions(_DISTRIBUTIONS)


def build() -> dict[str, list[dict[str, Any]]]:
    """Read, keep the usable, drop duplicates (held-out splits are kept first), cap each package."""
    candidates = [
        (function, line)
        for module in _reading.modules(_DISTRIBUTIONS)
        for function in _reading.functions(module)
        if (line := summary(function)) is not None
    ]
    # a fixed random order within a split: which of two duplicates stays must not favour the alphabet
    order = {"test": 0, "validation": 1, "train": 2}
    candidates.sort(key=lambda item: (order[_reading.split_of(item[0].package)], _digest(item[0].where)))
    candidates = list(_distinct(candidates))
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in order}
    count: dict[str, int] = defaultdict(int)
    for function, line in candidates:
        split = _reading.split_of(function.package)
        count[function.package] += 1
        if count[function.package] <= _PER_PACKAGE[split]:
            row = {"prompt": function.bare + _QUESTION, "completion": f" {line}\n"}
            splits[split].append(row | {"source": function.where, "package": function.package})
    return splits


def summary(function: Function) -> str | None:
    """The first sentence of the docstring where it describes the function in 3 to 25 words, else None."""
    if function.size < _SMALLEST_BODY or not 60 <= len(function.bare) <= _LONGEST or not function.bare.isascii():
        return None
    paragraph = " ".join(re.split(r"\n\s*\n", function.docstring.strip(), maxsplit=1)[0].split())
    if _UNUSABLE.search(paragraph):
        return None
    line = _first_sentence(_ROLE.sub(r"\1", paragraph).replace("``", "`")).strip()
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", line)
    if not 3 <= len(words) <= 25 or not 3 <= len(line.split()) <= 25 or not line.isascii():
        return None
    letters = sum(character.isalpha() or character == " " for character in line)
    if letters < 0.8 * len(line) or not line[0].isupper() or re.search(r"[:,;(\\]$|[:=]\s|->|@", line):
        return None
    name = set(_reading.normalised(re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", function.where.split(":")[1])).split())
    said = set(_reading.normalised(line).split())
    if len(said - name - {"the", "a", "an", "of", "this", "for", "method", "function", "to"}) < 2:
        return None
    if _reading.normalised(line) in _reading.normalised(function.bare):
        return None
    return line


def _distinct(candidates: list[tuple[Function, str]]) -> Iterator[tuple[Function, str]]:
    """Those whose summary and body are no near duplicate of an earlier one's."""
    lines = [frozenset(_reading.normalised(line).split()) for _, line in candidates]
    bodies = [_shingles(function.bare) for function, _ in candidates]
    dropped = _reading.near_duplicates(lines, 0.75) | _reading.near_duplicates(bodies, 0.7)
    for number, candidate in enumerate(candidates):
        if number not in dropped:
            yield candidate


def _shingles(source: str) -> frozenset[str]:
    """Three-token sequences of a body, its name left out."""
    tokens = re.findall(r"\w+|[^\w\s]", source.partition("(")[2])
    return frozenset(" ".join(tokens[start : start + 3]) for start in range(max(1, len(tokens) - 2)))


def _first_sentence(text: str) -> str:
    for match in re.finditer(r"\.(?=\s+[A-Z`'\"(])|\.$", text):
        sentence = text[: match.end()]
        if not _ABBREVIATIONS.search(sentence):
            return sentence
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
