"""Names, sections and short descriptions of Debian's packages, from the package index that apt keeps.

Rows: ``name``, ``section`` (without the archive area), ``description`` (one line), ``text`` (the description with the
package's own name masked, since the name gives the section away), ``source`` (source package). Split by a hash of the
source package: packages built from one source share their descriptions.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.paths import sha256

FOLDER = Path("/var/lib/apt/lists")
LICENCE = "not stated in the index"


def sources() -> tuple[str, ...]:
    """Hash of each index file; InputError where apt has none."""
    return tuple(f"{path.name}==sha256:{sha256(path)[:16]}" for path in _indexes())


def build() -> dict[str, list[dict[str, Any]]]:
    """Read every index, the first entry of a name stays, and split."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    names: set[str] = set()
    for path in _indexes():
        for row in read_index(_text(path)):
            if row["name"] not in names:
                names.add(row["name"])
                share = int(hashlib.sha256(row["source"].encode()).hexdigest()[:8], 16) / 2**32
                splits["test" if share < 0.1 else "validation" if share < 0.2 else "train"].append(row)
    return splits


def read_index(text: str) -> Iterator[dict[str, Any]]:
    """Rows of a Packages file: stanzas of ``Field: value`` lines with an empty line between them."""
    for stanza in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[A-Za-z0-9-]+: ", line))
        if {"Package", "Section", "Description"} <= fields.keys():
            name, description = fields["Package"], fields["Description"].strip()
            yield {
                "name": name,
                "section": fields["Section"].rpartition("/")[2],
                "description": description,
                "text": _masked(description, name),
                "source": fields.get("Source", name).split(" ")[0],
            }


def _masked(description: str, name: str) -> str:
    """The description with the name and its parts of three letters and more replaced by ``_``."""
    parts = {name, *(part for part in re.split(r"[^a-z]+", name) if len(part) > 2)}
    pattern = "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True))
    return re.sub(rf"(?<!\w)({pattern})(?!\w)", "_", description, flags=re.IGNORECASE)


def _indexes() -> list[Path]:
    # no security or updates archive: they change with every apt-get update
    found = [
        path
        for path in sorted(FOLDER.glob("*_Packages*"))
        if path.suffix in ("", ".gz", ".xz", ".lz4") and not re.search(r"-(security|updates)_", path.name)
    ]
    if not found:
        raise InputError(
            "corpus debian_packages", must=f"find a package index in {FOLDER}", got="none", do="run apt-get update"
        )
    return found


def _text(path: Path) -> str:
    if path.suffix == ".lz4":
        return _from_lz4(path).decode("utf-8")
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    return unpack(path.read_bytes()).decode("utf-8")


def _from_lz4(path: Path) -> bytes:
    """apt's own helper reads what apt wrote; lz4 is in no library that is always there."""
    helper = shutil.which("apt-helper") or "/usr/lib/apt/apt-helper"
    if not Path(helper).exists():
        raise InputError(f"corpus debian_packages: {path.name}", must="be readable with apt-helper", do="install apt")
    return subprocess.run([helper, "cat-file", str(path)], check=True, capture_output=True).stdout
