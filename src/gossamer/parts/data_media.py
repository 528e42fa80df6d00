"""Rows of images and videos: kept as they are, with paths that hold from anywhere.

    {"image": "photos/1.png", "prompt": "What is it?", "answer": "a cup"}
    {"video": "kitchen.mp4", "narrations": [[0.0, 1.0, "wash the potato"], ...], "scene": "kitchen"}

One JSON object a line; paths are relative to the file of rows. What else a row holds is the processor's to check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError

KEYS = ("image", "video")


def media_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a JSON lines file whose first row has an image or a video; ``None`` for any other source.

    Raises InputError, with the line, for a row that is no JSON object or names no file that is there. A row whose
    image is null is one without an image.
    """
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        return None
    lines = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line]
    if not lines or _key(_object(lines[0][1])) is None:
        return None
    return [_row(line, path, number) for number, line in lines]


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    where, row = f"{path} line {number}", _object(line)
    key = _key(row)
    if row is None or key is None:
        do = "write one object a line, each with the key that the first has"
        raise InputError(where, must=f"be a JSON object with {' or '.join(KEYS)}", got=line[:60], do=do)
    if row[key] is None:
        return row
    media = path.parent / str(row[key])
    if not media.is_file():
        raise InputError(f"{where}: {key}", must="name a file", got=row[key], do="give a path relative to the rows")
    return {**row, key: str(media.resolve())}


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _key(row: dict[str, Any] | None) -> str | None:
    return next((key for key in KEYS if key in row), None) if row else None
