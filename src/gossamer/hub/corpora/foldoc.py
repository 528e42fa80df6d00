"""The Free On-line Dictionary of Computing, from the Debian package dict-foldoc: terms, definitions, tags, links.

Rows: ``term``, ``text`` (the definition without its subject tag, on one line a paragraph), ``tags`` (subjects),
``links`` (terms it refers to, as written). The dictd format is an index of ``word TAB offset TAB length`` with
numbers in base 64, and a gzip file. Split by a hash of the term that a redirect ends at, so that a term and what
redirects to it stay together.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.paths import sha256

FOLDER = Path("/usr/share/dictd")
LICENCE = "GFDL-1.1-or-later"

_DIGITS = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def sources() -> tuple[str, ...]:
    """The hash of the dictionary file; InputError where it is not installed."""
    return (f"dict-foldoc==sha256:{sha256(_files()[1])[:16]}",)


def build() -> dict[str, list[dict[str, Any]]]:
    """Read all entries and split them."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    rows = read_entries(*_files())
    redirects = {_key(row["term"]): _key(row["links"][0]) for row in rows if _redirects(row)}
    for row in rows:
        end = _key(row["term"])
        visited = {end}
        while end in redirects and redirects[end] not in visited:
            end = redirects[end]
            visited.add(end)
        share = int(hashlib.sha256(end.encode()).hexdigest()[:8], 16) / 2**32
        splits["test" if share < 0.1 else "validation" if share < 0.2 else "train"].append(row)
    return splits


def read_entries(index: Path, dictionary: Path) -> list[dict[str, Any]]:
    """Every entry once, in the order of the file. Index lines ``00-database-...`` describe the file, no entry."""
    data = gzip.decompress(dictionary.read_bytes())
    places = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):
            places[_number(offset)] = _number(length)
    return [_entry(data[start : start + size].decode("utf-8", "replace")) for start, size in sorted(places.items())]


def _entry(raw: str) -> dict[str, Any]:
    term, _, rest = raw.partition("\n")
    head = re.match(r"\s*(?:\d+\.\s*)?<([^<>]+)>", rest)
    tags: list[str] = []
    if head:
        tags = [tag.strip() for tag in head.group(1).split(",") if tag.strip()]
        rest = rest[head.end() :]
    links = [" ".join(link.split()) for link in re.findall(r"\{([^{}]+)\}", rest)]
    paragraphs = (" ".join(part.replace("{", "").replace("}", "").split()) for part in re.split(r"\n\s*\n", rest))
    return {"term": term.strip(), "text": "\n".join(filter(None, paragraphs)), "tags": tags, "links": links}


def _redirects(row: dict[str, Any]) -> bool:
    return len(row["links"]) == 1 and _key(row["text"]) == _key(row["links"][0])


def _key(term: str) -> str:
    return " ".join(term.lower().split()).rstrip(".")


def _number(text: str) -> int:
    value = 0
    for character in text:
        value = value * 64 + _DIGITS[character]
    return value


def _files() -> tuple[Path, Path]:
    files = FOLDER / "foldoc.index", FOLDER / "foldoc.dict.dz"
    for path in files:
        if not path.exists():
            raise InputError("corpus foldoc", must=f"find {path}", got="nothing", do="apt-get install dict-foldoc")
    return files
