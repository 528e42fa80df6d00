"""Captioned cut-outs, photographs among them: the stamps of the drawing program Tux Paint.

Rows: ``image`` (PNG file in base 64; ``gossamer.hub.archives.picture`` opens it; transparent around the thing),
``caption`` (English, a few words), ``captions`` ([caption]), ``category`` (top folder), ``subcategory`` (folder),
``style`` ("photo" or "drawing"), ``key`` (path). Letters and signs (folder symbols) are left out.

From the Debian package tuxpaint-stamps-default: installed, or its archive as ``gossamer.hub.archives`` says (161 MB,
most of it sounds). The package does not say what is a photograph; here it is a PNG that is in no folder ``cartoon``
and has many colours for its size: colours at 5 bits a channel over the square root of the opaque pixels, at 128
pixels, above 4. Split by caption without articles, case and punctuation.

``python -m gossamer.hub.corpora.stamp_photos`` builds it, in about half a minute from the archive.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path, PurePosixPath
from typing import Any

from gossamer.core.errors import InputError
from gossamer.hub.archives import as_text, find_source, package_hash, read_package

INSTALLED = Path("/usr/share/tuxpaint/stamps")
LICENCE = "GPL-2 as a whole; single pictures public domain, GFDL, CC-BY-SA or CC-BY as the package's changelog says"

_FOLDER = "usr/share/tuxpaint/stamps/"
_PHOTO = 4.0


def sources() -> tuple[str, ...]:
    """The package with its hash; InputError where it is not at hand."""
    return (f"tuxpaint-stamps-default=={_package().name} sha256:{package_hash(_package())}",)


def build() -> dict[str, list[dict[str, Any]]]:
    """Read all pictures with a caption and split them."""
    # names begin at the stamps' folder when installed, at the root of the file system in an archive
    files = {
        name.removeprefix(_FOLDER): data
        for name, data in read_package(
            _package(), lambda name: name.endswith((".png", ".txt")) and not name.startswith("usr/share/doc")
        ).items()
    }
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for name, image in sorted(files.items()):
        path = PurePosixPath(name)
        text = files.get(str(path.with_suffix(".txt")))
        if path.suffix != ".png" or text is None or path.parts[0] == "symbols":
            continue
        caption = text.decode("utf-8").split("\n")[0].strip()
        if caption:
            splits[_split(caption)].append(_row(path, image, caption))
    return splits


def photo_score(image: bytes) -> float:
    """Distinct colours at 5 bits a channel over the square root of the opaque pixels, at most 128 x 128."""
    import numpy as np
    from PIL import Image

    layer = Image.open(io.BytesIO(image)).convert("RGBA")
    layer.thumbnail((128, 128))
    pixels = np.asarray(layer).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] > 127, :3] >> 3
    return len(np.unique(opaque, axis=0)) / max(1.0, len(opaque) ** 0.5)


def _row(path: PurePosixPath, image: bytes, caption: str) -> dict[str, Any]:
    drawn = "cartoon" in str(path) or photo_score(image) <= _PHOTO
    return {
        "image": as_text(image),
        "caption": caption,
        "captions": [caption],
        "category": path.parts[0],
        "subcategory": str(path.parent),
        "style": "drawing" if drawn else "photo",
        "key": str(path),
    }


def _split(caption: str) -> str:
    words = [word for word in re.findall(r"\w+", caption.lower()) if word not in ("a", "an", "the")]
    share = int(hashlib.sha256(" ".join(words).encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < 0.15 else "validation" if share < 0.25 else "train"


def _package() -> Path:
    found = find_source("tuxpaint-stamps-default_*.deb", "tuxpaint-stamps-default/" + _FOLDER)
    if found is None and INSTALLED.is_dir():
        found = INSTALLED
    if found is None:
        do = "run `apt-get download tuxpaint-stamps-default` in such a folder, or install the package"
        must = "find the Debian package in $GOSSAMER_SOURCES, the cache's folder sources or installed"
        raise InputError("corpus stamp_photos", must=must, got="none", do=do)
    return found


if __name__ == "__main__":
    from gossamer.hub.corpora import SPLITS, load_corpus

    for part in SPLITS:
        corpus = load_corpus("stamp_photos", split=part)
        print(f"{part}: {len(corpus.rows)} pictures, {sum(row['style'] == 'photo' for row in corpus.rows)} photographs")
    print(f"sha256 {corpus.sha256}\n{corpus.licence}")
