"""The manifest of a package: what the folder holds, with the hash of every file, checked before anything is loaded.

FOLDER/manifest.json lists each file with its bytes and SHA-256, and carries in ``sha256`` the hash of itself: that of
its canonical JSON (keys sorted, no spaces, ASCII) without that key. A file that was changed, lost or added is refused,
and so is a manifest that was edited. This is integrity, not authenticity: whoever rewrites files can write a manifest
that fits them. Who it came from only the hash can tell, compared with one that came by another way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.paths import sha256

MANIFEST = "manifest.json"
FORMAT = "gossamer-package"
VERSION = 1
FOLDERS = ("model", "adapter", "parts", "companions")
SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".model", ".txt")
"""Weights as safetensors, and text: nothing here can run code when it is read."""

_LARGEST = 16_000_000  # bytes of a manifest; one of a thousand files has some 200,000
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "base": dict,
    "adapters": list,
    "parts": dict,
    "acceleration": (str, type(None)),
    "companions": dict,
    "lineage": list,
    "versions": dict,
    "licences": dict,
    "claims": dict,
    "probe": (dict, type(None)),
    "files": dict,
}


def is_package(folder: Path) -> bool:
    """Whether ``folder`` is a package, whole or not: its manifest says so, or cannot be read and is no model's."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return False
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return not (Path(folder) / "config.json").exists()  # what is broken is said where it is read
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """``{path: {"bytes", "sha256"}}`` of every file but the manifest; refuses links and kinds of file without a place.

    Paths are relative to ``folder``, with slashes, in sorted order.
    """
    found = {}
    for path in sorted(_walk(folder)):
        _check_path(folder, path)
        file = folder / path
        found[path] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return found


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with format, version and its own hash."""
    sealed = {"format": FORMAT, "version": VERSION, **manifest}
    return {**sealed, "sha256": _digest(sealed)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, its own hash checked; :class:`InputError` where it is edited or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise InputError(str(folder), must=f"hold {MANIFEST}", do="give the folder of a package")
    if path.stat().st_size > _LARGEST:
        raise InputError(str(path), must=f"be at most {_LARGEST} bytes", got=path.stat().st_size, do=_AGAIN)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), must="be JSON", got=str(error), do=_AGAIN) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = repr(manifest.get("format")) if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(str(path), must=f"be of the format {FORMAT!r}", got=got, do="give the folder of a package")
    version = manifest.get("version")
    if version != VERSION or isinstance(version, bool):
        do = "write the package again, or install the Gossamer that wrote it"
        raise InputError(str(path), must=f"be of version {VERSION}", got=repr(version), do=do)
    if manifest.get("sha256") != _digest(manifest):
        raise InputError(str(path), must="be as it was written", got="one that was edited", do=_AGAIN)
    _check_fields(path, manifest)
    return manifest


def check_package(folder: Path) -> dict[str, Any]:
    """The manifest of a package of which every file is there, no other, each as it was written.

    Reads every file once and loads nothing. :class:`InputError` names the first file that is missing, changed or
    superfluous, and any path or link that leads out of the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    listed: dict[str, Any] = manifest["files"]
    for path, facts in listed.items():
        _check_path(folder, path)
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise InputError(f"{folder / MANIFEST}: {path}", must="have bytes and sha256", got=facts, do=_AGAIN)
    present = set(_walk(folder))
    missing, extra = sorted(listed.keys() - present), sorted(present - listed.keys())
    if missing:
        got = f"{len(missing)} missing, {missing[0]} first"
        raise InputError(f"package {folder}", must="hold every file that it lists", got=got, do=_AGAIN)
    if extra:
        got = f"{len(extra)} more, {extra[0]} first"
        raise InputError(f"package {folder}", must="hold no file that it does not list", got=got, do="remove it")
    for path, facts in listed.items():
        file = folder / path
        if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
            raise InputError(f"{file}", must="be as it was written", got="other bytes (SHA-256 differs)", do=_AGAIN)
    return manifest


def summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a person wants to know of a package, in short; JSON values."""
    base = manifest["base"]
    return {
        "name": manifest["name"],
        "base": base["name"] or "inside",
        "adapters": [call["name"] for call in manifest["adapters"]],
        "parts": sorted(manifest["parts"]),
        "companions": {name: one["name"] or "inside" for name, one in manifest["companions"].items()},
        "files": len(manifest["files"]),
        "bytes": sum(facts["bytes"] for facts in manifest["files"].values()),
        "licences": dict(manifest["licences"]),
        "claims": {name: claim["status"] for name, claim in manifest["claims"].items()},
        "probe": manifest["probe"] is not None,
        "sha256": manifest["sha256"],
    }


_AGAIN = "copy or write the package again, and do not load this one"


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _walk(folder: Path) -> Iterator[str]:
    """Every file but the manifest; :class:`InputError` at a link or a thing that is no plain file."""
    for where, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(where) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                got = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                raise InputError(str(path), must="be a plain file or folder", got=got, do="copy what it points to")
        for name in files:
            relative = (Path(where) / name).relative_to(folder).as_posix()
            if relative != MANIFEST:
                yield relative


def _check_path(folder: Path, path: str) -> None:
    """In one of the folders, below no other; of a kind that is read without running anything."""
    where, parts = f"{folder}: file {path!r}", path.split("/")
    plain = not any(part in ("", ".", "..") or "\\" in part or ":" in part or "\0" in part for part in parts)
    if not plain or len(parts) < 2 or parts[0] not in FOLDERS:
        raise InputError(where, must=f"lie below {', '.join(FOLDERS)}", do=_AGAIN)
    if PurePosixPath(path).suffix not in SUFFIXES:
        raise InputError(where, must=f"be one of {', '.join(SUFFIXES)}", do="a package holds no code and no pickles")


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """Names that become paths, and the shape that readers rely on."""
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field, ...), kind):
            raise InputError(f"{path}: {field}", must="be there and of its type", got=manifest.get(field), do=_AGAIN)
    calls = [*manifest["adapters"], *manifest["parts"].values()]
    if not all(isinstance(call, dict) and {"name", "options", "seed"} <= call.keys() for call in calls):
        raise InputError(f"{path}: adapters and parts", must="have name, options and seed", do=_AGAIN)
    models = {"base": manifest["base"], **manifest["companions"]}
    for key, model in models.items():
        if not (isinstance(model, dict) and {"name", "fingerprint"} <= model.keys() and _NAME.fullmatch(key)):
            raise InputError(f"{path}: model {key!r}", must="have a plain name and a fingerprint", got=model, do=_AGAIN)
        name = model["name"]
        if name is not None and not (isinstance(name, str) and _MODEL.fullmatch(name)):
            must = "be the name of a model or owner/name"
            raise InputError(f"{path}: {key}", must=must, got=repr(name), do=_AGAIN)
    for name in manifest["parts"]:
        if not _NAME.fullmatch(name):
            raise InputError(f"{path}: part {name!r}", must="have a plain name", do=_AGAIN)
