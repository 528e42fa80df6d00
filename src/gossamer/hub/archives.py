"""Files of packages that no Python installation brings: npm and Debian archives, packed or unpacked.

Archives are looked for in ``$GOSSAMER_SOURCES`` (folders, separated as in PATH) or else in the folder ``sources`` of
the cache. Nothing is installed: ``npm pack NAME`` and ``apt-get download NAME`` put an archive into the present folder.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import InputError
from gossamer.core.paths import cache_dir, sha256

if TYPE_CHECKING:
    from PIL.Image import Image

VARIABLE = "GOSSAMER_SOURCES"


def source_folders() -> list[Path]:
    """Folders in which packed or unpacked packages are looked for."""
    named = os.environ.get(VARIABLE)
    return [Path(part).expanduser() for part in named.split(os.pathsep) if part] if named else [cache_dir("sources")]


def find_source(*patterns: str) -> Path | None:
    """The last by name of what fits the first pattern that anything fits, in the first folder that has it."""
    for folder in source_folders():
        for pattern in patterns:
            found = sorted(folder.glob(pattern))
            if found:
                return found[-1]
    return None


def read_package(path: Path, keep: Callable[[str], bool]) -> dict[str, bytes]:
    """Files of an unpacked folder, a .tar.* or .tgz archive or a .deb package, by name, where ``keep(name)``.

    Names are relative to the package: without ``./`` and without npm's ``package/``. Raises InputError for another
    kind of file and for a damaged one.
    """
    try:
        return dict(_files(path, keep))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError, ValueError) as error:
        do = "download it again: npm pack, or apt-get download"
        raise InputError(f"package {path}", must="be a whole archive", got=str(error), do=do) from error


def package_hash(path: Path) -> str:
    """16 hex digits over an archive's bytes, or over the names and sizes in a folder."""
    if path.is_file():
        return sha256(path)[:16]
    listing = sorted(f"{file.relative_to(path)} {file.stat().st_size}" for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def picture(row: Mapping[str, Any]) -> Image:
    """The picture of a corpus row, whose ``image`` holds the file's bytes in base 64; as stored, transparent or not."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(row["image"])))


def as_text(data: bytes) -> str:
    """A file's bytes as a row holds them."""
    return base64.b64encode(data).decode("ascii")


def _files(path: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and keep(name):
                yield name, file.read_bytes()
    elif path.suffix == ".deb":
        yield from _tar(io.BytesIO(_deb_member(path, b"data.tar")), keep)
    else:
        with open(path, "rb") as stream:
            yield from _tar(stream, keep)


def _tar(stream: Any, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r:*") as archive:
        for member in archive:
            name = member.name.removeprefix("./").removeprefix("package/")
            if member.isfile() and keep(name):
                content = archive.extractfile(member)
                if content is not None:
                    yield name, content.read()


def _deb_member(path: Path, prefix: bytes) -> bytes:
    """A member of the ar archive that a .deb is: 60-byte headers, name first, size as decimal at 48."""
    data = path.read_bytes()
    if data[:8] != b"!<arch>\n":
        raise ValueError("no ar archive")
    place = 8
    while place + 60 <= len(data):
        name, size = data[place : place + 16], int(data[place + 48 : place + 58])
        if place + 60 + size > len(data):
            raise ValueError("cut off")
        if name.startswith(prefix):
            return data[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError(f"no member {prefix.decode()}")
