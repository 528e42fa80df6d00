"""The registry is the folder tree: every file with a ``CARD`` in a kind's folder, and entry points of other packages.

Nothing is imported; files are parsed once and remembered by modification time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.core.card import Card, Entry, read_entry
from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.kinds import KINDS
from gossamer.core.options import OptionSpec
from gossamer.core.paths import atomic_file, cache_dir

PACKAGE = Path(__file__).resolve().parent.parent
STEPS = "steps"
Key = tuple[str, int, int, int]  # path, modification time, size, version of the reader


@functools.cache
def systems() -> dict[str, Entry]:
    """All systems by name, those of other distributions included."""
    return _named(entry for entry in _scan() if entry.kind != STEPS)


@functools.cache
def steps() -> dict[str, Entry]:
    """The pipeline's own steps by name."""
    return _named(entry for entry in _scan() if entry.kind == STEPS)


def find(name: str, *, kind: str | None = None) -> Entry:
    """The system ``name`` of ``kind`` ("guards|decoding" for either); :class:`OptionError` with the nearest name."""
    found = {key: entry for key, entry in systems().items() if kind is None or entry.kind in kind.split("|")}
    if name not in found:
        what = "a system" if kind is None else f"one of the {kind.replace('|', ' or ')}"
        raise OptionError(repr(name), must=f"name {what}", do=did_you_mean(name, found))
    return found[name]


def refresh() -> None:
    """Forget what was scanned, for processes that install packages while they run."""
    for cached in (systems, steps, _scan):
        cached.cache_clear()


def _named(found: Iterator[Entry]) -> dict[str, Entry]:
    table: dict[str, Entry] = {}
    for entry in found:
        if entry.name in table:
            raise InputError(
                f"the name {entry.name!r}",
                must="belong to one system",
                got=f"{table[entry.name].path} and {entry.path}",
                do="rename one file",
            )
        table[entry.name] = entry
    return dict(sorted(table.items()))


@functools.cache
def _scan() -> tuple[Entry, ...]:
    files = [*_own_files(), *_foreign_files()]
    store = cache_dir() / "registry.json"
    remembered = _recall(store)
    table = {}
    for path, name, kind, module, origin in files:
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size, _parser_version())
        table[key] = (
            remembered[key]
            if key in remembered
            else read_entry(path, name=name, kind=kind, module=module, origin=origin)
        )
    if table.keys() != remembered.keys():
        _remember(store, table)
    return tuple(entry for entry in table.values() if entry is not None)


def _own_files() -> Iterator[tuple[Path, str, str, str, str]]:
    folders = [(PACKAGE / kind, kind, f"gossamer.{kind}") for kind in KINDS]
    folders.append((PACKAGE / "pipeline" / STEPS, STEPS, f"gossamer.pipeline.{STEPS}"))
    for folder, kind, package in folders:
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix == ".py" and path.stem != "__init__":
                yield path, path.stem, kind, f"{package}.{path.stem}", "gossamer"
            elif (path / "__init__.py").exists():
                yield path / "__init__.py", path.name, kind, f"{package}.{path.name}", "gossamer"


def _foreign_files() -> Iterator[tuple[Path, str, str, str, str]]:
    points = [(point, dist.name) for dist in importlib.metadata.distributions() for point in dist.entry_points]
    for point, origin in points:
        if not point.group.startswith("gossamer."):
            continue
        kind = point.group.removeprefix("gossamer.")
        if kind not in KINDS:
            raise InputError(
                f"entry point group {point.group} of {origin}", must="end in a kind", do=did_you_mean(kind, KINDS)
            )
        yield _locate(point.module, origin), point.name, kind, point.module, origin


def _locate(module: str, origin: str) -> Path:
    relative = Path(*module.split("."))
    for base in sys.path:
        for candidate in (Path(base) / relative.with_suffix(".py"), Path(base) / relative / "__init__.py"):
            if candidate.exists():
                return candidate
    raise InputError(f"entry point {module} of {origin}", must="be a module on sys.path", do=f"reinstall {origin}")


@functools.cache
def _parser_version() -> int:
    """Changes when the code that reads cards does, so that remembered entries are read again."""
    here = Path(__file__).parent
    return sum((here / name).stat().st_mtime_ns for name in ("card.py", "options.py", "kinds.py", "registry.py"))


def _recall(store: Path) -> dict[Key, Entry | None]:
    try:
        rows = json.loads(store.read_text(encoding="utf-8"))
        return {tuple(key): _entry(row) for key, row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # absent, cut short or of another version: read the sources again


def _entry(row: dict[str, Any] | None) -> Entry | None:
    if row is None:
        return None
    values = {key: _tuples(value) for key, value in row.items()}
    values["card"] = Card(**values["card"])
    values["options"] = tuple(OptionSpec(**spec) for spec in values["options"])
    return Entry(**values)


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and cards and options hold no lists."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _remember(store: Path, table: dict[Key, Entry | None]) -> None:
    rows = [(key, entry and dataclasses.asdict(entry)) for key, entry in table.items()]
    with atomic_file(store) as path:
        path.write_text(json.dumps(rows), encoding="utf-8")
