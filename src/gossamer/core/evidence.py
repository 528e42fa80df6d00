"""Evidence: what an experiment showed, and whether that still speaks of the code as it is now.

Two hashes over tokens without comments: the system with its experiment (changed: stale), and the parts and kinds that
they import (changed: recheck).
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gossamer.core.card import Entry
from gossamer.core.paths import cache_dir, write_json
from gossamer.core.registry import PACKAGE

STATUSES = ("shown", "not_shown", "stale", "recheck", "none")
_SHARED = ("gossamer.parts", "gossamer.kinds")


def evidence_path(entry: Entry) -> Path:
    return PACKAGE / "evidence" / entry.kind / f"{entry.name}.json"


def experiment_path(entry: Entry) -> Path:
    return PACKAGE / "experiments" / entry.kind / f"{entry.name}.py"


def read_evidence(entry: Entry) -> dict[str, Any] | None:
    """The recorded evidence of a system, or ``None``."""
    path = evidence_path(entry)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def status(entry: Entry) -> dict[str, Any]:
    """``{"status": shown | not_shown | stale | recheck | none, "date", "device"}``."""
    evidence = read_evidence(entry)
    if evidence is None:
        return {"status": "none", "date": None, "device": None}
    if evidence["code_hash"] != code_hash(entry):
        state = "stale"
    elif evidence["parts_hash"] != parts_hash(entry):
        state = "recheck"
    else:
        state = "shown" if evidence["shown"] else "not_shown"
    return {"status": state, "date": evidence["date"], "device": evidence["device"]}


def code_hash(entry: Entry) -> str:
    """Over the system's own files and its experiment."""
    return _combine(_own(entry))


def parts_hash(entry: Entry) -> str:
    """Over the shared modules that they import, directly or through one another."""
    seen: set[Path] = set()
    waiting = [path for own in _own(entry) for path in _facts(own)[1]]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting.extend(_facts(path)[1])
    return _combine(seen)


def _own(entry: Entry) -> list[Path]:
    path = Path(entry.path)
    files = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    experiment = experiment_path(entry)
    return [*files, experiment] if experiment.exists() else files


def _combine(paths: Iterable[Path]) -> str:
    rows = sorted(f"{path.name}:{_facts(path)[0]}" for path in paths)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


_memory: dict[str, tuple[int, str, list[str]]] = {}


def _facts(path: Path) -> tuple[str, list[Path]]:
    """Token hash and shared imports of a file, remembered by modification time."""
    store = cache_dir() / "tokens.json"
    if not _memory and store.exists():
        try:
            _memory.update({key: (row[0], row[1], row[2]) for key, row in json.loads(store.read_text()).items()})
        except (ValueError, LookupError):
            _memory.clear()  # cut short or of another version: read the sources again
    stamp = path.stat().st_mtime_ns
    known = _memory.get(str(path))
    if known is None or known[0] != stamp:
        source = path.read_text(encoding="utf-8")
        known = (stamp, _token_hash(source), [str(shared) for shared in _shared_imports(source)])
        _memory[str(path)] = known
        write_json(store, _memory)
    return known[1], [Path(text) for text in known[2]]


def _token_hash(source: str) -> str:
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    words = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.INDENT:
            words.append("{")
        elif token.type == tokenize.DEDENT:
            words.append("}")
        elif token.type not in skipped:
            words.append(token.string)
    return hashlib.sha256("\x00".join(words).encode()).hexdigest()[:16]


def _shared_imports(source: str) -> list[Path]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    found: list[Path] = []
    for name in sorted(names):
        if name.startswith(_SHARED):
            path = PACKAGE.joinpath(*name.split(".")[1:])
            found.extend(c for c in (path.with_suffix(".py"), path / "__init__.py") if c.exists())
    return found
