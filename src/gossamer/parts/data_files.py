"""Raw records with their positions, from files, folders, hub data sets and lists.

``records(source)`` yields a :class:`Record` for every row and a :class:`Finding` for every place that cannot be read,
in order and without stopping at the first, so that the data doctor can show them all and a loader can raise the first.
Formats: ``.jsonl``/``.ndjson``, ``.json`` (a list, or JSON Lines under that name), ``.csv``/``.tsv``, ``.parquet``, a
folder of such files, ``ORG/NAME[:CONFIG][:SPLIT]`` on the hub (split ``train`` if none is given), or a list of dicts.
Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError, did_you_mean

Source = str | Path | Iterable[Mapping[str, Any]]

_BOM = b"\xef\xbb\xbf"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong at one place. ``row`` counts from 1; ``line`` is the physical line of a text file, if it has one.

    ``expected`` completes "must ...", ``fix`` says what to do. Severity "error" stops a loader, "warning" does not.
    """

    file: str
    row: int | None
    field: str
    found: str
    expected: str
    fix: str
    severity: str = "error"
    line: int | None = None

    @property
    def where(self) -> str:
        place = self.file
        if self.row is not None:
            place += f" row {self.row}"
        if self.line is not None:
            place += f" (line {self.line})"
        return f"{place}, {self.field}" if self.field else place

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def error(self) -> InputError:
        return InputError(self.where, must=self.expected, got=self.found, do=self.fix)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read, before any check."""

    value: Any
    file: str
    row: int
    line: int | None = None


def records(source: Source, *, limit: int | None = None) -> Iterator[Record | Finding]:
    """Yield records and findings; stops after ``limit`` records. A source that does not exist raises InputError."""
    count = 0
    for item in _open(source):
        if isinstance(item, Record):
            if limit is not None and count >= limit:
                return
            count += 1
        yield item


def _open(source: Source) -> Iterator[Record | Finding]:
    if not isinstance(source, str | Path):
        return _counted("rows", ((value, None) for value in source))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if isinstance(source, str) and path.suffix.lower() not in _READERS and _HUB_ID.fullmatch(source):
        return _read_hub(source)
    raise _not_found(path)


def _read_folder(folder: Path) -> Iterator[Record | Finding]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    data = [path for path in files if path.suffix.lower() in _READERS]
    if not data:
        raise InputError(str(folder), must=f"hold files named {_suffixes()}", got=f"{len(files)} other files")
    for path in files:
        if path in data:
            yield from _read_file(path)
        else:
            fix = f"nothing to do if it holds no data; else convert it to {_suffixes()}"
            yield Finding(str(path), None, "", "a file of another kind, not read", "be a data file", fix, "warning")


def _read_file(path: Path) -> Iterator[Record | Finding]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(str(path), must=f"be named {_suffixes()}", got=path.suffix or "no suffix", do="convert it")
    empty = True
    for item in reader(path):
        empty = False
        yield item
    if empty:
        found = "no rows" if path.stat().st_size else "an empty file"
        yield Finding(str(path), None, "", found, "hold at least one row", "fill the file or leave it out")


def _read_jsonl(path: Path) -> Iterator[Record | Finding]:
    offset = row = 0
    with open(path, "rb") as stream:
        for line, raw in enumerate(stream, 1):
            text, problem = _decode(raw, str(path), offset, line)
            offset += len(raw)
            if problem is not None:
                yield problem
                return
            if not text.strip():
                continue
            row += 1
            try:
                value = json.loads(text)
            except ValueError as error:
                yield _broken_line(path, row, line, text, error)
                if row == 1 and text.lstrip().startswith("["):
                    return
                continue
            yield Record(value, str(path), row, line)


def _read_json(path: Path) -> Iterator[Record | Finding]:
    text, problem = _decode(path.read_bytes(), str(path), 0, None)
    if problem is not None:
        yield problem
        return
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        fix = "mend it there (double quotes, no comma after the last item), or save it as JSON Lines in a .jsonl file"
        found = f"{error.msg} at line {error.lineno}, column {error.colno}"
        yield Finding(str(path), None, "", found, "be valid JSON", fix, line=error.lineno)
        return
    if isinstance(value, list):
        yield from _counted(str(path), ((item, None) for item in value))
    elif isinstance(value, dict):
        yield Record(value, str(path), 1)
    else:
        yield Finding(str(path), None, "", type(value).__name__, "be a list of rows", "save the rows as one list")


def _read_csv(path: Path) -> Iterator[Record | Finding]:
    text, problem = _decode(path.read_bytes(), str(path), 0, None)
    if problem is not None:
        yield problem
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _long_fields():
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        row = 0
        try:
            for row, value in enumerate(reader, 1):
                line = reader.line_num
                if None in value or None in value.values():
                    width = len(reader.fieldnames or ())
                    found = "more cells" if None in value else "fewer cells"
                    fix = 'put cells that hold commas or line breaks in double quotes ("" for a quote inside)'
                    yield Finding(str(path), row, "", found, f"have {width} cells like the header", fix, line=line)
                    continue
                yield Record(_typed_cells(value), str(path), row, line)
        except csv.Error as error:
            fix = "close the quote that is left open before this line"
            yield Finding(str(path), row + 1, "", str(error), "be valid CSV", fix, line=reader.line_num)


def _typed_cells(value: dict[str, Any]) -> dict[str, Any]:
    """CSV holds strings only: ``weight`` becomes a number, an empty weight is no weight."""
    if "weight" not in value:
        return value
    cells = dict(value)
    if cells["weight"].strip() == "":
        del cells["weight"]
    else:
        with contextlib.suppress(ValueError):
            cells["weight"] = float(cells["weight"])
    return cells


def _read_parquet(path: Path) -> Iterator[Record | Finding]:
    import pyarrow
    from pyarrow import parquet

    if path.stat().st_size == 0:
        return
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from _counted(str(path), ((value, None) for batch in batches for value in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        yield Finding(str(path), None, "", found, "be a whole Parquet file", "write or download it again")


def _read_hub(name: str) -> Iterator[Record | Finding]:
    import datasets

    identity, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        data = datasets.load_dataset(identity, config, split=split)
    except Exception as error:
        # the library raises many kinds (missing, gated, offline, ambiguous config); each ends the same way for a user
        found = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "check the path; for the hub write ORG/NAME:CONFIG:SPLIT, and unset HF_HUB_OFFLINE if it is set"
        raise InputError(name, must="be a file, a folder or a hub data set", got=found, do=fix) from error
    return _counted(f"{identity}:{split}", ((value, None) for value in data))


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _suffixes() -> str:
    return ", ".join(_READERS)


def _counted(file: str, values: Iterable[tuple[Any, int | None]]) -> Iterator[Record]:
    for row, (value, line) in enumerate(values, 1):
        yield Record(value, file, row, line)


def _decode(raw: bytes, file: str, offset: int, line: int | None) -> tuple[str, Finding | None]:
    """UTF-8 text, or the finding that names the first wrong byte; ``offset`` is where ``raw`` begins in the file."""
    start = len(_BOM) if offset == 0 and raw.startswith(_BOM) else 0
    wide = offset == 0 and (raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in raw[:64])
    try:
        text = raw[start:].decode("utf-8")
        if not wide:
            return text, None
        at = max(raw.find(b"\x00"), 0)
    except UnicodeDecodeError as error:
        at = start + error.start
    guess = "UTF-16" if wide else "WINDOWS-1252"
    found = f"byte 0x{raw[at]:02x} at byte offset {offset + at}, probably {guess}"
    fix = f"convert it: iconv -f {guess} -t UTF-8 {Path(file).name} > utf8_{Path(file).name}"
    return "", Finding(file, None, "", found, "be UTF-8", fix, line=line)


def _broken_line(path: Path, row: int, line: int, text: str, error: ValueError) -> Finding:
    message = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    shown = text.strip()
    found = f"{message} in {shown[:60]!r}" + (" ..." if len(shown) > 60 else "")
    fix = "mend the line: double quotes, no comma after the last field, no line break inside a string"
    if row == 1 and shown.startswith("["):
        fix = "the file is one JSON list: name it .json"
    elif row == 1 and shown == "{":
        fix = "write each row on one line, or put the rows in a list in a .json file"
    return Finding(str(path), row, "", found, "be one JSON object on one line", fix, line=line)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses cells beyond 131,072 characters unless told otherwise, for the whole process."""
    old = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(old)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _not_found(path: Path) -> InputError:
    parent = path.parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    do = did_you_mean(path.name, siblings) if siblings else f"the folder {parent} does not exist or is empty"
    return InputError(str(path), must="be an existing file or folder, or a hub id", got="nothing of that name", do=do)
