"""Corpora of real text that installed packages ship: one file each, found in this folder.

A corpus file has ``LICENCE``, ``sources() -> tuple[str, ...]`` (distribution==version of all that is read) and
``build() -> {split: rows}``. What it builds is kept as JSON lines in the cache, under a name that holds the hash of
the versions and of the reading code, so an upgrade or an edit builds it anew.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.paths import atomic_dir, cache_dir

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Corpus:
    """Rows of one split. ``sha256`` is over the rows of the whole corpus, all splits, before any sampling."""

    name: str
    split: str
    rows: list[dict[str, Any]]
    sha256: str
    licence: str
    sources: tuple[str, ...]


def corpora() -> list[str]:
    """Names of all corpora, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def load_corpus(name: str, *, split: str = "train", limit: int | None = None, seed: int = 0) -> Corpus:
    """Read one split of a corpus, building the corpus first where the cache lacks it.

    ``limit`` takes a random sample of that many rows drawn with ``seed`` (all rows where there are fewer).
    Raises OptionError for an unknown name or split or a limit below 1, InputError where what it reads is absent.
    """
    if name not in corpora():
        raise OptionError("corpus", must="be a known name", got=repr(name), do=did_you_mean(name, corpora()))
    if split not in SPLITS:
        raise OptionError(f"corpus {name}: split", must="exist", got=repr(split), do=did_you_mean(split, SPLITS))
    if limit is not None and limit < 1:
        raise OptionError(f"corpus {name}: limit", must="be at least 1", got=limit, do="leave it out for all rows")
    module = importlib.import_module(f"{__name__}.{name}")
    sources: tuple[str, ...] = module.sources()
    folder = _built(name, module, sources)
    with open(folder / f"{split}.jsonl", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    if limit is not None and limit < len(rows):
        rows = random.Random(seed).sample(rows, limit)
    digest = (folder / "sha256").read_text(encoding="utf-8").strip()
    return Corpus(name, split, rows, digest, module.LICENCE, sources)


def _built(name: str, module: ModuleType, sources: tuple[str, ...]) -> Path:
    """The cache folder of this corpus as these sources and this code make it."""
    key = hashlib.sha256("\n".join(sources).encode())
    for path in (Path(str(module.__file__)), *sorted(Path(__file__).parent.glob("_*.py"))):
        key.update(path.read_bytes())
    folder = cache_dir("corpora") / f"{name}-{key.hexdigest()[:16]}"
    with FileLock(cache_dir("corpora") / f".{name}.lock"):
        if not folder.is_dir():
            _write(folder, name, module.build())
    return folder


def _write(folder: Path, name: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    digest = hashlib.sha256()
    with atomic_dir(folder) as temporary:
        for split in SPLITS:
            if not splits.get(split):
                raise InputError(f"corpus {name}: split {split}", must="have rows", got=0, do="install its sources")
            text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in splits[split])
            (temporary / f"{split}.jsonl").write_text(text, encoding="utf-8")
            digest.update(f"{split}\n{text}".encode())
        (temporary / "sha256").write_text(digest.hexdigest() + "\n", encoding="utf-8")
